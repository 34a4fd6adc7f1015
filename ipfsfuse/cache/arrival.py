"""What came from a source or from the disk, on its way to who waits for it and into the store.

Concurrency: the event loop's; what takes long to parse is parsed in a worker thread.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import trio

from ipfsfuse.cache.base import Content, FileRef
from ipfsfuse.cache.folder.disk import SMALL
from ipfsfuse.dag import leaves as dagleaves
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import MAX_PARSED_ON_LOOP, Leaf
from ipfsfuse.sources.base import Block, Source

T = TypeVar("T")


class Arrival(NamedTuple):
    """A leaf's content, or a block, as all who wait for it get it; `source` None where it was staged."""

    content: Content
    source: Source | None
    stage: bool
    """Whether the content belongs into staging files: not read in place, and proved by itself."""
    block: Block = b""
    """What came, as it came; of a leaf alone."""
    home: tuple[Cid, int] | None = None
    """The file and the offset in it that it is being staged for."""


async def _parsed(parse: Callable[[], T], cid: Cid, block: Block) -> T:
    """What `parse` makes of `block`. A large one that no importer made a leaf of may have 40,000 links."""
    if len(block) <= MAX_PARSED_ON_LOOP or dagleaves.is_canonical(cid, block):
        return parse()
    return await trio.to_thread.run_sync(parse)


async def content_of(leaf: Leaf, block: Block) -> Content:
    """As `dagleaves.of`."""
    return await _parsed(lambda: dagleaves.of(leaf, bytes(block)), leaf.cid, block)


async def of_leaf(file: FileRef, leaf: Leaf, block: Block, source: Source) -> Arrival:
    """What `block` holds of `file`."""
    content = await _parsed(lambda: dagleaves.content(leaf.cid, block), leaf.cid, block)
    if source.in_place:
        return Arrival(content, source, False)
    stage = file.size > SMALL and dagleaves.is_canonical(leaf.cid, block)
    return Arrival(content, source, stage, block, (file.cid, leaf.offset))


def adjoin(came: Sequence[tuple[Leaf, Arrival]]) -> bool:
    """Whether all are to be staged, with nothing between them."""
    ends = [leaf.offset + leaf.size for leaf, _of in came]
    whole = all(arrival.stage and len(arrival.content) == leaf.size for leaf, arrival in came)
    return whole and all(leaf.offset == end for (leaf, _arrival), end in zip(came[1:], ends, strict=False))
