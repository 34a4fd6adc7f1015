"""One block, looked for until it is had: which source is asked when, and when a second one is.

Concurrency: a fetch is one task, with children where several network sources may be asked at once; cancelling
it cancels their requests.
"""

import logging
import random
from collections.abc import Sequence
from typing import Protocol

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import BlockTooLarge, NotHere, SourceFailed, Unavailable, WrongBlock
from ipfsfuse.sources.base import Fetched
from ipfsfuse.sources.pool.health import HedgeBudget
from ipfsfuse.sources.pool.managed_source import ManagedSource

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds between two requests for one block at one source. The longest is at most a quarter of the
deadline."""


class Pool(Protocol):
    """What a fetch needs of its pool."""

    offline: bool
    deadline: float
    """Seconds in which callers want an answer."""
    hedges: HedgeBudget
    chance: random.Random

    @property
    def patience(self) -> float:
        """Seconds without an answer after which the next source is asked, whatever the budget for hedging
        says."""
        ...

    def in_place(self) -> Sequence[ManagedSource]: ...

    def network(self) -> Sequence[ManagedSource]:
        """Those to ask, in order: the ready ones first, none that is quarantined while another is left."""
        ...

    def wait(self, managed: ManagedSource) -> float:
        """Seconds until that source may be asked: 0 for now."""
        ...

    def wrong(self, managed: ManagedSource, cid: Cid) -> None:
        """That source sent bytes that are not the block of `cid`."""
        ...

    def too_large(self, cid: Cid, refusal: BlockTooLarge) -> None:
        """A source has `cid` as a block that is too large."""
        ...


class HedgedFetch:
    def __init__(self, pool: Pool, cid: Cid) -> None:
        self._pool = pool
        self._cid = cid
        self._wrong: WrongBlock | None = None
        self._too_large: BlockTooLarge | None = None
        """Set once a source says that the block is too large. That may be a lie, so each other source is
        asked once, and has `patience` seconds to answer."""
        self._no_more_tries = trio.Event()
        self._network_scope = trio.CancelScope()
        self._found: Fetched | None = None
        self.said: dict[str, str] = {}
        """What each source that was asked has said last, by its name."""

    async def run(self) -> Fetched:
        """The block. Raises WrongBlock, BlockTooLarge or Unavailable once no source may give it any more."""
        for managed in self._pool.in_place():
            block = await self._once(managed)
            if isinstance(block, bytes):
                return Fetched(block, managed.source)
        network = self._pool.network()
        self._pool.hedges.request()
        with self._network_scope:
            if len(network) == 1:
                await self._poll_source(network[0], trio.Event(), hedge=False)
            elif network:
                await self._race(network)
        if self._found is not None:
            return self._found
        offline = " (offline)" if self._pool.offline else ""
        said = "".join(f"; {each}" for each in self.said.values())
        unavailable = Unavailable(f"no source has {cids.text(self._cid)}{offline}{said}")
        raise self._too_large or self._wrong or unavailable

    async def _race(self, network: Sequence[ManagedSource]) -> None:
        """Each source from when the one before it has failed or is late; the first that gives the block ends
        it."""
        async with trio.open_nursery() as nursery:

            async def poll(managed: ManagedSource, failed: trio.Event, hedge: bool) -> None:
                await self._poll_source(managed, failed, hedge=hedge)
                failed.set()
                if self._found is not None:
                    nursery.cancel_scope.cancel()

            hedge = False
            for managed in network:
                failed = trio.Event()
                nursery.start_soon(poll, managed, failed, hedge)
                hedge = await self._wait_for(managed, failed)

    async def _wait_for(self, managed: ManagedSource, failed: trio.Event) -> bool:
        """Returns when the next source is to be asked; True if that is because this one is only slow."""
        patience = self._pool.patience
        slow = min(managed.health.slow_after(), patience)
        with trio.move_on_after(slow):
            await failed.wait()
            return False
        if not self._pool.hedges.spend():
            with trio.move_on_after(patience - slow):
                await failed.wait()
                return False
        return True

    async def _poll_source(self, managed: ManagedSource, failed: trio.Event, *, hedge: bool) -> None:
        """Asks one source until it gives the block, or can't for good. Sets `failed` when others should be
        asked."""
        pause, longest = FIRST_PAUSE, min(LONGEST_PAUSE, self._pool.deadline / 4)
        retried = False
        while self._found is None:
            wait = self._pool.wait(managed)
            if wait == 0:
                block = await self._once(managed, hedge=hedge, retried=retried)
                if isinstance(block, bytes):
                    self._found = Fetched(block, managed.source)
                    return
                if isinstance(block, WrongBlock | BlockTooLarge) or (
                    self._pool.offline and isinstance(block, NotHere)
                ):
                    return
                wait = min(pause, longest) * self._pool.chance.uniform(0.5, 1.0)
                pause *= 2
                hedge, retried = False, True
            if self._too_large is not None:
                return
            failed.set()
            with trio.move_on_after(min(wait, longest)):  # a pause may end sooner than it was said to
                await self._no_more_tries.wait()
                return

    async def _once(
        self, managed: ManagedSource, *, hedge: bool = False, retried: bool = False
    ) -> bytes | NotHere | SourceFailed | WrongBlock | BlockTooLarge:
        asked, name = trio.current_time(), managed.source.name
        self.said.setdefault(name, f"{name} has not answered")
        try:
            return await managed.ask(self._cid, hedge=hedge, retried=retried)
        except (NotHere, SourceFailed) as exc:
            log.debug("%s", exc)
            self.said[name] = str(exc)
            return exc
        except BlockTooLarge as exc:
            self._too_large = exc
            self._no_more_tries.set()
            self._network_scope.deadline = trio.current_time() + self._pool.patience
            self._pool.too_large(self._cid, exc)
            return exc
        except WrongBlock as exc:
            self._wrong = exc
            self.said[name] = f"{name} sent wrong bytes"
            self._pool.wrong(managed, self._cid)
            return exc
        except trio.Cancelled:
            if self._found is not None and trio.current_time() - asked >= self._pool.patience:
                managed.overtaken(asked)
            raise
