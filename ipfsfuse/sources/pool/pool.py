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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import (
    BlockTooLarge,
    Malformed,
    NotHere,
    QuotaReached,
    SourceFailed,
    Unavailable,
    Unsupported,
    WrongBlock,
)
from ipfsfuse.sources import streams
from ipfsfuse.sources.base import (
    Fetched,
    LeafRange,
    Source,
    SourceRequest,
    Subtree,
    Verified,
    Wanted,
    current_source_request,
    fits,
)
from ipfsfuse.sources.pool.health import HedgeBudget, Statistics
from ipfsfuse.sources.pool.limiter import Place
from ipfsfuse.sources.pool.managed_source import Failure, ManagedSource, check, check_each
from ipfsfuse.sources.streams import Block, Delivery, Receive, Send, Stream, all_of, streaming
from ipfsfuse.structures import Histogram

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 3.0
"""Seconds: see `SourcePool.patience`."""
ALONE = 1 / 3
"""Part of the deadline for which a source that failed is left alone where no other may be asked: so each call
asks it."""
MAX_REPORTED = 1000
"""Blocks that are wrong, and blocks that are too large. Beyond so many the log says nothing more."""
SINGLY = 4
"""Blocks that a run left out are asked for so many at a time."""
NAP = 1.0
"""Seconds that the machine must have slept to be noticed."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds between two requests for one block at one source. The longest is at most a quarter of the
deadline."""
PATIENCE_ALONE = 15.0
"""Seconds without a block after which a run is broken off where no other source could give it sooner; at most
half of the deadline."""
STALL = 0.25
"""Seconds without a block after which the answer is given up: one block that the source lacks must not delay
the others. A gateway far away gets as long as its slow answers take, if that is more, but no longer than the
pool's patience."""
FIRST_BLOCK = 4
"""For its first block, a source gets so many times as long as its slow answers take, if that is more."""
FIRST_PART = 1 / 3
"""Part of the deadline that the first block may take at most: it can still be had elsewhere then."""


