"""Several sources as one, none of them trusted: order, failover, hedging, and the verification of every
block.

Concurrency: one event loop, any number of tasks. Cancelling a call cancels its requests. The cache above
shares one fetch among several readers.

Deadlines and pauses use trio's clock, CLOCK_MONOTONIC, which stands still while the machine sleeps. A call
that waits while the machine sleeps has the same time left afterwards. For a source that is not asked for a
while, the time has passed: CLOCK_BOOTTIME says how long the machine slept, and pauses are shortened by that.
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
    has_claimed_size,
)
from ipfsfuse.sources.pool.health import HedgeBudget, Statistics
from ipfsfuse.sources.pool.limiter import Permit
from ipfsfuse.sources.pool.managed_source import Failure, ManagedSource, check, check_each
from ipfsfuse.sources.streams import Delivery, Receive, Send, Stream, all_of, streaming
from ipfsfuse.structures import Buffer, Histogram

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_PATIENCE = 3.0
"""Seconds: see `SourcePool.patience`."""
ALONE_SHARE = 1 / 3
"""The longest pause after a failure of the only source that may be asked, as a part of the deadline. So each
call asks it."""
MAX_REPORTED = 1000
"""Wrong blocks, and too large blocks, that are logged. Later ones are not."""
PARALLEL_SINGLE = 4
"""Requests at a time for the single blocks that a range left out."""
MIN_SLEEP = 1.0
"""Seconds. A shorter sleep of the machine is ignored."""

FIRST_RETRY_PAUSE, LONGEST_RETRY_PAUSE = 0.25, 8.0
"""Seconds between two requests for one block at one source. The longest is at most a quarter of the
deadline."""
PATIENCE_ALONE = 15.0
"""Seconds without a block after which a range is broken off if there is no other source; at most half of the
deadline."""
STALL = 0.25
"""Seconds without a block after which a subtree is broken off: one block that the source lacks must not delay
the others. A remote gateway gets the time of its slow answers, if that is more, up to the pool's patience."""
FIRST_BLOCK_FACTOR = 4
"""For its first block, a source gets so many times the time of its slow answers, if that is more."""
FIRST_BLOCK_SHARE = 1 / 3
"""The part of the deadline that the first block may take. After that there is time to get it elsewhere."""


