"""Blocks that a node has lost are given back to it, where what it is to hold hangs together by them.

A mount asks a node for what it does not have itself. So after an eviction and a collection at the node it may fetch
leaves alone, for it has the blocks above them yet: held by a root that the node has not, those would be collected. Each
large file is looked after once, when it is linked anew. Concurrency: one task at a time; `KuboPins` sees to that.
"""

from collections.abc import Callable
from functools import partial

from ipfsfuse.cache.pins import Copies
from ipfsfuse.cache.pins.batches import Batches, Round
from ipfsfuse.cache.pins.holding import thrice
from ipfsfuse.cache.pins.nodefiles import NodeFiles
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError

_SHA2_256 = b"\x12\x20"


class Returning:
    def __init__(self, node: NodeFiles) -> None:
        self._node = node
        self._copies: Copies | None = None
        self._name = ""
        self._unsure: dict[Cid, None] = {}

    def know(self, copies: Copies | None, name: str) -> None:
        """What can be given back, to a node of that name."""
        self._copies, self._name = copies, name

    def note(self, shelf: Batches, step: Round, *, all_of_it: bool) -> None:
        """`step` is about to be done: what it links that no batch held may have been collected since it was fetched.

        Large files alone are looked after, or `all_of_it`."""
        if self._copies is None:
            return
        moved = {cid for number in step.drops for cid in shelf.batches[number]}
        new = [cid for batch in step.writes for cid in batch.members if cid not in moved]
        self._unsure.update((cid, None) for cid in new if all_of_it or self._copies.joins(cid))

    async def give_back(self, wanted: Callable[[Cid], object]) -> None:
        """Looks after what was noted and is `wanted` still. Raises SourceFailed after three tries; what is left stays noted."""
        while self._unsure and self._copies is not None:
            cid = next(iter(self._unsure))
            if wanted(cid):
                await self._give(cid, self._copies)
            del self._unsure[cid]

    async def _give(self, root: Cid, copies: Copies) -> None:
        missing = [root]
        while missing:
            cid = missing.pop()
            if not cids.multihash(cid).startswith(_SHA2_256) or await thrice(partial(self._node.has, cid)):
                continue
            try:
                found = await copies.copy(cid, self._name)
            except IpfsFuseError:  # nobody has it now
                continue
            if found is not None:
                await thrice(partial(self._node.put, cid, found.block))
                missing += found.children
