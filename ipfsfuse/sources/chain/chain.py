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
from ipfsfuse.sources.chain.gathering import Gathering
from ipfsfuse.sources.chain.health import HedgeBudget, Statistics
from ipfsfuse.sources.chain.inline import INLINE
from ipfsfuse.sources.chain.member import Member
from ipfsfuse.sources.chain.pursuit import Pursuit
from ipfsfuse.sources.chain.streaming import Streaming
from ipfsfuse.sources.runs import all_of

log = logging.getLogger(__name__)

REMEMBERED_WRONG = 1000
SINGLY = 4
"""Blocks that a run left out are asked for so many at a time."""


class Chain:
    """Implements `base.Blocks`. Sources in place are asked first, the others in the order given.

    `offline`: what a network source does not have now (it was told not to look further) it will not have later."""

    def __init__(self, sources: Sequence[Source], *, offline: bool = False, chance: random.Random | None = None) -> None:
        self.offline = offline
        self.chance = chance or random.Random()
        self.hedges = HedgeBudget()
        network = sum(not source.in_place for source in sources)
        members = [Member(source, self.chance, max(network, 1)) for source in sources]
        self._in_place = [member for member in members if member.source.in_place]
        self._network = [member for member in members if not member.source.in_place]
        self._members = members
        self._known_wrong: set[tuple[str, Cid]] = set()
        self._under_way: dict[bytes, Pursuit] = {}
        """By multihash."""

    def roots(self) -> Sequence[Cid]:
        return [root for member in self._members for root in member.source.roots()]

    def statistics(self) -> Sequence[Statistics]:
        """One for each source, in the order given."""
        return [member.statistics() for member in self._members]

    async def aclose(self) -> None:
        for member in self._members:
            await member.source.aclose()

    async def get(self, cid: Cid) -> Fetched:
        hashes.check_allowed(cids.multihash(cid))
        inline = cids.known(cid)
        if inline is not None:
            return Fetched(inline, INLINE)
        pursuit = self._under_way[cids.multihash(cid)] = Pursuit(self, cid)
        try:
            return await pursuit.run()
        finally:
            if self._under_way.get(cids.multihash(cid)) is pursuit:
                del self._under_way[cids.multihash(cid)]

    def said(self, cid: Cid) -> str:
        pursuit = self._under_way.get(cids.multihash(cid))
        return "" if pursuit is None else "; ".join(pursuit.said.values())

    async def stream(self, run: Run, deliver: DeliverFetched) -> None:
        streaming = Streaming(self, run, deliver)
        await streaming.from_each()
        left = iter(streaming.missing)

        async def singly() -> None:
            for index in left:
                fetched = await self.get(run.leaves[index].cid)
                await deliver(index, [fetched.block], fetched.source)

        await all_of([singly] * min(SINGLY, len(streaming.missing)))

    async def subtree(self, subtree: Subtree, taker: Taker) -> None:
        await Gathering(self, subtree, taker).run()

    # -- for those who ask on its behalf ------------------------------------------------------------------------

    def in_place(self) -> Sequence[Member]:
        return self._in_place

    def network(self) -> Sequence[Member]:
        now = trio.current_time()
        usable = [member for member in self._network if not member.health.is_aside(now)] or self._network
        return usable if len(usable) < 2 else sorted(usable, key=lambda member: member.health.wait(now) > 0)

    def wrong(self, member: Member, cid: Cid) -> None:
        """`member` sent bytes that are not the block of `cid`: says so once, and sets a remote gateway aside."""
        now = trio.current_time()
        others = any(other is not member and not other.health.is_aside(now) for other in self._network) or bool(self._in_place)
        aside = member.health.wrong(now, others=others)
        name = member.source.name
        if aside == 0:
            return
        if aside is not None:
            log.warning("%s sent wrong bytes for %s and is not asked for %.0f minutes", name, cids.text(cid), aside / 60)
        elif (name, cid) not in self._known_wrong and len(self._known_wrong) < REMEMBERED_WRONG:
            self._known_wrong.add((name, cid))
            log.warning("%s has wrong bytes for %s: %s", name, cids.text(cid), member.repair)
