"""One source in the pool: limits its requests, verifies its answers, and tracks its health.

Every exception that a source raises becomes a failure of that source. `check` and `check_each` are the only
functions that hash blocks from outside.

Concurrency: any number of tasks. Small blocks are hashed on the event loop, larger ones in a worker thread.
"""

import logging
import math
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import BlockTooLarge, IpfsFuseError, NotHere, SourceFailed, WrongBlock
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Source, current_request
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.pool.health import Health, Statistics
from ipfsfuse.sources.pool.limiter import ConcurrencyLimiter
from ipfsfuse.sources.streams import Hashed
from ipfsfuse.structures import Buffer, LogLimiter

log = logging.getLogger(__name__)

RUNNING_TOTAL = 64
"""Requests that are not late, over all network sources. Each source gets an equal part, so that a stalled
source takes nothing from another."""
RUNNING = 16
"""Requests at one source that are not late. With more, a node on this machine was no faster."""
LATE = 128
"""Late requests at one source, each with a connection."""
UNBOUNDED = 1 << 30
"""The limit for a source in place, which has none."""
SLOW_LOCAL, SLOW_REMOTE = 0.01, 0.5
"""Seconds that the slow answers of a local node and of a remote gateway are assumed to take, until they are
measured."""
PARALLEL_REQUESTS = 4
"""Requests that one call for many blocks may make at a time."""
FAULT = "fault"
"""The kind of a failure that is a bug, ours or a library's."""
BUSY = "busy"
"""The kind of a failure of a source that has too much to do."""
LOG_EVERY = 60.0
"""Seconds between two log lines about one source's failures of one kind."""

Failure = NotHere | SourceFailed | WrongBlock | BlockTooLarge
"""Why a source did not give a block."""

INLINE_BYTES = 64 * 1024
"""Blocks of up to so many bytes are hashed on the event loop: passing work to a thread and back costs 115 us,
and sha2-256 of 64 KiB 37 us. In a thread, hashlib lets other threads run."""


async def check(cid: Cid, block: Buffer | Hashed) -> Buffer:
    """Verifies the block and returns it. Raises WrongBlock if it does not match `cid`, Unsupported for a hash
    function that is not allowed."""
    if isinstance(block, Hashed):
        if multihashes.SHA2_256_PREFIX + block.digest != cids.multihash(cid):
            raise WrongBlock(f"{cids.text(cid)}: the block's bytes do not match its CID")
        return block.block
    wanted = cids.multihash(cid)
    if len(block) <= INLINE_BYTES:
        right = multihashes.matches(wanted, (block,))
    else:
        # May be abandoned when cancelled: it ends within a millisecond and holds no resources.
        right = await threads.run_sync(multihashes.matches, wanted, (block,), abandon_on_cancel=True)
    if not right:
        raise WrongBlock(f"{cids.text(cid)}: the block's bytes do not match its CID")
    return block


async def check_each(wanted: Sequence[Cid], blocks: Sequence[Buffer]) -> Sequence[bool]:
    """For each of `blocks`, whether it matches its CID in `wanted`. Raises Unsupported, as `check` does."""

    def run() -> Sequence[bool]:
        return [
            multihashes.matches(cids.multihash(cid), (block,))
            for cid, block in zip(wanted, blocks, strict=True)
        ]

    if sum(map(len, blocks)) <= INLINE_BYTES:
        return run()
    return await threads.run_sync(run, abandon_on_cancel=True)  # as in `check`


