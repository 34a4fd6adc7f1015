"""One block, looked for until it is had: which source is asked when, and when a second one is.

Concurrency: a pursuit is one task, with children where several network sources may be asked at once; cancelling it
cancels their requests.
"""

import logging
import random
from collections.abc import Sequence
from typing import Protocol

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed, Unavailable, WrongBlock
from ipfsfuse.sources.base import Fetched
from ipfsfuse.sources.chain.health import HedgeBudget
from ipfsfuse.sources.chain.member import Member

log = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds without an answer after which the next source is asked, whatever the budget for hedging says."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0


class Surroundings(Protocol):
    """What a pursuit needs of its chain."""

    offline: bool
    hedges: HedgeBudget
    chance: random.Random

    def in_place(self) -> Sequence[Member]: ...

    def network(self) -> Sequence[Member]:
        """Those to ask, in order: the ready ones first, none that is set aside."""
        ...

    def wrong(self, member: Member, cid: Cid) -> None: ...


class Pursuit:
    def __init__(self, chain: Surroundings, cid: Cid) -> None:
        self._chain = chain
        self._cid = cid
        self._wrong: WrongBlock | None = None
        self._found: Fetched | None = None
        self.said: dict[str, str] = {}
        """What each source asked so far has said last, by its name."""

    async def run(self) -> Fetched:
        """The block. Raises WrongBlock or Unavailable once no source may give it any more."""
        for member in self._chain.in_place():
            block = await self._once(member)
            if isinstance(block, bytes):
                return Fetched(block, member.source)
        network = self._chain.network()
        self._chain.hedges.request()
        if len(network) == 1:
            await self._chase(network[0], trio.Event(), hedge=False)
        elif network:
            await self._race(network)
        if self._found is not None:
            return self._found
        offline = " (offline)" if self._chain.offline else ""
        said = "".join(f"; {each}" for each in self.said.values())
        raise self._wrong or Unavailable(f"no source has {cids.text(self._cid)}{offline}{said}")

    async def _race(self, network: Sequence[Member]) -> None:
        """Each source from when the one before it has failed or is late; the first that gives the block ends it."""
        async with trio.open_nursery() as nursery:

            async def chase(member: Member, failed: trio.Event, hedge: bool) -> None:
                await self._chase(member, failed, hedge=hedge)
                failed.set()
                if self._found is not None:
                    nursery.cancel_scope.cancel()

            hedge = False
            for member in network:
                failed = trio.Event()
                nursery.start_soon(chase, member, failed, hedge)
                hedge = await self._wait_for(member, failed)

    async def _wait_for(self, member: Member, failed: trio.Event) -> bool:
        """Returns when the next source is to be asked; True if that is because this one is only slow."""
        slow = member.health.slow_after()
        with trio.move_on_after(slow):
            await failed.wait()
            return False
        if not self._chain.hedges.spend():
            with trio.move_on_after(max(0.0, PATIENCE - slow)):
                await failed.wait()
                return False
        return True

    async def _chase(self, member: Member, failed: trio.Event, *, hedge: bool) -> None:
        """Asks one source until it gives the block, or can't for good. Sets `failed` when others should be asked."""
        pause = FIRST_PAUSE
        while self._found is None:
            wait = member.health.wait(trio.current_time())
            if wait == 0:
                block = await self._once(member, hedge=hedge)
                if isinstance(block, bytes):
                    self._found = Fetched(block, member.source)
                    return
                if isinstance(block, WrongBlock) or (self._chain.offline and isinstance(block, NotHere)):
                    return
                wait = pause * self._chain.chance.uniform(0.5, 1.0)
                pause = min(2 * pause, LONGEST_PAUSE)
                hedge = False
            failed.set()
            await trio.sleep(wait)

    async def _once(self, member: Member, *, hedge: bool = False) -> bytes | NotHere | SourceFailed | WrongBlock:
        asked = trio.current_time()
        self.said.setdefault(member.source.name, f"{member.source.name} has not answered")
        try:
            return await member.ask(self._cid, hedge=hedge)
        except (NotHere, SourceFailed) as exc:
            log.debug("%s", exc)
            self.said[member.source.name] = str(exc)
            return exc
        except WrongBlock as exc:
            self._wrong = exc
            self.said[member.source.name] = f"{member.source.name} sent wrong bytes"
            self._chain.wrong(member, self._cid)
            return exc
        except trio.Cancelled:
            if self._found is not None and trio.current_time() - asked >= PATIENCE:
                member.overtaken(asked)
            raise
