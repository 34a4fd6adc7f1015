"""Nodes by CID, walked lazily: the blocks a walk wants are asked of the cache and sent back to it.

Concurrency: every method may be called by many tasks at once; work that outlives its call (fetching ahead)
runs in the nursery given. Parsed nodes are kept for a while (`nodes`), bounded by the size of their blocks;
file bytes never are.
"""

import stat
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import trio

from ipfsfuse.cache.base import Cache, FileRef
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import directory_pages, nodes, traversal
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import NO_META, Directory, File, Link, Meta, Node, Shard, Symlink
from ipfsfuse.dag.values import Document
from ipfsfuse.errors import (
    IsADirectory,
    Malformed,
    NotACid,
    NotADirectory,
    NotALink,
    NotAllowed,
    NotFound,
    Unsupported,
)
from ipfsfuse.fileio import threads
from ipfsfuse.structures import Lru
from ipfsfuse.vfs.prefetch import DirectoryPrefetcher, SmallFileBuffer, SubtreePrefetcher

# -- attributes ----------------------------------------------------------------------------------------------


class Attributes(NamedTuple):
    """Of one file, directory or symlink."""

    mode: int
    """Type and permission bits, as in st_mode."""
    size: int
    """Content bytes."""
    mtime: int
    """Nanoseconds since 1970."""
    exact: bool = True
    """False while the size is only its link's claim."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def attributes_of(node: Node) -> Attributes:
    """The attributes of a node, from its own verified block."""
    match node:
        case File():
            return _attributes(stat.S_IFREG, 0o444, node.size, node.meta)
        case Symlink():
            return _attributes(stat.S_IFLNK, 0o777, len(node.target), node.meta)
        case Directory() | Shard():
            return _attributes(stat.S_IFDIR, 0o555, 0, node.meta)


def _attributes(kind: int, mode: int, size: int, meta: Meta) -> Attributes:
    return Attributes(kind | (mode if meta.mode is None else meta.mode), size, meta.mtime or 0)


ROOT_ATTRIBUTES = _attributes(stat.S_IFDIR, 0o555, 0, NO_META)


# -- nodes ---------------------------------------------------------------------------------------------------

NODES_WEIGHT = 8 << 20
"""Bytes of blocks whose parsed form is kept: it takes about one and a half times its block."""
PARSED_TOGETHER = 2
"""Large blocks that are parsed at a time: while it is, one takes several times its size."""
REREAD_SECONDS = 1.0
"""For which a large block may be read while it is its turn."""
LARGE = 1000
"""Large blocks that are remembered as such."""
KNOWN = 50_000
"""CIDs whose attributes are remembered after their node is not, for listings."""


class Use(Protocol):
    """Called with every block that a request used, or that was fetched ahead of one."""

    def __call__(self, cid: Cid, ahead: bool) -> None: ...


class Tree:
    def __init__(
        self, cache: Cache, nursery: trio.Nursery, use: Use | None = None, known: int = KNOWN
    ) -> None:
        """Remembers the attributes of `known` CIDs."""
        self.cache = cache
        self.nursery = nursery
        self.use = use
        self.small_files = SmallFileBuffer()
        self._parsing = trio.CapacityLimiter(PARSED_TOGETHER)
        self._large: Lru[Cid, bool] = Lru(LARGE)
        self._nodes: Lru[Cid, Node] = Lru(NODES_WEIGHT)
        self._documents: Lru[Cid, Document] = Lru(NODES_WEIGHT)
        """Of dag-cbor and dag-json blocks: what is in them may be looked up value by value."""
        self._known: Lru[Cid, Attributes] = Lru(known)
        """By canonical CID: what was seen by one spelling is known by the others."""
        self._subtrees = SubtreePrefetcher(cache, self._remember, self.small_files) if use is None else None
        self._prefetcher = (
            DirectoryPrefetcher(nursery, self._found, self.known, self._subtrees.contents_of)
            if self._subtrees
            else None
        )
        cache.when_blocks_leave(self._nodes.clear)
        cache.when_blocks_leave(self._documents.clear)
        if self._subtrees is not None:
            cache.when_blocks_leave(self._subtrees.forget)

    # -- nodes -----------------------------------------------------------------------------------------------

    async def node(self, cid: Cid) -> Node:
        """What `cid` names. Raises what the cache and the parser raise."""
        self.note_use(cid)
        return await self._found(cid)

    async def _found(self, cid: Cid) -> Node:
        found = self._at_hand(cid)
        return found if found is not None else await self._fetched(cid)

    def _at_hand(self, cid: Cid) -> Node | None:
        """What is remembered of `cid`: of a raw block its size is all."""
        found = self._nodes.get(cid)
        if found is None and cids.codec(cid) == cids.RAW and (known := self._known.get(cid)) is not None:
            found = File(cid, known.size, known.size)
        if found is not None and self.use is not None:
            self.use(cids.block_of(cid), ahead=False)
        return found

    async def _fetched(self, cid: Cid) -> Node:
        nodes.refuse_unshown(cid)
        if self._large.get(cid):
            return await self._parsed_in_turn(cid)
        if nodes.holds_values(cid):
            document = await self.document(cid)
            node = nodes.value_node(cid, document)
            self._remember(node, node.links.size + document.size if isinstance(node, Directory) else 0)
            return node
        inline = cids.inline(cid)
        block = await self._block(cid) if inline is None else inline
        if len(block) > nodes.MAX_PARSED_ON_LOOP and cids.codec(cid) == cids.DAG_PB:
            self._large.put(cid, True)
            if self._parsing.available_tokens < 1:
                del block
                return await self._parsed_in_turn(cid)
            async with self._parsing:
                return await self._parsed(cid, block)
        node = nodes.parse(cid, block)
        self._remember(node, len(block))
        return node

    async def _parsed_in_turn(self, cid: Cid) -> Node:
        """The node of a large block. It is read, from where it was staged or lies, when it is its turn: forty
        of 2 MiB in hand would take 300 MiB with what lies between them. If that takes long, its turn
        passes."""
        async with self._parsing:
            block = None
            with trio.move_on_after(REREAD_SECONDS):
                block = await self._block(cid)
            if block is not None:
                return await self._parsed(cid, block)
        return await self._parsed(cid, await self._block(cid))

    async def _parsed(self, cid: Cid, block: bytes) -> Node:
        node = await threads.run_sync(nodes.parse, cid, block)
        self._remember(node, len(block))
        return node

    def _remember(self, node: Node, size: int) -> None:
        """`node`, whose block has `size` bytes."""
        if cids.codec(node.cid) != cids.RAW:
            self._nodes.put(node.cid, node, size + 64)
        self._known.put(cids.canonical(node.cid), attributes_of(node))

    async def document(self, cid: Cid) -> Document:
        """The values of a dag-cbor or dag-json block: that of `cid`, or of the value `cid`."""
        block_cid = cids.block_of(cid)
        found = self._documents.get(block_cid)
        if found is not None:
            if self.use is not None:
                self.use(block_cid, ahead=False)
            return found
        inline = cids.inline(block_cid)
        block = await self._block(block_cid) if inline is None else inline
        if len(block) > nodes.MAX_VALUES_ON_LOOP:
            found = await threads.run_sync(nodes.document, cid, block)
        else:
            found = nodes.document(cid, block)
        self._documents.put(block_cid, found, found.size + 64)
        return found

    async def _block(self, cid: Cid) -> bytes:
        if self.use is not None:
            self.use(cid, ahead=False)
        return await self.cache.block(cid, early=True)

    async def attributes(self, cid: Cid) -> Attributes:
        """The attributes of what `cid` names, from memory where they are there."""
        found = self.known(cid)
        return found if found is not None else attributes_of(await self.node(cid))

    def known(self, cid: Cid) -> Attributes | None:
        """The attributes of `cid` if no block is needed for them."""
        found = self._known.get(cids.canonical(cid))
        return found if found is not None else _carried(cid)

    async def nodes(self, wanted: Sequence[Cid]) -> list[Node]:
        """The nodes of `wanted`, fetched side by side: what `traversal.drive` asks for. Without any, other
        tasks have their turn."""
        if not wanted:
            await trio.lowlevel.checkpoint()
        found = {cid: node for cid in wanted if (node := self._at_hand(cid)) is not None}
        missing = [cid for cid in wanted if cid not in found]
        failed: list[Exception] = []

        async def one(cid: Cid, scope: trio.CancelScope) -> None:
            try:
                found[cid] = await self._fetched(cid)
            except Exception as exc:
                failed.append(exc)
                scope.cancel()

        if len(missing) == 1:
            found[missing[0]] = await self._fetched(missing[0])
        elif missing:
            async with trio.open_nursery() as side_by_side:
                for cid in missing:
                    side_by_side.start_soon(one, cid, side_by_side.cancel_scope)
            if failed:
                raise failed[0]
        return [found[cid] for cid in wanted]

    # -- directories -----------------------------------------------------------------------------------------

    async def directory(self, cid: Cid) -> Directory | Shard:
        """Raises NotADirectory."""
        node = await self.node(cid)
        if not isinstance(node, Directory | Shard):
            raise NotADirectory(f"{cids.text(cid)} is not a directory")
        return node

    async def child(self, parent: Cid, name: bytes) -> Link:
        """The link of `name` in the directory `parent`. Raises NotFound where a verified directory has no
        such name."""
        link = await traversal.drive(traversal.child(await self.directory(parent), name), self.nodes)
        if link is None:
            raise NotFound(f"{name!r} is not in {cids.text(parent)}")
        return link

    async def entries(self, parent: Cid, after: int) -> directory_pages.Page:
        """The next entries behind place `after`, from the directory's own blocks: no child is fetched."""
        directory = await self.directory(parent)
        if self._subtrees is not None and not after:
            self._subtrees.nodes_of(directory)
        page = await traversal.drive(directory_pages.entries(directory, after), self.nodes)
        # a page has some thousand entries: they are not handled in one step of the loop
        await trio.lowlevel.checkpoint()
        if self._prefetcher is not None:  # else every block that is used must be reported
            self._prefetcher.listed(parent, after, [(entry.cid, entry.tsize) for entry in page.entries])
        return page

    def claimed_attributes(self, cid: Cid, tsize: int) -> Attributes | None:
        """What a listing shows of an entry whose link claims `tsize` (negative if there is no claim): what is
        known, else the claim, which gives the size of a raw block. No block is needed."""
        known = self.known(cid)
        if known is None and tsize >= 0 and cids.codec(cid) == cids.RAW:
            # surely a file, of that size if the publisher wrote the truth
            return Attributes(stat.S_IFREG | 0o444, tsize, 0, exact=False)
        return known

    # -- files and links -------------------------------------------------------------------------------------

    async def file(self, cid: Cid) -> File:
        """Raises IsADirectory, or NotFound for a symlink (the kernel never opens one)."""
        node = await self.node(cid)
        if isinstance(node, Directory | Shard):
            raise IsADirectory(f"{cids.text(cid)} is a directory")
        if isinstance(node, Symlink):
            raise NotFound(f"{cids.text(cid)} is a symlink")
        return node

    def file_at_hand(self, cid: Cid) -> File | None:
        """The file, if that is known without waiting; else None."""
        found = self._at_hand(cid)
        if not isinstance(found, File):
            return None
        self.note_use(cid)
        return found

    def used(self, cid: Cid, size: int) -> None:
        """Someone opened the file `cid`, of `size` bytes, and was not kept waiting for it: the kernel has it
        already."""
        self.opened(FileRef(cids.canonical(cid), size))
        self.note_use(cid)

    def opened(self, file: FileRef) -> None:
        """Someone opened `file`. The cache has no file for a value within a block."""
        if not nodes.holds_values(file.cid):
            self.cache.opened(file)

    def coming(self, cid: Cid) -> Iterable[tuple[Cid, bytes]]:
        """The contents of the files behind `cid` in its directory, as far as they have come and its reader
        will want them."""
        return (
            self.small_files.take_all(self._prefetcher.following(cid)) if self._prefetcher is not None else ()
        )

    def note_use(self, cid: Cid) -> None:
        """Someone used `cid` itself. The kernel may have the listing of a directory already."""
        if self._prefetcher is not None:
            self._prefetcher.used(cid)

    async def readlink(self, cid: Cid) -> bytes:
        """The target as stored. Raises NotALink."""
        node = await self.node(cid)
        if not isinstance(node, Symlink):
            raise NotALink(f"{cids.text(cid)} is not a symlink")
        return node.target