class ManagedSource:
    def __init__(self, source: Source, rng: random.Random, shared_by: int = 1) -> None:
        """`shared_by`: the number of sources that share RUNNING_TOTAL."""
        self.source = source
        self._get: Callable[[Cid], Awaitable[Buffer | Hashed]] = getattr(source, "get_hashed", source.get)
        self.remote = not getattr(source, "local", True)
        slow = SLOW_REMOTE if self.remote else SLOW_LOCAL
        self.health = Health(rng, may_quarantine=self.remote, slow=slow, answered=source.in_place)
        running = max(1, min(RUNNING, RUNNING_TOTAL // shared_by))
        late = max(1, min(LATE, 8 * RUNNING_TOTAL // shared_by))
        if source.in_place:
            running = late = UNBOUNDED
        self.limiter = ConcurrencyLimiter(running, late, self.health.slow_after)
        self._answered = float("-inf")
        self._log_limiter = LogLimiter(LOG_EVERY, trio.current_time)

    # -- asking ------------------------------------------------------------------------------------------

    async def ask(self, cid: Cid, *, hedge: bool = False, retried: bool = False) -> Buffer | Failure:
        """The verified block, or why this source did not give it. Waits for a place, unless the source is in
        place.

        `retried`: whether the same fetch asked this source before. Requests that were never tried go
        first."""
        again = False
        while True:
            answer: Buffer | Failure | None = None
            turn = nullcontext() if self.source.in_place else self.limiter.permit(retried, again)
            async with turn as permit:
                began = trio.current_time()
                self.health.asked(began, hedge=hedge)
                try:
                    answer = await check(cid, await self._get(cid))
                except (Exception, BaseExceptionGroup) as exc:
                    answer = self._failure(exc).with_traceback(None)  # it would keep this frame alive
                finally:
                    seconds = trio.current_time() - began
                    if permit is not None:
                        seconds = max(0.0, seconds - permit.asked.held)
                    if answer is None or isinstance(answer, BlockTooLarge):
                        # cancelled, or too large: that may be true or a lie, so it says nothing of the source
                        self.health.record_cancelled()
                    if log.isEnabledFor(logging.DEBUG):
                        name, number = self.source.name, current_request.get().number
                        outcomes = {bytes: "gave", memoryview: "gave", NotHere: "lacks"}
                        outcome = outcomes.get(type(answer), "did not give")
                        line = "request %d: %s %s %s, after %.1f ms"
                        log.debug(line, number, name, outcome, cids.text(cid), seconds * 1e3)
                if isinstance(answer, SourceFailed):
                    self.note(answer, began)
                elif isinstance(answer, Buffer | NotHere):
                    self._answered = trio.current_time()
                    if permit is not None:
                        permit.answered = True
                    if isinstance(answer, Buffer):
                        self.health.record_success(seconds, len(answer))
                    else:
                        self.health.record_miss()
            if permit is None or not permit.scope.cancelled_caught:
                return answer  # a WrongBlock has consequences that only the pool decides
            again, retried = True, retried or not permit.early  # another request took its place

    @contextmanager
    def noting_many(self) -> Iterator[None]:
        """Wraps a request for many blocks, and notes in the health how it ended. Does not raise if the source
        fails or lacks blocks: blocks that did not come are asked for elsewhere."""
        start = trio.current_time()
        self.health.asked(start)
        try:
            with self.translated_errors():
                yield
        except NotHere:
            self.health.record_miss()
        except (SourceFailed, WrongBlock, BlockTooLarge) as exc:
            log.debug("%s", exc)
            if not isinstance(exc, SourceFailed):
                exc = SourceFailed(f"{self.source.name}: {exc}", FAULT)
            self.note(exc, start, PARALLEL_REQUESTS)
        finally:
            self.health.record_cancelled()

    @property
    def allows_many(self) -> bool:
        """Whether a call for many blocks may be made, which makes PARALLEL_REQUESTS at a time."""
        return self.source.in_place or self.limiter.limit >= PARALLEL_REQUESTS

    def roots(self) -> Sequence[Cid]:
        """The roots of the source; none if it fails. May be called in a worker thread or on the event
        loop."""
        try:
            with self.translated_errors():
                return self.source.roots()
        except SourceFailed as exc:
            threads.on_loop(self.note, exc)
            return ()

    async def aclose(self) -> None:
        """Never raises an error, so that the other sources are closed too."""
        try:
            with self.translated_errors():
                await self.source.aclose()
        except SourceFailed as exc:
            log.debug("%s", exc)

    # -- failures --------------------------------------------------------------------------------------------

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turns every exception of the source into a `Failure`. A cancellation passes unchanged."""
        try:
            yield
        except (NotHere, SourceFailed, WrongBlock, BlockTooLarge):
            raise
        except (Exception, BaseExceptionGroup) as exc:
            raise self._failure(exc) from exc

    def _failure(self, exc: Exception | BaseExceptionGroup) -> Failure:
        """The source's exception as a `Failure`. If a group contains a cancellation or another BaseException,
        that is raised and the rest is dropped."""
        cause: BaseException = exc
        if isinstance(cause, BaseExceptionGroup):
            failed, others = cause.split(Exception)
            if others is not None:
                raise others from None
            assert failed is not None
            cause = failed
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, NotHere | SourceFailed | WrongBlock | BlockTooLarge):
            return cause
        if isinstance(cause, IpfsFuseError):  # a library folder that can't be read
            failure = SourceFailed(f"{self.source.name}: {cause}", "store")
        else:
            log.debug("%s failed unexpectedly", self.source.name, exc_info=exc)
            place = traceback.extract_tb(cause.__traceback__)[-1:]
            where = f" at {place[0].filename.rpartition('/')[2]}:{place[0].lineno}" if place else ""
            message = str(cause)[:200].encode("unicode_escape").decode()
            failure = SourceFailed(f"{self.source.name}: {type(cause).__name__}: {message}{where}", FAULT)
        failure.__cause__ = exc
        return failure

    def note(self, failure: SourceFailed, asked: float = math.inf, more: int = 0) -> None:
        """Logs and records a failure of a call that began at `asked`. `more`: requests that the call may have
        made besides those in flight at the limiter."""
        suppressed = self._log_limiter.admit((failure.kind, type(failure.__cause__).__name__))
        if suppressed is not None and failure.kind == FAULT:
            log.error("%s; it counts as a failure of that source%s", failure, suppressed)
        elif suppressed is not None:
            log.info("%s (%s)%s", failure, failure.kind, suppressed)
        if failure.kind == BUSY and self.limiter.note_busy(asked, more):
            self.health.record_too_many()
        else:
            now = trio.current_time()
            self.health.record_failure(now, failure.kind, str(failure), failure.retry_after)

    def note_overtaken(self, asked: float) -> None:
        """Another source gave the block long after this one was `asked`. That is a failure if this source
        answered nothing meanwhile. Otherwise a source that accepts requests and never answers would seem
        healthy and delay every read."""
        if self._answered < asked:
            seconds = trio.current_time() - asked
            why = f"{self.source.name} has not answered for {seconds:.1f} s, and another source did"
            self.note(SourceFailed(why, "timeout"), asked)

    @property
    def repair(self) -> str:
        """What a user can do about a wrong block in this source."""
        if isinstance(self.source, Kubo):
            return "`ipfs repo verify --heal` at the node finds and mends it"
        if self.source.in_place:
            return "add its content again, or get the CAR file anew"
        return "the other blocks are still taken from it"

    def statistics(self) -> Statistics:
        health, limiter, in_place = self.health, self.limiter, self.source.in_place
        state = health.state(trio.current_time())
        return Statistics(
            name=self.source.name,
            state=state,
            why=health.why if state != "good" else "",
            requests=health.requests,
            blocks=health.blocks,
            bytes=health.bytes,
            absent=health.absent,
            failures=dict(health.failures),
            wrong=health.wrong_blocks,
            hedges=health.hedges,
            median=health.percentile(0.5),
            p95=health.percentile(0.95),
            in_flight=limiter.in_flight,
            waiting=limiter.waiting,
            most_in_flight=0 if in_place else limiter.limit,
            most_per_caller=0 if in_place else limiter.caller_limit,
            in_place=in_place,
        )
