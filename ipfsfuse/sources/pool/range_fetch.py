"""A run of leaves, taken from one source after the other, each in its fastest way; what all leave out stays
`missing`.

Concurrency: one task and what the sources start; blocks are verified and delivered as they come.
"""

from collections.abc import Iterator, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.base import Block, DeliverFetched, LeafRange
from ipfsfuse.sources.pool.block_fetch import Pool
from ipfsfuse.sources.pool.inline import INLINE
from ipfsfuse.sources.pool.managed_source import Deliveries, ManagedSource
from ipfsfuse.sources.pool.verification import check_each

PATIENCE_ALONE = 15.0
"""Seconds without a block after which a run is broken off where no other source could give it sooner; at most
half of the deadline."""


class RangeFetch:
    def __init__(self, pool: Pool, run: LeafRange, deliver: DeliverFetched) -> None:
        self._pool = pool
        self._run = run
        self._deliver = deliver
        self._left = set(range(len(run.leaves)))

    @property
    def missing(self) -> Sequence[int]:
        return sorted(self._left)

    async def from_each(self) -> None:
        for place, leaf in enumerate(self._run.leaves):
            block = cids.known(leaf.cid)
            if block is not None:
                self._left.discard(place)
                await self._deliver(place, [block], INLINE)
        for managed in [*self._pool.in_place(), *self._pool.network()]:
            if not self._left:
                return
            if managed.takes_many and self._pool.wait(managed) == 0:
                await self._from(managed)

    async def _from(self, managed: ManagedSource) -> None:
        with managed.asked_for_many() as deliveries:
            if managed.source.in_place:
                await _RangeAttempt(self, managed, deliveries).run(float("inf"))
                return
            alone = len(self._pool.network()) == 1
            patience = min(PATIENCE_ALONE, self._pool.deadline / 2) if alone else self._pool.patience
            async with managed.limiter.enter() as deliveries.place:
                await _RangeAttempt(self, managed, deliveries).run(patience)

    # -- for the attempt -------------------------------------------------------------------------------------

    def part(self) -> tuple[Sequence[int], LeafRange]:
        """What is still missing, as a run of its own, and which leaves of the whole its leaves are."""
        places = self.missing
        return places, LeafRange(
            self._run.file, self._run.file_size, [self._run.leaves[place] for place in places]
        )

    async def take(self, managed: ManagedSource, places: Sequence[int], blocks: Sequence[Block]) -> bool:
        """Verifies and delivers the blocks of leaves. False if one was wrong."""
        wanted = [self._run.leaves[place].cid for place in places]
        right = await check_each(wanted, blocks)
        for cid, is_right in zip(wanted, right, strict=True):
            if not is_right:
                self._pool.wrong(managed, cid)
        good = [at for at, place in enumerate(places) if right[at] and place in self._left]
        for at in good:
            self._left.discard(places[at])
            managed.health.record_success(-1, len(blocks[at]))
        for first, end in _rows([places[at] for at in good]):
            await self._deliver(places[good[first]], [blocks[at] for at in good[first:end]], managed.source)
        return all(right)


def _rows(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches of `places` that follow each other without a gap: from where to before where."""
    first = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[at - 1] + 1:
            yield first, at
            first = at


class _RangeAttempt:
    """One source's share. Broken off when no block came for too long, and when a remote source sent a wrong
    one."""

    def __init__(self, fetch: RangeFetch, managed: ManagedSource, deliveries: Deliveries) -> None:
        self._fetch = fetch
        self._managed = managed
        self._deliveries = deliveries
        self._scope = trio.CancelScope()
        self._busy = 0

    async def run(self, patience: float) -> None:
        """Raises NotHere, SourceFailed."""
        places, part = self._fetch.part()

        async def take(index: int, blocks: Sequence[Block]) -> None:
            self._busy += 1
            self._scope.deadline = float("inf")  # the time that the reader takes is not the source's
            try:
                with self._deliveries.to_reader():
                    right = await self._fetch.take(self._managed, places[index : index + len(blocks)], blocks)
                if not right and self._managed.remote:
                    self._scope.cancel()
            finally:
                self._busy -= 1
                if not self._busy:
                    self._scope.deadline = trio.current_time() + patience

        with self._scope:
            self._scope.deadline = trio.current_time() + patience
            await self._deliveries.run(lambda: self._managed.source.stream(part, take))
        if self._scope.cancelled_caught and trio.current_time() >= self._scope.deadline:
            raise SourceFailed(f"{self._managed.source.name} sent no block for {patience:g} s", "timeout")
