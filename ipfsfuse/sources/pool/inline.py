"""Blocks that are written in their own CIDs.

Concurrency: any.
"""

from collections.abc import Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere
from ipfsfuse.sources.base import Deliver, DeliverBlocks, LeafRange, Subtree


class Inline:
    """The source of blocks that are written in their own CIDs. Never asked: the pool answers for it."""

    name = "inline"
    in_place = True

    async def get(self, cid: Cid) -> bytes:
        block = cids.inline(cid)
        if block is None:
            raise NotHere(f"{cids.text(cid)} holds no block of its own")
        return block

    async def stream(self, run: LeafRange, deliver: Deliver) -> None:
        for index, leaf in enumerate(run.leaves):
            block = cids.inline(leaf.cid)
            if block is not None:
                await deliver(index, [block])

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        pass

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        pass


INLINE = Inline()
