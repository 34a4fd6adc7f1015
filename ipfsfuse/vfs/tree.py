"""The tree of nodes: finds children, entries, files and attributes by CID, and fetches only the blocks that
are needed for that.

Concurrency: every method may be called by many tasks at once. Work that outlives its call (prefetching) runs
in the given nursery. Parsed nodes are kept for a while, bounded by the size of their blocks; file content is
not kept.
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
    """The attributes of a file, directory or symlink."""

    mode: int
    """Type and permission bits, as in st_mode."""
    size: int
    """Bytes of the content."""
    mtime: int
    """Nanoseconds since 1970."""
    exact: bool = True
    """False if the size is only claimed by its link."""

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
"""Bytes of blocks of which the parsed nodes are kept. A node takes about one and a half times its block."""
PARSED_TOGETHER = 2
"""Large blocks that are parsed at a time: parsing one takes several times its size in memory."""
REREAD_SECONDS = 1.0
"""Seconds for which a large block may be read while it holds one of these places."""
LARGE = 1000
"""CIDs of large blocks that are remembered."""
KNOWN = 50_000
"""CIDs whose attributes are remembered longer than their nodes, for listings."""


class Use(Protocol):
    """Called with every block that a request used or that was fetched ahead, for recording mounts."""

    def __call__(self, cid: Cid, ahead: bool) -> None: ...


class Tree:
    def __init__(
        self, cache: Cache, nursery: trio.Nursery, use: Use | None = None, known: int = KNOWN
    ) -> None:
        """`known`: the number of CIDs whose attributes are remembered."""
        self.cache = cache
        self.nursery = nursery
        self.use = use
        self.small_files = SmallFileBuffer()
        self._parsing = trio.CapacityLimiter(PARSED_TOGETHER)
        self._large: Lru[Cid, bool] = Lru(LARGE)
        self._nodes: Lru[Cid, Node] = Lru(NODES_WEIGHT)
        self._documents: Lru[Cid, Document] = Lru(NODES_WEIGHT)
        """The values of dag-cbor and dag-json blocks, by the block's CID."""
        self._known: Lru[Cid, Attributes] = Lru(known)
        """Attributes by canonical CID, so that all spellings share them."""
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
        """The node of `cid`. Raises what the cache and the parser raise."""
        self.note_use(cid)
        return await self._found(cid)

    async def _found(self, cid: Cid) -> Node:
        found = self._at_hand(cid)
        return found if found is not None else await self._fetched(cid)

    def _at_hand(self, cid: Cid) -> Node | None:
        """The node of `cid` if it is in memory. For a raw block, its size is enough."""
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
        inline = cids.inline_block(cid)
        if inline is None and cids.codec(cid) == cids.RAW:
            size = await self._size(cid)
            node = File(cid, size, size)
            self._remember(node, size)
            return node
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
        """The node of a large block, which is read (again) when it may be parsed: forty waiting blocks of 2
        MiB would take 300 MiB with memory fragmentation. If reading takes long, the place is given up, and
        the block is parsed without one."""
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
        """Keeps `node`, whose block has `size` bytes, and its attributes."""
        if cids.codec(node.cid) != cids.RAW:
            self._nodes.put(node.cid, node, size + 64)
        self._known.put(cids.canonical(node.cid), attributes_of(node))

    async def document(self, cid: Cid) -> Document:
        """The values of a dag-cbor or dag-json block. `cid` names the block or a value in it."""
        block_cid = cids.block_of(cid)
        found = self._documents.get(block_cid)
        if found is not None:
            if self.use is not None:
                self.use(block_cid, ahead=False)
            return found
        inline = cids.inline_block(block_cid)
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

    async def _size(self, cid: Cid) -> int:
        if self.use is not None:
            self.use(cid, ahead=False)
        return await self.cache.block_size(cid, early=True)

    async def attributes(self, cid: Cid) -> Attributes:
        """The attributes of `cid`, from memory if possible."""
        found = self.known(cid)
        return found if found is not None else attributes_of(await self.node(cid))

    def known(self, cid: Cid) -> Attributes | None:
        """The attributes of `cid`, if they are in memory or `cid` is inline."""
        found = self._known.get(cids.canonical(cid))
        return found if found is not None else _carried(cid)

    async def nodes(self, wanted: Sequence[Cid]) -> list[Node]:
        """The nodes of `wanted`, fetched in parallel (the `fetch` of `traversal.drive`). If `wanted` is
        empty, only lets other tasks run."""
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
        """The link of `name` in the directory `parent`. Raises NotFound if the verified directory has no such
        name."""
        link = await traversal.drive(traversal.child(await self.directory(parent), name), self.nodes)
        if link is None:
            raise NotFound(f"{name!r} is not in {cids.text(parent)}")
        return link

    async def entries(self, parent: Cid, after: int) -> directory_pages.Page:
        """The next entries after place `after`, from the directory's own blocks. Fetches no child."""
        directory = await self.directory(parent)
        if self._subtrees is not None and not after:
            self._subtrees.nodes_of(directory)
        page = await traversal.drive(directory_pages.entries(directory, after), self.nodes)
        # a page may have some thousand entries: let other tasks run before they are handled
        await trio.lowlevel.checkpoint()
        if self._prefetcher is not None:  # a recording mount has none, because it must report every block
            self._prefetcher.listed(parent, after, [(entry.cid, entry.tsize) for entry in page.entries])
        return page

    def claimed_attributes(self, cid: Cid, tsize: int) -> Attributes | None:
        """The attributes that a listing shows of an entry whose link claims `tsize` (negative for no claim),
        without fetching a block: the known ones, else those of a raw block of the claimed size, else None."""
        known = self.known(cid)
        if known is None and tsize >= 0 and cids.codec(cid) == cids.RAW:
            # it is certainly a file, and has that size if the claim is true
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
        """The file if its node is in memory, else None."""
        found = self._at_hand(cid)
        if not isinstance(found, File):
            return None
        self.note_use(cid)
        return found

    def used(self, cid: Cid, size: int) -> None:
        """Notes that the C thread opened the file `cid`, of `size` bytes, whose content the kernel has."""
        self.opened(FileRef(cids.canonical(cid), size))
        self.note_use(cid)

    def opened(self, file: FileRef) -> None:
        """Tells the cache that `file` was opened. It has no file for a value within a block."""
        if not nodes.holds_values(file.cid):
            self.cache.opened(file)

    def following(self, cid: Cid) -> Sequence[Cid]:
        """The next small files and directories after `cid` in its directory, if it was listed lately."""
        return self._prefetcher.following(cid) if self._prefetcher is not None else ()

    def first(self, directory: Cid) -> Sequence[Cid]:
        """The first small files and directories in `directory`, if it was listed lately."""
        return self._prefetcher.first(directory) if self._prefetcher is not None else ()

    def note_use(self, cid: Cid) -> None:
        """Tells the prefetcher that `cid` was used. For a directory, the kernel may have the listing
        already."""
        if self._prefetcher is not None:
            self._prefetcher.used(cid)

    async def readlink(self, cid: Cid) -> bytes:
        """The target as stored. Raises NotALink."""
        node = await self.node(cid)
        if not isinstance(node, Symlink):
            raise NotALink(f"{cids.text(cid)} is not a symlink")
        return node.target


