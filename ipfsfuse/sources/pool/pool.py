"""Several sources as one, none of them trusted: order, health, failover, and the check of every block.

Concurrency: one event loop, any number of tasks. Cancelling a call cancels its requests. Sharing one fetch among
several readers is the cache's work, above.
"""

import logging
import random
from collections.abc import Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.base import DeliverFetched, Fetched, Run, Source, Subtree, Taker
from ipfsfuse.sources.pool.block_fetch import HedgedFetch
from ipfsfuse.sources.pool.health import HedgeBudget, Statistics
from ipfsfuse.sources.pool.inline import INLINE
from ipfsfuse.sources.pool.managed_source import ManagedSource
from ipfsfuse.sources.pool.range_fetch import RangeFetch
from ipfsfuse.sources.pool.subtree_fetch import SubtreeFetch
from ipfsfuse.sources.runs import all_of

log = logging.getLogger(__name__)

REMEMBERED_WRONG = 1000
SINGLY = 4
"""Blocks that a run left out are asked for so many at a time."""


class SourcePool:
    """Implements `base.Blocks`. Sources in place are asked first, the others in the order given.

    `offline`: what a network source does not have now (it was told not to look further) it will not have later."""

    def __init__(self, sources: Sequence[Source], *, offline: bool = False, chance: random.Random | None = None) -> None:
        self.offline = offline
        self.chance = chance or random.Random()
        self.hedges = HedgeBudget()
        network = sum(not source.in_place for source in sources)
        managed = [ManagedSource(source, self.chance, max(network, 1)) for source in sources]
        self._in_place = [managed for managed in managed if managed.source.in_place]
        self._network = [managed for managed in managed if not managed.source.in_place]
        self._managed = managed
        self._known_wrong: set[tuple[str, Cid]] = set()

    def roots(self) -> Sequence[Cid]:
        return [root for managed in self._managed for root in managed.source.roots()]

    def statistics(self) -> Sequence[Statistics]:
        """One for each source, in the order given."""
        return [managed.statistics() for managed in self._managed]

    async def aclose(self) -> None:
        for managed in self._managed:
            await managed.source.aclose()

    async def get(self, cid: Cid) -> Fetched:
        hashes.check_allowed(cids.multihash(cid))
        inline = cids.known(cid)
        if inline is not None:
            return Fetched(inline, INLINE)
        return await HedgedFetch(self, cid).run()

    async def stream(self, run: Run, deliver: DeliverFetched) -> None:
        streaming = RangeFetch(self, run, deliver)
        await streaming.from_each()
        left = iter(streaming.missing)

        async def singly() -> None:
            for index in left:
                fetched = await self.get(run.leaves[index].cid)
                await deliver(index, [fetched.block], fetched.source)

        await all_of([singly] * min(SINGLY, len(streaming.missing)))

    async def subtree(self, subtree: Subtree, taker: Taker) -> None:
        await SubtreeFetch(self, subtree, taker).run()

    # -- for those who ask on its behalf ------------------------------------------------------------------------

    def in_place(self) -> Sequence[ManagedSource]:
        return self._in_place

    def network(self) -> Sequence[ManagedSource]:
        now = trio.current_time()
        usable = [managed for managed in self._network if not managed.health.is_quarantined(now)] or self._network
        return usable if len(usable) < 2 else sorted(usable, key=lambda managed: managed.health.wait(now) > 0)

    def wrong(self, managed: ManagedSource, cid: Cid) -> None:
        """`managed` sent bytes that are not the block of `cid`: says so once, and sets a remote gateway aside."""
        now = trio.current_time()
        others = any(other is not managed and not other.health.is_quarantined(now) for other in self._network) or bool(self._in_place)
        aside = managed.health.wrong(now, others=others)
        name = managed.source.name
        if aside == 0:
            return
        if aside is not None:
            log.warning("%s sent wrong bytes for %s and is not asked for %.0f minutes", name, cids.text(cid), aside / 60)
        elif (name, cid) not in self._known_wrong and len(self._known_wrong) < REMEMBERED_WRONG:
            self._known_wrong.add((name, cid))
            log.warning("%s has wrong bytes for %s: %s", name, cids.text(cid), managed.repair)