def _carried(cid: Cid) -> Attributes | None:
    """The attributes of a node that an identity CID carries in itself."""
    try:
        block = cids.inline(cid)
        return attributes_of(nodes.parse(cid, block)) if block is not None else None
    except (Malformed, Unsupported):  # a lookup of it will raise
        return None


# -- the root ------------------------------------------------------------------------------------------------

# A name is a CID in any spelling that fits a file name. A name that is not a CID is proved absent without
# asking anyone.

Named = tuple[Cid, str]
"""A CID and how it is spelled."""
Listed = tuple[Cid, str | Cid]
"""A canonical CID and its name: as it is spelled, or a CID whose usual spelling it is. `name_of` gives it: a
text for each of 200,000 roots would take more memory and time than the rest."""


def name_of(listed: Listed) -> bytes:
    """What the root calls it; longer than NAME_MAX where no file system can hold that."""
    spelled = listed[1]
    return (spelled if isinstance(spelled, str) else cids.text(spelled)).encode()


class Roots:
    """`of_sources` gives the roots of all sources, and is called in a worker thread: a library's are files.
    `named` gives what else is listed, on the event loop. `opened` is called with each CID used by name."""

    def __init__(
        self,
        of_sources: Callable[[], Iterable[Cid]],
        named: Callable[[], Iterable[Named]],
        opened: Callable[[Cid, str], None],
        allow: frozenset[Cid] | None,
    ) -> None:
        self._of_sources = of_sources
        self._named = named
        self._opened = opened
        self._allow = allow

    def parse(self, name: bytes) -> Cid:
        """The CID of a name. Raises NotFound for a name that is none, NotAllowed outside the allow-list."""
        try:
            cid = cids.parse(name.decode("utf-8"))
        except (NotACid, UnicodeDecodeError) as exc:
            raise NotFound(f"{name[:80]!r} is not a CID") from exc
        if self._allow is not None and cids.canonical(cid) not in self._allow:
            raise NotAllowed(f"{cids.text(cid)} is not on this mount's allow-list")
        return cid

    def note(self, cid: Cid, name: bytes) -> None:
        """`name` was opened and is really there."""
        self._opened(cid, name.decode("utf-8"))

    async def entries(self) -> Sequence[Listed]:
        """What the root lists now: each CID once, as first spelled."""
        return await threads.run_sync(self._entries, list(self._named()))

    def _entries(self, named: Sequence[Named]) -> Sequence[Listed]:
        seen: dict[Cid, str | Cid] = {}
        for root in self._of_sources():
            seen.setdefault(cids.canonical(root), root)
        for cid, spelling in named:
            seen.setdefault(cids.canonical(cid), spelling)
        return [item for item in seen.items() if self._allow is None or item[0] in self._allow]
