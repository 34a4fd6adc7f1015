"""What came from a source or from the disk, on its way to who waits for it and into the store. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from ipfsfuse.cache.base import Content, FileRef
from ipfsfuse.cache.store.disk import SMALL
from ipfsfuse.dag import leaves as dagleaves
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.sources.base import Block, Source


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


def of_leaf(file: FileRef, leaf: Leaf, block: Block, source: Source) -> Arrival:
    """What `block` holds of `file`."""
    content = dagleaves.content(leaf.cid, block)
    if source.in_place:
        return Arrival(content, source, False)
    stage = file.size > SMALL and dagleaves.is_canonical(leaf.cid, block)
    return Arrival(content, source, stage, block, (file.cid, leaf.offset))


def adjoin(came: Sequence[tuple[Leaf, Arrival]]) -> bool:
    """Whether all are to be staged, with nothing between them."""
    ends = [leaf.offset + leaf.size for leaf, _of in came]
    whole = all(arrival.stage and len(arrival.content) == leaf.size for leaf, arrival in came)
    return whole and all(leaf.offset == end for (leaf, _arrival), end in zip(came[1:], ends, strict=False))