def _carried(cid: Cid) -> Attributes | None:
    """The attributes of the node in an identity CID."""
    try:
        block = cids.inline_block(cid)
        return attributes_of(nodes.parse(cid, block)) if block is not None else None
    except (Malformed, Unsupported):  # a lookup of it will raise
        return None


# -- the root ------------------------------------------------------------------------------------------------

# A name is a CID in any spelling that fits a file name. Other names are absent, and no source is asked for
# them.

Named = tuple[Cid, str]
"""A CID and its spelling."""
Listed = tuple[Cid, str | Cid]
"""A canonical CID and its name, or instead of the name a CID whose usual spelling is the name (`name_of`): a
text for each of 200,000 roots would take more memory and time than everything else."""


def name_of(listed: Listed) -> bytes:
    """The name in the root. It may be too long for a file system (NAME_MAX)."""
    spelled = listed[1]
    return (spelled if isinstance(spelled, str) else cids.text(spelled)).encode()


class Roots:
    """The names in the mount's root.

    `of_sources` returns the roots of all sources. It is called in a worker thread, because a library's roots
    are files. `named` returns the other names, and is called on the event loop. `opened` is called with each
    CID that was opened by name."""

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
        """The CID of a name. Raises NotFound for a name that is not a CID, NotAllowed for one that is not on
        the allow-list."""
        try:
            cid = cids.parse(name.decode("utf-8"))
        except (NotACid, UnicodeDecodeError) as exc:
            raise NotFound(f"{name[:80]!r} is not a CID") from exc
        if self._allow is not None and cids.canonical(cid) not in self._allow:
            raise NotAllowed(f"{cids.text(cid)} is not on this mount's allow-list")
        return cid

    def note(self, cid: Cid, name: bytes) -> None:
        """Notes that `name` was opened and exists."""
        self._opened(cid, name.decode("utf-8"))

    async def entries(self) -> Sequence[Listed]:
        """The entries of the root now: each CID once, in its first spelling."""
        return await threads.run_sync(self._entries, list(self._named()))

    def _entries(self, named: Sequence[Named]) -> Sequence[Listed]:
        seen: dict[Cid, str | Cid] = {}
        for root in self._of_sources():
            seen.setdefault(cids.canonical(root), root)
        for cid, spelling in named:
            seen.setdefault(cids.canonical(cid), spelling)
        return [item for item in seen.items() if self._allow is None or item[0] in self._allow]