def seconds_asleep() -> float:
    """How long this machine has slept since it started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


class Inline(Source):
    """The source that is named for inline blocks. It is never asked, because the pool decodes them itself."""

    name = "inline"
    in_place = True

    async def get(self, cid: Cid) -> bytes:
        block = cids.inline_block(cid)
        if block is None:
            raise NotHere(f"{cids.text(cid)} holds no block of its own")
        return block

    async def aclose(self) -> None:
        pass


INLINE = Inline()


class SourcePool:
    """Implements `base.BlockFetcher`. Sources in place are asked first, then the others in the order given.

    `offline`: network sources don't look for blocks elsewhere, so a block that they lack is not asked for
    again. `deadline`: the seconds in which callers want an answer; it determines when the next source is
    asked. `share`: how many sources share the requests that may run at a time; 0 for as many as there are
    now."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        offline: bool = False,
        deadline: float = 30.0,
        share: int = 0,
        rng: random.Random | None = None,
        asleep: Callable[[], float] = seconds_asleep,
    ) -> None:
        self.offline = offline
        self.deadline = deadline
        self.rng = rng or random.Random()
        self.hedges = HedgeBudget()
        self._share = share or max(1, sum(not source.in_place for source in sources))
        self._managed = [ManagedSource(source, self.rng, self._share) for source in sources]
        self.in_place = [managed for managed in self._managed if managed.source.in_place]
        self._network = [managed for managed in self._managed if not managed.source.in_place]
        self._reported_wrong: set[tuple[str, Cid]] = set()
        self._reported_large: set[Cid] = set()
        self.no_source_to_ask = ""
        """Why a block that is not in place could not be asked for; "" if that never happened."""
        self._under_way: dict[bytes, HedgedFetch] = {}
        """Fetches by multihash."""
        self._asleep = asleep
        self._slept = asleep()

    def roots(self) -> Sequence[Cid]:
        return [root for managed in self._managed for root in managed.roots()]

    def latencies(self) -> Mapping[str, Histogram]:
        """Latencies of verified blocks, by source name."""
        return {managed.source.name: managed.health.latencies for managed in self._managed}

    def statistics(self) -> Sequence[Statistics]:
        """The statistics of each source, in the order given; `network` is followed by the providers that it
        found."""
        found = list[Statistics]()
        for managed in self._managed:
            found.append(managed.statistics())
            if providers := getattr(managed.source, "statistics", None):
                found += providers()
        return found

    def add(self, source: Source) -> None:
        """Adds a network source, to be asked after the others."""
        managed = ManagedSource(source, self.rng, self._share)
        # new lists, because a fetch may be iterating over the old ones
        self._managed, self._network = [*self._managed, managed], [*self._network, managed]

    def sources_with_wrong_blocks(self) -> Sequence[Source]:
        """Network sources that have sent wrong bytes."""
        return [each.source for each in self._network if each.health.wrong_blocks]

    def remove(self, source: Source) -> None:
        """Removes a network source. Fetches that have begun may still ask it."""
        self._managed = [each for each in self._managed if each.source is not source]
        self._network = [each for each in self._network if each.source is not source]

    async def aclose(self) -> None:
        for managed in self._managed:
            await managed.aclose()

    async def get(self, cid: Cid) -> Fetched:
        key = cids.multihash(cid)
        multihashes.check_allowed(key)
        implied = cids.inline_or_empty_block(cid)
        if implied is not None:
            return Fetched(implied, INLINE)
        fetch = self._under_way[key] = HedgedFetch(self, cid)
        try:
            for managed in self.in_place:
                fetch.answers[managed.source.name] = f"{managed.source.name} has not answered"
                answer = await managed.ask(cid)
                if isinstance(answer, Buffer):
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
        raise fetch.failure or Unavailable(self._why_not(cid, fetch.answers))

    async def get_in_place(self, cid: Cid) -> bytes | None:
        """The verified block if a source in place has it; no other source is asked. Raises Unsupported."""
        multihashes.check_allowed(cids.multihash(cid))
        fetch = HedgedFetch(self, cid)
        for managed in self.in_place:
            answer = await managed.ask(cid)
            if isinstance(answer, Buffer):
                return bytes(answer)
            fetch.note(managed, answer)
        return None

    def _why_not(self, cid: Cid, answers: Mapping[str, str]) -> str:
        """The message for a block that no source gave. `answers`: the last answer of each source."""
        if not self._network and not self.offline:
            here = ", ".join(each.source.name for each in self.in_place) or "nothing"
            self.no_source_to_ask = (
                f"no source could be asked for a block that is not here: the sources are {here}; name others "
                "with --from, such as kubo, https://GATEWAY or network"
            )
            return f"no source has {cids.text(cid)}; {self.no_source_to_ask}"
        offline = " (offline)" if self.offline else ""
        return f"no source has {cids.text(cid)}{offline}" + "".join(f"; {each}" for each in answers.values())

    def answers_so_far(self, cid: Cid) -> str:
        fetch = self._under_way.get(cids.multihash(cid))
        return "" if fetch is None else "; ".join(fetch.answers.values())

    def stream(self, wanted: LeafRange, *, singly: bool = True) -> Stream[Verified]:
        """See `BlockFetcher.stream`. Without `singly`, leaves that no source sends in a range are
        left out."""
        return streaming(RangeFetch(self, wanted, singly).run)

    def subtree(self, subtree: Subtree, wanted: Wanted) -> Stream[Mapping[Cid, Fetched]]:
        return streaming(SubtreeFetch(self, subtree, wanted).run, alternate=True)

    # -- for the fetches below -------------------------------------------------------------------------------

    @property
    def patience(self) -> float:
        """Seconds without an answer after which the next source is asked. So each source is asked within the
        deadline, and the last one has time to answer."""
        return min(MAX_PATIENCE, self.deadline / (len(self._network) + 1))

    def network(self) -> Sequence[ManagedSource]:
        """The network sources to ask, in order: those without a pause first. Quarantined sources are left out
        unless all are quarantined."""
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
            wait = managed.health.wait(now, self.deadline * ALONE_SHARE if alone else math.inf)
        return wait

    def _note_sleep(self) -> None:
        asleep = self._asleep()
        if asleep - self._slept >= MIN_SLEEP:
            log.info(
                "this machine slept for %.0f s: the pauses of sources that failed are shortened by that",
                asleep - self._slept,
            )
            for managed in self._network:
                managed.health.slept(asleep - self._slept)
            self._slept = asleep

    def wrong(self, managed: ManagedSource, cid: Cid) -> None:
        """Records that `managed` sent wrong bytes, which quarantines a remote gateway. Logs it once."""
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
        """Logs once that a source offers a block for `cid` that is too large."""
        if cid not in self._reported_large and len(self._reported_large) < MAX_REPORTED:
            self._reported_large.add(cid)
            log.warning("%s", refusal)


