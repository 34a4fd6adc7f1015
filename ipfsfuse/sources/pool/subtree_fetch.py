"""A directory's blocks from one source, in one answer. Only a help: what does not come so is asked for alone.

Concurrency: one task and what the source starts; blocks are verified and delivered as they come.
"""

from collections.abc import Mapping, Sequence

import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, Unsupported, WrongBlock
from ipfsfuse.sources.base import Fetched, Subtree, Taker
from ipfsfuse.sources.pool.block_fetch import Pool
from ipfsfuse.sources.pool.managed_source import ManagedSource
from ipfsfuse.sources.pool.verification import check
from ipfsfuse.sources.runs import all_of

STALL = 0.25
"""Seconds without a block after which the answer is given up: one block that the source lacks must not delay the others.
A gateway far away gets as long as its slow answers take, if that is more."""
FIRST = 4
"""For its first block, a source gets so many times as long as its slow answers take, if that is more."""


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
            now = trio.current_time()
            for managed in [managed for managed in self._pool.network() if managed.health.wait(now) == 0][:1]:
                await self._from(managed)

    async def _is_at_hand(self) -> bool:
        """Whether a source in place has it: then each block is read where it lies."""
        for managed in self._pool.in_place():
            try:
                await managed.source.get(self._subtree.root)
            except IpfsFuseError:
                continue
            return True
        return False

    async def _from(self, managed: ManagedSource) -> None:
        with managed.asked_for_many():
            async with managed.limiter.enter():
                slow = managed.health.slow_after()
                self._stall = max(STALL, slow) if managed.remote else STALL
                self._until = trio.current_time() + max(STALL, FIRST * slow)
                with self._scope:
                    await all_of([lambda: self._ask(managed), self._watch])

    async def _ask(self, managed: ManagedSource) -> None:
        async def take(blocks: Sequence[tuple[Cid, bytes]]) -> None:
            self._taking = True
            right, lied = await self._verified(managed, blocks)
            if right:
                await self._taker.take(right)
            if lied:
                await self._give_up()
            self._taking = False
            self._until = trio.current_time() + self._stall

        await managed.source.subtree(self._subtree, take)
        self._scope.cancel()

    async def _watch(self) -> None:
        """Ends what has stopped; the time that the reader takes is not the source's. A deadline that moves with each block
        would cost as much as a small block's hash."""
        while self._taking or trio.current_time() < self._until:  # noqa: ASYNC110  # an event for each block costs more
            await trio.sleep(STALL / 4)
        await self._give_up()

    async def _give_up(self) -> None:
        self._scope.cancel()
        await trio.lowlevel.checkpoint()  # now, not where the source next waits for something

    async def _verified(self, managed: ManagedSource, blocks: Sequence[tuple[Cid, bytes]]) -> tuple[Mapping[Cid, Fetched], bool]:
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
