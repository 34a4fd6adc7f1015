"""Several sources as one, none of them trusted: order, health, failover, and the check of every block.

Concurrency: one event loop, any number of tasks. Cancelling a call cancels its requests. Sharing one fetch
among several readers is the cache's work, above.

Deadlines and pauses are by trio's clock, CLOCK_MONOTONIC, which stands still while the machine sleeps: a call
that waits then goes on waiting for as long as it still had. For a source that was set aside the time has
passed, though: pauses are shortened by what CLOCK_BOOTTIME says that the machine slept.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import BlockTooLarge, Malformed
from ipfsfuse.sources.base import DeliverFetched, Fetched, Run, Source, Subtree, Taker, fits
from ipfsfuse.sources.pool.block_fetch import HedgedFetch
from ipfsfuse.sources.pool.health import HedgeBudget, Statistics
from ipfsfuse.sources.pool.inline import INLINE
from ipfsfuse.sources.pool.managed_source import ManagedSource
from ipfsfuse.sources.pool.range_fetch import RangeFetch
from ipfsfuse.sources.pool.subtree_fetch import SubtreeFetch
from ipfsfuse.sources.runs import all_of

log = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds: see `SourcePool.patience`."""
ALONE = 1 / 3
"""Part of the deadline for which a source that failed is left alone where no other may be asked: so each call
asks it."""
REMEMBERED_WRONG = 1000
"""Blocks that are wrong, and blocks that are too large. Beyond so many the log says nothing more."""
SINGLY = 4
"""Blocks that a run left out are asked for so many at a time."""
NAP = 1.0
"""Seconds that the machine must have slept to be noticed."""


def seconds_asleep() -> float:
    """How long this machine has slept since it started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class SourcePool:
    """Implements `base.Blocks`. Sources in place are asked first, the others in the order given.

    `offline`: what a network source does not have now (it was told not to look further) it will not have
    later. `deadline`: seconds in which callers want an answer; how long one source may keep others from being
    asked follows."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        offline: bool = False,
        deadline: float = 30.0,
        chance: random.Random | None = None,
        asleep: Callable[[], float] = seconds_asleep,
    ) -> None:
        self.offline = offline
        self.deadline = deadline
        self.chance = chance or random.Random()
        self.hedges = HedgeBudget()
        network = sum(not source.in_place for source in sources)
        self._managed = [ManagedSource(source, self.chance, max(network, 1)) for source in sources]
        self._in_place = [managed for managed in self._managed if managed.source.in_place]
        self._network = [managed for managed in self._managed if not managed.source.in_place]
        self._known_wrong: set[tuple[str, Cid]] = set()
        self._known_large: set[Cid] = set()
        self._under_way: dict[bytes, HedgedFetch] = {}
        """Fetches by multihash."""
        self._asleep = asleep
        self._slept = asleep()

    def roots(self) -> Sequence[Cid]:
        return [root for managed in self._managed for root in managed.roots()]

    def statistics(self) -> Sequence[Statistics]:
        """One for each source, in the order given."""
        return [managed.statistics() for managed in self._managed]

    async def aclose(self) -> None:
        for managed in self._managed:
            await managed.aclose()

    async def get(self, cid: Cid) -> Fetched:
        multihashes.check_allowed(cids.multihash(cid))
        inline = cids.known(cid)
        if inline is not None:
            return Fetched(inline, INLINE)
        key = cids.multihash(cid)
        fetch = self._under_way[key] = HedgedFetch(self, cid)
        try:
            return await fetch.run()
        finally:
            if self._under_way.get(key) is fetch:
                del self._under_way[key]

    def said(self, cid: Cid) -> str:
        fetch = self._under_way.get(cids.multihash(cid))
        return "" if fetch is None else "; ".join(fetch.said.values())

    async def stream(self, run: Run, deliver: DeliverFetched) -> None:
        fetch = RangeFetch(self, run, deliver)
        await fetch.from_each()
        left = iter(fetch.missing)

        async def singly() -> None:
            for index in left:
                leaf = run.leaves[index]
                fetched = await self.get(leaf.cid)
                if not fits(leaf, len(fetched.block)):
                    raise Malformed(
                        f"{cids.text(leaf.cid)}: a block of {len(fetched.block)} bytes, but its "
                        f"file states {leaf.size}"
                    )
                await deliver(index, [fetched.block], fetched.source)

        await all_of([singly] * min(SINGLY, len(fetch.missing)))

    async def subtree(self, subtree: Subtree, taker: Taker) -> None:
        await SubtreeFetch(self, subtree, taker).run()

    # -- for those who ask on its behalf ---------------------------------------------------------------------

    @property
    def patience(self) -> float:
        """Seconds without an answer after which the next source is asked, so that each has its turn in the
        deadline, and the last one time to answer."""
        return min(PATIENCE, self.deadline / (len(self._network) + 1))

    def in_place(self) -> Sequence[ManagedSource]:
        return self._in_place

    def network(self) -> Sequence[ManagedSource]:
        self._note_sleep()
        now = trio.current_time()
        usable = [
            managed for managed in self._network if not managed.health.is_quarantined(now)
        ] or self._network
        return usable if len(usable) < 2 else sorted(usable, key=lambda managed: managed.health.wait(now) > 0)

    def wait(self, managed: ManagedSource) -> float:
        now = trio.current_time()
        wait = managed.health.wait(now)
        if wait > 0:
            self._note_sleep()
            others = (
                other
                for other in self._network
                if other is not managed and not other.health.is_quarantined(now)
            )
            alone = all(other.health.wait(now) > 0 for other in others)
            wait = managed.health.wait(now, self.deadline * ALONE if alone else math.inf)
        return wait

    def _note_sleep(self) -> None:
        asleep = self._asleep()
        if asleep - self._slept >= NAP:
            log.info(
                "this machine slept for %.0f s: sources that were set aside before may be asked sooner",
                asleep - self._slept,
            )
            for managed in self._network:
                managed.health.slept(asleep - self._slept)
            self._slept = asleep

    def wrong(self, managed: ManagedSource, cid: Cid) -> None:
        """Says once that `managed` sent wrong bytes, and quarantines a remote gateway."""
        now = trio.current_time()
        others = any(other is not managed and not other.health.is_quarantined(now) for other in self._network)
        seconds = managed.health.record_wrong(now, others=others or bool(self._in_place))
        name = managed.source.name
        if seconds == 0:
            return
        if seconds is not None:
            log.warning(
                "%s sent wrong bytes for %s and is not asked for %.0f minutes",
                name,
                cids.text(cid),
                seconds / 60,
            )
        elif (name, cid) not in self._known_wrong and len(self._known_wrong) < REMEMBERED_WRONG:
            self._known_wrong.add((name, cid))
            log.warning("%s has wrong bytes for %s: %s", name, cids.text(cid), managed.repair)

    def too_large(self, cid: Cid, refusal: BlockTooLarge) -> None:
        """A source has `cid` as a block that is too large. Says so once."""
        if cid not in self._known_large and len(self._known_large) < REMEMBERED_WRONG:
            self._known_large.add(cid)
            log.warning("%s", refusal)