def seconds_asleep() -> float:
    """How long this machine has slept since it started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class Inline(Source):
    """The source of blocks that are written in their own CIDs. Never asked: the pool answers for it."""

    name = "inline"
    in_place = True

    async def get(self, cid: Cid) -> bytes:
        block = cids.inline(cid)
        if block is None:
            raise NotHere(f"{cids.text(cid)} holds no block of its own")
        return block

    async def aclose(self) -> None:
        pass


INLINE = Inline()


class SourcePool:
    """Implements `base.Blocks`. Sources in place are asked first, the others in the order given.

    `offline`: what a network source does not have now (it looks no further) it will not have
    later. `deadline`: seconds in which callers want an answer; how long one source may keep others from being
    asked follows. `share`: how many sources share the requests that may run at a time; as many as there are,
    where none will be added."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        offline: bool = False,
        deadline: float = 30.0,
        share: int = 0,
        chance: random.Random | None = None,
        asleep: Callable[[], float] = seconds_asleep,
    ) -> None:
        self.offline = offline
        self.deadline = deadline
        self.chance = chance or random.Random()
        self.hedges = HedgeBudget()
        self._share = share or max(1, sum(not source.in_place for source in sources))
        self._managed = [ManagedSource(source, self.chance, self._share) for source in sources]
        self.in_place = [managed for managed in self._managed if managed.source.in_place]
        self._network = [managed for managed in self._managed if not managed.source.in_place]
        self._reported_wrong: set[tuple[str, Cid]] = set()
        self._reported_large: set[Cid] = set()
        self.no_source_to_ask = ""
        """Why no source could be asked for a block that was not here; "" if that never happened."""
        self._under_way: dict[bytes, HedgedFetch] = {}
        """Fetches by multihash."""
        self._asleep = asleep
        self._slept = asleep()

    def roots(self) -> Sequence[Cid]:
        return [root for managed in self._managed for root in managed.roots()]

    def latencies(self) -> Mapping[str, Histogram]:
        """Of verified blocks, by the names of their sources."""
        return {managed.source.name: managed.health.latencies for managed in self._managed}

    def statistics(self) -> Sequence[Statistics]:
        """One for each source, in the order given, each followed by the providers that it found."""
        found = list[Statistics]()
        for managed in self._managed:
            found.append(managed.statistics())
            if providers := getattr(managed.source, "statistics", None):
                found += providers()
        return found

    def add(self, source: Source) -> None:
        """A network source that was found later, asked after the others."""
        managed = ManagedSource(source, self.chance, self._share)
        # new lists: a fetch may be going through the old ones
        self._managed, self._network = [*self._managed, managed], [*self._network, managed]

    def liars(self) -> Sequence[Source]:
        """Network sources that ever sent wrong bytes."""
        return [each.source for each in self._network if each.health.wrong_blocks]

    def remove(self, source: Source) -> None:
        """No fetch that begins from now on asks it."""
        self._managed = [each for each in self._managed if each.source is not source]
        self._network = [each for each in self._network if each.source is not source]

    async def aclose(self) -> None:
        for managed in self._managed:
            await managed.aclose()

    async def get(self, cid: Cid) -> Fetched:
        key = cids.multihash(cid)
        multihashes.check_allowed(key)
        known = cids.implied_block(cid)
        if known is not None:
            return Fetched(known, INLINE)
        fetch = self._under_way[key] = HedgedFetch(self, cid)
        try:
            for managed in self.in_place:
                fetch.said[managed.source.name] = f"{managed.source.name} has not answered"
                answer = await managed.ask(cid)
                if isinstance(answer, bytes):
                    return Fetched(answer, managed.source)
                fetch.note(managed, answer)
            with fetch.scope:
                network = self.network() if len(self._network) > 1 else self._network
                if len(network) > 1 or fetch.failure is not None:
                    await fetch.race(network)
                elif network:
                    await fetch.poll_source(network[0], trio.Event(), hedge=False)
        finally:
            if self._under_way.get(key) is fetch:
                del self._under_way[key]
        if fetch.found is not None:
            return fetch.found
        raise fetch.failure or Unavailable(self._why_not(cid, fetch.said))

    async def get_in_place(self, cid: Cid) -> bytes | None:
        """The verified block if a source in place has it; no other source is asked. Raises Unsupported."""
        multihashes.check_allowed(cids.multihash(cid))
        fetch = HedgedFetch(self, cid)
        for managed in self.in_place:
            answer = await managed.ask(cid)
            if isinstance(answer, bytes):
                return answer
            fetch.note(managed, answer)
        return None

    def _why_not(self, cid: Cid, said: Mapping[str, str]) -> str:
        """The line for a block that no source gave; `said` is what each of them said last."""
        if not self._network and not self.offline:
            here = ", ".join(each.source.name for each in self.in_place) or "nothing"
            self.no_source_to_ask = (
                f"no source could be asked for a block that is not here: the sources are {here}; name others "
                "with --from, such as kubo, https://GATEWAY or network"
            )
            return f"no source has {cids.text(cid)}; {self.no_source_to_ask}"
        offline = " (offline)" if self.offline else ""
        return f"no source has {cids.text(cid)}{offline}" + "".join(f"; {each}" for each in said.values())

    def said(self, cid: Cid) -> str:
        fetch = self._under_way.get(cids.multihash(cid))
        return "" if fetch is None else "; ".join(fetch.said.values())

    def stream(self, wanted: LeafRange, *, singly: bool = True) -> Stream[Verified]:
        """See `Blocks.stream`. Without `singly`, leaves that no source sends together are left out."""
        return streaming(RangeFetch(self, wanted, singly).run)

    def subtree(self, subtree: Subtree, wanted: Wanted) -> Stream[Mapping[Cid, Fetched]]:
        return streaming(SubtreeFetch(self, subtree, wanted).run, turns=True)

    # -- for those who ask on its behalf ---------------------------------------------------------------------

    @property
    def patience(self) -> float:
        """Seconds without an answer after which the next source is asked, so that each has its turn in the
        deadline, and the last one time to answer."""
        return min(PATIENCE, self.deadline / (len(self._network) + 1))

    def network(self) -> Sequence[ManagedSource]:
        """Those to ask, in order: the ready ones first, none that is quarantined while another is left."""
        self._note_sleep()
        now = trio.current_time()
        usable = [managed for managed in self._network if not managed.health.is_quarantined(now)]
        return sorted(usable or self._network, key=lambda managed: managed.health.wait(now) > 0)

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
        seconds = managed.health.record_wrong(now, others=others or bool(self.in_place))
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
        elif (name, cid) not in self._reported_wrong and len(self._reported_wrong) < MAX_REPORTED:
            self._reported_wrong.add((name, cid))
            log.warning("%s has wrong bytes for %s: %s", name, cids.text(cid), managed.repair)

    def too_large(self, cid: Cid, refusal: BlockTooLarge) -> None:
        """A source has `cid` as a block that is too large. Says so once."""
        if cid not in self._reported_large and len(self._reported_large) < MAX_REPORTED:
            self._reported_large.add(cid)
            log.warning("%s", refusal)