# -- one block -----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class HedgedFetch:
    """Fetches one block from the network sources, and keeps what all sources answered."""

    _pool: SourcePool
    _cid: Cid
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancels all requests to network sources."""
    _asked: SourceRequest | None = None
    """All requests to network sources together, if there are several sources."""
    found: Fetched | None = None
    answers: dict[str, str] = field(default_factory=dict)
    """The last answer of each source that was asked, by its name."""
    failure: QuotaReached | BlockTooLarge | WrongBlock | None = None
    """What is raised if no source gives the block: the most informative of the failures."""
    _no_more_tries: trio.Event = field(default_factory=trio.Event)
    """Set when a source says that the block is too large. That may be a lie, so each other source is asked
    once, and has `patience` seconds to answer."""

    async def race(self, network: Sequence[ManagedSource]) -> None:
        """Asks each source when the one before it has failed or is late. Ends with the first block."""
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
        """Returns when the next source is to be asked. True if this one is slow and the next one is a
        hedge."""
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
        """Asks one source until it gives the block or asking again is useless. Sets `failed` when others
        should be asked."""
        pause, longest = FIRST_RETRY_PAUSE, min(LONGEST_RETRY_PAUSE, self._pool.deadline / 4)
        retried = False
        while self.found is None:
            wait = managed.health.wait(trio.current_time())
            if wait > 0:  # less where no other source can be asked
                wait = self._pool.wait(managed)
            if wait == 0:
                self.answers.setdefault(managed.source.name, f"{managed.source.name} has not answered")
                began, request = trio.current_time(), current_source_request.get()
                held = request.held if request is not None else 0.0
                try:
                    answer = await managed.ask(self._cid, hedge=hedge, retried=retried)
                except trio.Cancelled:
                    held = request.held - held if request is not None else 0.0
                    self._note_cancelled(managed, began, held)
                    raise
                if isinstance(answer, Buffer):
                    self.found = Fetched(answer, managed.source)
                    return
                self.note(managed, answer)
                if isinstance(answer, WrongBlock | BlockTooLarge) or (
                    self._pool.offline and isinstance(answer, NotHere)
                ):
                    return
                wait = min(pause, longest) * self._pool.rng.uniform(0.5, 1.0)
                pause *= 2
                hedge, retried = False, True
            if self._no_more_tries.is_set():
                return
            failed.set()
            with trio.move_on_after(min(wait, longest)):  # look again: a pause may end sooner than expected
                await self._no_more_tries.wait()
                return

    def _note_cancelled(self, managed: ManagedSource, asked: float, held: float) -> None:
        """The request to `managed` that began at `asked` was cancelled before an answer. Our own limits held
        it back for `held` seconds."""
        if self.found is not None and trio.current_time() - asked - held >= self._pool.patience:
            managed.note_overtaken(asked)

    def note(self, managed: ManagedSource, failure: Failure) -> None:
        """Records why `managed` did not give the block, and decides what that means for the others."""
        name = managed.source.name
        if isinstance(failure, BlockTooLarge):
            self.failure = failure
            self._no_more_tries.set()
            self._all_asked().limit(self.scope, self._pool.patience)
            self._pool.too_large(self._cid, failure)
        elif isinstance(failure, WrongBlock):
            self.failure = self.failure or failure
            self.answers[name] = f"{name} sent wrong bytes"
            self._pool.wrong(managed, self._cid)
        else:
            log.debug("%s", failure)
            self.answers[name] = str(failure)
            if isinstance(failure, QuotaReached):
                self.failure = failure
                self.scope.cancel()


# -- many blocks in one answer -------------------------------------------------------------------------------


async def _next(stream: Receive[T], patience: float, permit: Permit) -> T | None:
    """The next value of `stream` for the request of `permit`; None at its end. Raises TooSlowError if nothing
    comes for `patience` seconds."""
    with permit.asked.patience(patience) as scope:
        value = await anext(stream, None)
    if scope.cancelled_caught:
        raise trio.TooSlowError
    permit.progress()
    return value


# -- consecutive leaves of a file ----------------------------------------------------------------------------


class RangeFetch:
    """Sends the verified blocks of a range. Asks one source after the other for all that is missing together,
    and then for each block that is still missing."""

    def __init__(self, pool: SourcePool, wanted: LeafRange, singly: bool) -> None:
        self._pool, self._wanted, self._singly = pool, wanted, singly
        self._left = set(range(len(wanted.leaves)))

    async def run(self, send: Send[Verified]) -> None:
        for index, leaf in enumerate(self._wanted.leaves):
            multihashes.check_allowed(cids.multihash(leaf.cid))
            block = cids.inline_or_empty_block(leaf.cid)
            if block is not None:
                self._left.discard(index)
                await send.send(Verified(index, [block], INLINE, streams.nothing))
        for managed in [*self._pool.in_place, *self._pool.network()]:
            if self._left and managed.allows_many and self._pool.wait(managed) == 0:
                with managed.noting_many():
                    await self._send_from(managed, send)
        if self._singly and self._left:
            left = iter(sorted(self._left))
            await all_of([lambda: self._send_singly(left, send)] * min(PARALLEL_SINGLE, len(self._left)))

    async def _send_from(self, managed: ManagedSource, send: Send[Verified]) -> None:
        """Sends the missing blocks that one source has. Breaks off if no block comes for too long, or if a
        remote source sends a wrong one. Raises NotHere, SourceFailed."""
        patience = math.inf
        if not managed.source.in_place:
            alone = len(self._pool.network()) == 1
            patience = min(PATIENCE_ALONE, self._pool.deadline / 2) if alone else self._pool.patience
        missing = sorted(self._left)
        leaves = self._wanted.leaves
        part = replace(self._wanted, leaves=[leaves[index] for index in missing])
        async with managed.limiter.permit() as permit, managed.source.stream(part) as stream:
            while True:
                try:
                    delivery = await _next(stream, patience, permit)
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
        """Sends the correct blocks of a delivery; consecutive leaves are sent together."""
        good: list[tuple[int, Buffer]] = []
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
            if not has_claimed_size(leaf, len(fetched.block)):
                raise Malformed(
                    f"{cids.text(leaf.cid)}: a block of {len(fetched.block)} bytes, but its file states "
                    f"{leaf.size}"
                )
            await send.send(Verified(index, [fetched.block], fetched.source, streams.nothing))


# -- a directory's blocks ------------------------------------------------------------------------------------


class SubtreeFetch:
    """Sends the verified blocks of a directory that are wanted, from the first network source that may be
    asked."""

    def __init__(self, pool: SourcePool, subtree: Subtree, wanted: Wanted) -> None:
        self._pool, self._subtree, self._wanted = pool, subtree, wanted

    async def run(self, send: Send[Mapping[Cid, Fetched]]) -> None:
        if not await self._is_in_place():
            for managed in self._pool.network():
                if managed.allows_many and self._pool.wait(managed) == 0:
                    with managed.noting_many():
                        await self._send_from(managed, send)
                    return

    async def _is_in_place(self) -> bool:
        """Whether a source in place has the directory. Its blocks are then read one by one when they are
        used."""
        for managed in self._pool.in_place:
            try:
                with managed.translated_errors():
                    await managed.source.get(self._subtree.root)
            except (NotHere, SourceFailed, WrongBlock):
                continue
            return True
        return False

    async def _send_from(self, managed: ManagedSource, send: Send[Mapping[Cid, Fetched]]) -> None:
        """Sends the wanted blocks of one source. Gives up if nothing comes for too long, and after a wrong
        block. Raises NotHere, SourceFailed."""
        slow = managed.health.slow_after()
        stall = max(STALL, min(slow, self._pool.patience)) if managed.remote else STALL
        patience = min(max(STALL, FIRST_BLOCK_FACTOR * slow), self._pool.deadline * FIRST_BLOCK_SHARE)
        async with managed.limiter.permit() as permit, managed.source.subtree(self._subtree) as stream:
            while True:
                try:
                    blocks = await _next(stream, patience, permit)
                except trio.TooSlowError:
                    return
                if blocks is None:
                    return
                right, has_wrong = await self._verified(managed, blocks)
                if right:
                    await send.send(right)
                if has_wrong:
                    return
                patience = stall

    async def _verified(
        self, managed: ManagedSource, blocks: streams.BlockBatch
    ) -> tuple[Mapping[Cid, Fetched], bool]:
        """The wanted ones of `blocks`, up to the first wrong one, and whether there is a wrong one."""
        right: dict[Cid, Fetched] = {}
        for cid, sent in blocks:
            if cid in right or not self._wanted.wants(cid):
                continue
            try:
                block = await check(cid, sent)
            except WrongBlock:
                self._pool.wrong(managed, cid)
                return right, True
            except Unsupported:  # a read of this block will raise it
                continue
            managed.health.record_success(-1, len(block))
            right[cid] = Fetched(block, managed.source)
            self._wanted.came(cid, bytes(block))
        return right, False
