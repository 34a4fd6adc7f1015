"""Whole blocks, for receipts, for `ipfsfuse export` and for `ipfsfuse serve`: those too of which only the
content is kept.

A staging file holds a file's content, and no list of its leaves. But whoever asks for a leaf has asked for
its parents before: what those say of their children tells where the leaf lies. Concurrency: any number of
tasks.
"""

from ipfsfuse.cache.base import Content, FileRef
from ipfsfuse.cache.reader import Reader
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Leaf, Node
from ipfsfuse.errors import IpfsFuseError, Malformed, NotHere, Unsupported
from ipfsfuse.fileio import threads
from ipfsfuse.sources.pool.pool import SourcePool

REMEMBERED = 100_000
"""Children of file nodes whose place is remembered, some 30 MB: 100 GB of a file in leaves of 1 MiB."""


class WholeBlocks:
    def __init__(self, cache: Reader, pool: SourcePool) -> None:
        self._cache, self._pool = cache, pool
        self._places: dict[Cid, tuple[FileRef, Leaf]] = {}

    async def get(self, cid: Cid, *, fetch: bool = True) -> bytes:
        """The verified block of `cid`. Without `fetch` it must be staged, or in a source in place: raises
        NotHere. With it raises what `Cache.block` raises."""
        known = self._places.get(cids.canonical(cid))
        block = None if known is None else await self._staged(*known, fetch)
        if block is None:
            block = await (self._cache.block(cid) if fetch else self._here(cid))
        if cids.codec(cid) == cids.DAG_PB:
            node = await threads.run_sync(_parsed, cid, block)
            if isinstance(node, File):
                self._note(node)
        return block

    async def _here(self, cid: Cid) -> bytes:
        """Raises NotHere."""
        block = await self._cache.staged_block(cid)
        if block is None:
            block = await self._pool.get_in_place(cid)
        if block is None:
            raise NotHere(f"{cids.brief(cid)} is not here")
        return block

    async def _staged(self, file: FileRef, leaf: Leaf, fetch: bool) -> bytes | None:
        """The block of a leaf, by its content; None where it is not a leaf, or one of a form that can't be
        made again."""
        content: Content | None
        try:
            content = await (self._cache.leaf(file, leaf) if fetch else self._cache.store.leaf(file, leaf))
        except IpfsFuseError:
            return None
        if content is None:
            return None
        return await threads.run_sync(file_layout.leaf_block, leaf.cid, content)

    def _note(self, node: File) -> None:
        """Remembers where its children lie."""
        own = cids.canonical(node.cid)
        file, at = self._places.get(own, (FileRef(own, node.size), Leaf(own, 0, node.size)))
        if at.size != node.size:  # one of the two claims is false: its children may lie beyond the file's end
            file, at = FileRef(own, node.size), Leaf(own, 0, node.size)
        for child in node.children:
            self._places.setdefault(
                cids.canonical(child.cid), (file, Leaf(child.cid, at.offset + child.offset, child.size))
            )
        while len(self._places) > REMEMBERED:
            del self._places[next(iter(self._places))]


def _parsed(cid: Cid, block: bytes) -> Node | None:
    """What `block` is; None where it is not UnixFS, which then has no leaves."""
    try:
        return nodes.parse(cid, block)
    except (Malformed, Unsupported):
        return None