# -- one block -----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class HedgedFetch:
    """One block, asked of the network sources, and what all sources said of it."""

    _pool: SourcePool
    _cid: Cid
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Around what is asked of the network."""
    _asked: SourceRequest | None = None
    """All that is asked of it, where more than one source is."""
    found: Fetched | None = None
    said: dict[str, str] = field(default_factory=dict)
    """What each source that was asked has said last, by its name."""
    failure: QuotaReached | BlockTooLarge | WrongBlock | None = None
    """What is raised if no source gives it: the most telling of what they said."""
    _no_more_tries: trio.Event = field(default_factory=trio.Event)
    """Set once a source says that the block is too large. That may be a lie, so each other source is asked
    once, and has `patience` seconds to answer."""

    async def race(self, network: Sequence[ManagedSource]) -> None:
        """Each source from when the one before it has failed or is late; the first that gives the block ends
        it."""
        self._pool.hedges.request()
        with self._all_asked().current():
            await self._race(network)

    def _all_asked(self) -> SourceRequest:
        if self._asked is None:
            self._asked = SourceRequest()
        return self._asked

    async def _race(self, network: Sequence[ManagedSource]) -> None:
        async with trio.open_nursery() as nursery:

            async def poll(
                managed: ManagedSource, asked: SourceRequest, failed: trio.Event, hedge: bool
            ) -> None:
                with asked.current():
                    await self.poll_source(managed, failed, hedge=hedge)
                failed.set()
                if self.found is not None:
                    nursery.cancel_scope.cancel()

            hedge = False
            for managed in network:
                asked, failed = SourceRequest(), trio.Event()
                nursery.start_soon(poll, managed, asked, failed, hedge)
                if managed is not network[-1]:
                    hedge = await self._wait_for(managed, asked, failed)

    async def _wait_for(self, managed: ManagedSource, asked: SourceRequest, failed: trio.Event) -> bool:
        """Returns when the next source is to be asked; True if that is because this one is only slow."""
        patience = self._pool.patience
        slow = min(managed.health.slow_after(), patience)
        with asked.patience(slow):
            await failed.wait()
            return False
        if not self._pool.hedges.spend():
            with asked.patience(patience - slow):
                await failed.wait()
                return False
        return True

    async def poll_source(self, managed: ManagedSource, failed: trio.Event, *, hedge: bool) -> None:
        """Asks one source until it gives the block, or can't for good. Sets `failed` when others should be
        asked."""
        pause, longest = FIRST_PAUSE, min(LONGEST_PAUSE, self._pool.deadline / 4)
        retried = False
        while self.found is None:
            wait = self._pool.wait(managed)
            if wait == 0:
                self.said.setdefault(managed.source.name, f"{managed.source.name} has not answered")
                began, request = trio.current_time(), current_source_request.get()
                held = request.held if request is not None else 0.0  # by our own limits, in seconds
                try:
                    answer = await managed.ask(self._cid, hedge=hedge, retried=retried)
                except trio.Cancelled:
                    held = request.held - held if request is not None else 0.0
                    self._note_cancelled(managed, began, held)
                    raise
                if isinstance(answer, bytes):
                    self.found = Fetched(answer, managed.source)
                    return
                self.note(managed, answer)
                if isinstance(answer, WrongBlock | BlockTooLarge) or (
                    self._pool.offline and isinstance(answer, NotHere)
                ):
                    return
                wait = min(pause, longest) * self._pool.chance.uniform(0.5, 1.0)
                pause *= 2
                hedge, retried = False, True
            if self._no_more_tries.is_set():
                return
            failed.set()
            with trio.move_on_after(min(wait, longest)):  # a pause may end sooner than it was said to
                await self._no_more_tries.wait()
                return

    def _note_cancelled(self, managed: ManagedSource, asked: float, held: float) -> None:
        """`managed`, which was asked at the time `asked`, has not answered, nor sent what was `held` back for
        so many seconds."""
        if self.found is not None and trio.current_time() - asked - held >= self._pool.patience:
            managed.overtaken(asked)

    def note(self, managed: ManagedSource, failure: Failure) -> None:
        """What `managed` said instead of giving the block, and what follows for the others."""
        name = managed.source.name
        if isinstance(failure, BlockTooLarge):
            self.failure = failure
            self._no_more_tries.set()
            self._all_asked().limit(self.scope, self._pool.patience)
            self._pool.too_large(self._cid, failure)
        elif isinstance(failure, WrongBlock):
            self.failure = self.failure or failure
            self.said[name] = f"{name} sent wrong bytes"
            self._pool.wrong(managed, self._cid)
        else:
            log.debug("%s", failure)
            self.said[name] = str(failure)
            if isinstance(failure, QuotaReached):
                self.failure = failure
                self.scope.cancel()


# -- many blocks in one answer -------------------------------------------------------------------------------


async def _next(stream: Receive[T], patience: float, place: Place) -> T | None:
    """What `stream` sends next to the request at `place`; None at its end. Raises TooSlowError if nothing
    comes for `patience` seconds."""
    with place.asked.patience(patience) as scope:
        value = await anext(stream, None)
    if scope.cancelled_caught:
        raise trio.TooSlowError
    place.progress()
    return value


# -- consecutive leaves of a file ----------------------------------------------------------------------------


class RangeFetch:
    """Sends the blocks of a range, verified: from one source after the other what each sends together, and at
    last one by one what is still missing."""

    def __init__(self, pool: SourcePool, wanted: LeafRange, singly: bool) -> None:
        self._pool, self._wanted, self._singly = pool, wanted, singly
        self._left = set(range(len(wanted.leaves)))

    async def run(self, send: Send[Verified]) -> None:
        for index, leaf in enumerate(self._wanted.leaves):
            multihashes.check_allowed(cids.multihash(leaf.cid))
            block = cids.implied_block(leaf.cid)
            if block is not None:
                self._left.discard(index)
                await send.send(Verified(index, [block], INLINE, streams.nothing))
        for managed in [*self._pool.in_place, *self._pool.network()]:
            if self._left and managed.takes_many and self._pool.wait(managed) == 0:
                with managed.asked_for_many():
                    await self._send_from(managed, send)
        if self._singly and self._left:
            left = iter(sorted(self._left))
            await all_of([lambda: self._send_singly(left, send)] * min(SINGLY, len(self._left)))

    async def _send_from(self, managed: ManagedSource, send: Send[Verified]) -> None:
        """What one source sends of what is missing. It is broken off if no block comes for too long, and when
        a remote source sends a wrong one. Raises NotHere, SourceFailed."""
        patience = math.inf
        if not managed.source.in_place:
            alone = len(self._pool.network()) == 1
            patience = min(PATIENCE_ALONE, self._pool.deadline / 2) if alone else self._pool.patience
        missing = sorted(self._left)
        leaves = self._wanted.leaves
        part = replace(self._wanted, leaves=[leaves[index] for index in missing])
        async with managed.limiter.place() as place, managed.source.stream(part) as stream:
            while True:
                try:
                    delivery = await _next(stream, patience, place)
                except trio.TooSlowError as exc:
                    why = f"{managed.source.name} sent no block for {patience:g} s"
                    raise SourceFailed(why, "timeout") from exc
                if delivery is None:
                    return
                indexes = missing[delivery.first : delivery.first + len(delivery.blocks)]
                right = await check_each([leaves[index].cid for index in indexes], delivery.blocks)
                await self._send(managed, indexes, delivery, right, send)
                if managed.remote and not all(right):
                    return

    async def _send(
        self,
        managed: ManagedSource,
        indexes: Sequence[int],
        delivery: Delivery,
        right: Sequence[bool],
        send: Send[Verified],
    ) -> None:
        """Sends the right blocks of a delivery, those of consecutive leaves together."""
        good: list[tuple[int, Block]] = []
        for index, block, is_right in zip(indexes, delivery.blocks, right, strict=True):
            if not is_right:
                self._pool.wrong(managed, self._wanted.leaves[index].cid)
            elif index in self._left:
                self._left.discard(index)
                managed.health.record_success(-1, len(block))
                good.append((index, block))
        if not good:
            delivery.release()
        rows = list(streams.consecutive(good))
        for number, (first, blocks) in enumerate(rows, 1):
            release = delivery.release if number == len(rows) else streams.nothing
            await send.send(Verified(first, blocks, managed.source, release))

    async def _send_singly(self, left: Iterator[int], send: Send[Verified]) -> None:
        for index in left:
            leaf = self._wanted.leaves[index]
            fetched = await self._pool.get(leaf.cid)
            if not fits(leaf, len(fetched.block)):
                raise Malformed(
                    f"{cids.text(leaf.cid)}: a block of {len(fetched.block)} bytes, but its file states "
                    f"{leaf.size}"
                )
            await send.send(Verified(index, [fetched.block], fetched.source, streams.nothing))


# -- a directory's blocks ------------------------------------------------------------------------------------


class SubtreeFetch:
    """Sends the blocks of a directory that are wanted, verified, from the first source that may have them."""

    def __init__(self, pool: SourcePool, subtree: Subtree, wanted: Wanted) -> None:
        self._pool, self._subtree, self._wanted = pool, subtree, wanted

    async def run(self, send: Send[Mapping[Cid, Fetched]]) -> None:
        if not await self._is_at_hand():
            for managed in self._pool.network():
                if managed.takes_many and self._pool.wait(managed) == 0:
                    with managed.asked_for_many():
                        await self._send_from(managed, send)
                    return

    async def _is_at_hand(self) -> bool:
        """Whether a source in place has it: then each block is read where it lies."""
        for managed in self._pool.in_place:
            try:
                with managed.as_its_failure():
                    await managed.source.get(self._subtree.root)
            except (NotHere, SourceFailed, WrongBlock):
                continue
            return True
        return False

    async def _send_from(self, managed: ManagedSource, send: Send[Mapping[Cid, Fetched]]) -> None:
        """Gives up when nothing comes for too long, and after a wrong block. Raises NotHere,
        SourceFailed."""
        slow = managed.health.slow_after()
        stall = max(STALL, min(slow, self._pool.patience)) if managed.remote else STALL
        patience = min(max(STALL, FIRST_BLOCK * slow), self._pool.deadline * FIRST_PART)
        async with managed.limiter.place() as place, managed.source.subtree(self._subtree) as stream:
            while True:
                try:
                    blocks = await _next(stream, patience, place)
                except trio.TooSlowError:
                    return
                if blocks is None:
                    return
                right, lied = await self._verified(managed, blocks)
                if right:
                    await send.send(right)
                if lied:
                    return
                patience = stall

    async def _verified(
        self, managed: ManagedSource, blocks: streams.Blocks
    ) -> tuple[Mapping[Cid, Fetched], bool]:
        """What is wanted of `blocks`, up to the first that is wrong, and whether there is one."""
        right: dict[Cid, Fetched] = {}
        for cid, sent in blocks:
            if cid in right or not self._wanted.wants(cid):
                continue
            try:
                block = await check(cid, sent)
            except WrongBlock:
                self._pool.wrong(managed, cid)
                return right, True
            except Unsupported:  # a read of it will raise
                continue
            managed.health.record_success(-1, len(block))
            right[cid] = Fetched(block, managed.source)
            self._wanted.came(cid, block)
        return right, False
