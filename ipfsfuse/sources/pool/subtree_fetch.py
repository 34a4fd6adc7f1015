"""A directory's blocks from one source, in one answer. Only a help: what does not come so is asked for alone.

Concurrency: one task and what the source starts; blocks are verified and delivered as they come.
"""

from collections.abc import Mapping, Sequence

import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed, Unsupported, WrongBlock
from ipfsfuse.sources.base import Fetched, Subtree, Taker
from ipfsfuse.sources.leaf_ranges import all_of
from ipfsfuse.sources.pool.block_fetch import Pool
from ipfsfuse.sources.pool.managed_source import Deliveries, ManagedSource
from ipfsfuse.sources.pool.verification import check

STALL = 0.25
"""Seconds without a block after which the answer is given up: one block that the source lacks must not delay
the others. A gateway far away gets as long as its slow answers take, if that is more, but no longer than the
pool's patience."""
FIRST = 4
"""For its first block, a source gets so many times as long as its slow answers take, if that is more."""
FIRST_PART = 1 / 3
"""Part of the deadline that the first block may take at most: it can still be had elsewhere then."""


class SubtreeFetch:
    def __init__(self, pool: Pool, subtree: Subtree, taker: Taker) -> None:
        self._pool = pool
        self._subtree = subtree
        self._taker = taker
        self._scope = trio.CancelScope()
        self._stall = STALL
        self._until = 0.0
        """When the answer is given up, unless a block comes before."""
        self._taking = False

    async def run(self) -> None:
        if not await self._is_at_hand():
            for managed in self._pool.network():
                if managed.takes_many and self._pool.wait(managed) == 0:
                    await self._from(managed)
                    return

    async def _is_at_hand(self) -> bool:
        """Whether a source in place has it: then each block is read where it lies."""
        for managed in self._pool.in_place():
            try:
                with managed.as_its_failure():
                    await managed.source.get(self._subtree.root)
            except (NotHere, SourceFailed, WrongBlock):
                continue
            return True
        return False

    async def _from(self, managed: ManagedSource) -> None:
        with managed.asked_for_many() as deliveries:
            async with managed.limiter.enter() as deliveries.place:
                slow = managed.health.slow_after()
                self._stall = max(STALL, min(slow, self._pool.patience)) if managed.remote else STALL
                first = min(max(STALL, FIRST * slow), self._pool.deadline * FIRST_PART)
                self._until = trio.current_time() + first
                with self._scope:
                    await all_of([lambda: self._ask(managed, deliveries), self._watch])

    async def _ask(self, managed: ManagedSource, deliveries: Deliveries) -> None:
        async def take(blocks: Sequence[tuple[Cid, bytes]]) -> None:
            self._taking = True
            with deliveries.to_reader():
                right, lied = await self._verified(managed, blocks)
                if right:
                    await self._taker.take(right)
            if lied:
                await self._give_up()
            self._taking = False
            self._until = trio.current_time() + self._stall

        await deliveries.run(lambda: managed.source.subtree(self._subtree, take))
        self._scope.cancel()

    async def _watch(self) -> None:
        """Ends what has stopped; the time that the reader takes is not the source's. A deadline that moves
        with each block would cost as much as a small block's hash."""
        while self._taking or trio.current_time() < self._until:  # noqa: ASYNC110  # an event for each block costs more
            await trio.sleep(STALL / 4)
        await self._give_up()

    async def _give_up(self) -> None:
        self._scope.cancel()
        await trio.lowlevel.checkpoint()  # now, not where the source next waits for something

    async def _verified(
        self, managed: ManagedSource, blocks: Sequence[tuple[Cid, bytes]]
    ) -> tuple[Mapping[Cid, Fetched], bool]:
        """What is wanted of `blocks`, up to the first that is wrong, and whether there is one."""
        right: dict[Cid, Fetched] = {}
        for cid, block in blocks:
            if cid in right or not self._taker.wants(cid):
                continue
            try:
                await check(cid, block)
            except WrongBlock:
                self._pool.wrong(managed, cid)
                return right, True
            except Unsupported:  # who reads it will hear
                continue
            managed.health.record_success(-1, len(block))
            right[cid] = Fetched(block, managed.source)
            self._taker.came(cid, block)
        return right, False
