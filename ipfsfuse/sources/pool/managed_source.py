"""One source in the pool: asked within its bounds, its answers verified, its health kept.

Whatever a source raises is that source's failure, and nobody else's. `check` and `check_each` are the one
place where blocks from outside are hashed.

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
from ipfsfuse.sources.streams import Block, Hashed
from ipfsfuse.structures import LogLimiter

log = logging.getLogger(__name__)

IN_ALL = 64
"""Requests that are not late, over all network sources; shared out evenly, so that a stalled source keeps
none from another."""
RUNNING = 16
"""Requests at one source that are not late. More made a node on this machine no faster."""
LATE = 128
"""Late requests at one source: a connection each."""
UNBOUNDED = 1 << 30
"""Requests at a source in place, late or not."""
SLOW_HERE, SLOW_FAR = 0.01, 0.5
"""What a local node's and a remote gateway's slowest answers are taken for before we know."""
SIDE_BY_SIDE = 4
"""Requests that one call for many blocks may make at a time."""
FAULT = "fault"
"""The kind of a failure that is a bug: of ours, or of a library."""
BUSY = "busy"
"""The kind of a failure by which a source says that it has too much to do."""
LOG_EVERY = 60.0
"""Seconds between two lines about one source's failures of one kind."""

Failure = NotHere | SourceFailed | WrongBlock | BlockTooLarge
"""Why a source does not give a block."""

INLINE_BYTES = 64 * 1024
"""A thread costs 115 us there and back, sha2-256 of 64 KiB 37 us; hashlib lets other threads run
meanwhile."""


async def check(cid: Cid, block: bytes | Hashed) -> bytes:
    """The block. Raises WrongBlock unless it is what `cid` names, Unsupported for a hash that is not
    allowed."""
    if isinstance(block, Hashed):
        if multihashes.SHA2_256_PREFIX + block.digest != cids.multihash(cid):
            raise WrongBlock(f"{cids.text(cid)}: the block's bytes do not match its CID")
        return block.block
    wanted = cids.multihash(cid)
    if len(block) <= INLINE_BYTES:
        right = multihashes.matches(wanted, (block,))
    else:
        # Left to itself when cancelled: it ends within a millisecond, holds nothing, its answer is dropped.
        right = await threads.run_sync(multihashes.matches, wanted, (block,), abandon_on_cancel=True)
    if not right:
        raise WrongBlock(f"{cids.text(cid)}: the block's bytes do not match its CID")
    return block


async def check_each(wanted: Sequence[Cid], blocks: Sequence[Block]) -> Sequence[bool]:
    """Of each of `blocks` whether it is what `wanted` names. Raises Unsupported as `check`."""

    def run() -> Sequence[bool]:
        return [
            multihashes.matches(cids.multihash(cid), (block,))
            for cid, block in zip(wanted, blocks, strict=True)
        ]

    if sum(map(len, blocks)) <= INLINE_BYTES:
        return run()
    return await threads.run_sync(run, abandon_on_cancel=True)  # as in `check`


class ManagedSource:
    def __init__(self, source: Source, chance: random.Random, shared_by: int = 1) -> None:
        """One of `shared_by` sources that the bound over all is divided among."""
        self.source = source
        self._get: Callable[[Cid], Awaitable[bytes | Hashed]] = getattr(source, "get_hashed", source.get)
        self.remote = not getattr(source, "local", True)
        slow = SLOW_FAR if self.remote else SLOW_HERE
        self.health = Health(chance, may_quarantine=self.remote, slow=slow, answered=source.in_place)
        running, late = max(1, min(RUNNING, IN_ALL // shared_by)), max(1, min(LATE, 8 * IN_ALL // shared_by))
        if source.in_place:
            running = late = UNBOUNDED
        self.limiter = ConcurrencyLimiter(running, late, self.health.slow_after)
        self._answered = float("-inf")
        self._log_limiter = LogLimiter(LOG_EVERY, trio.current_time)

    # -- asking ------------------------------------------------------------------------------------------

    async def ask(self, cid: Cid, *, hedge: bool = False, retried: bool = False) -> bytes | Failure:
        """The verified block, or why this source does not give it. Waits for its turn; a source in place
        needs none.

        `retried` where this source was asked before in the same fetch: others go first."""
        again = False
        while True:
            answer: bytes | Failure | None = None
            turn = nullcontext() if self.source.in_place else self.limiter.place(retried, again)
            async with turn as place:
                began = trio.current_time()
                self.health.asked(began, hedge=hedge)
                try:
                    answer = await check(cid, await self._get(cid))
                except (Exception, BaseExceptionGroup) as exc:
                    answer = self._failure(exc).with_traceback(None)  # it would hold this frame
                finally:
                    seconds = trio.current_time() - began
                    if place is not None:
                        seconds = max(0.0, seconds - place.asked.held)
                    if answer is None or isinstance(answer, BlockTooLarge):
                        # cancelled; or what says nothing about the source: it may be true or a lie
                        self.health.record_cancelled()
                    if log.isEnabledFor(logging.DEBUG):
                        name, number = self.source.name, current_request.get().number
                        outcomes = {bytes: "gave", NotHere: "lacks"}
                        outcome = outcomes.get(type(answer), "did not give")
                        line = "request %d: %s %s %s, after %.1f ms"
                        log.debug(line, number, name, outcome, cids.text(cid), seconds * 1e3)
                if isinstance(answer, SourceFailed):
                    self.note(answer, began)
                elif isinstance(answer, bytes | NotHere):
                    self._answered = trio.current_time()
                    if place is not None:
                        place.answered = True
                    if isinstance(answer, bytes):
                        self.health.record_success(seconds, len(answer))
                    else:
                        self.health.record_miss()
            if place is None or not place.scope.cancelled_caught:
                return answer  # what follows from a WrongBlock, the pool knows
            again, retried = True, retried or not place.early  # its place went to another

    @contextmanager
    def asked_for_many(self) -> Iterator[None]:
        """Around one answer that may hold many blocks: notes what it says about the source. What the source
        lacks and how it fails ends here: blocks that did not come are asked for elsewhere."""
        start = trio.current_time()
        self.health.asked(start)
        try:
            with self.as_its_failure():
                yield
        except NotHere:
            self.health.record_miss()
        except (SourceFailed, WrongBlock, BlockTooLarge) as exc:
            log.debug("%s", exc)
            if not isinstance(exc, SourceFailed):
                exc = SourceFailed(f"{self.source.name}: {exc}", FAULT)
            self.note(exc, start, SIDE_BY_SIDE)
        finally:
            self.health.record_cancelled()

    @property
    def takes_many(self) -> bool:
        """Whether it may be sent as many requests at a time as a call for many blocks makes."""
        return self.source.in_place or self.limiter.limit >= SIDE_BY_SIDE

    def roots(self) -> Sequence[Cid]:
        """Those of the source; none where it can't tell. In a worker thread, or on the loop."""
        try:
            with self.as_its_failure():
                return self.source.roots()
        except SourceFailed as exc:
            threads.on_loop(self.note, exc)
            return ()

    async def aclose(self) -> None:
        """Never fails: the other sources are to be closed too."""
        try:
            with self.as_its_failure():
                await self.source.aclose()
        except SourceFailed as exc:
            log.debug("%s", exc)

    # -- what it said ----------------------------------------------------------------------------------------

    @contextmanager
    def as_its_failure(self) -> Iterator[None]:
        """Whatever the source raises leaves as a `Failure`. A cancellation passes."""
        try:
            yield
        except (NotHere, SourceFailed, WrongBlock, BlockTooLarge):
            raise
        except (Exception, BaseExceptionGroup) as exc:
            raise self._failure(exc) from exc

    def _failure(self, exc: Exception | BaseExceptionGroup) -> Failure:
        """What the source raised, as its failure. A group in which there is a cancellation, or the end of the
        program, is raised without the rest."""
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
            said = str(cause)[:200].encode("unicode_escape").decode()
            failure = SourceFailed(f"{self.source.name}: {type(cause).__name__}: {said}{where}", FAULT)
        failure.__cause__ = exc
        return failure

    def note(self, failure: SourceFailed, asked: float = math.inf, besides: int = 0) -> None:
        """A call that began at `asked` ended by `failure`. It made as many requests at a time as are in
        flight at the limiter for it, and so many `besides`."""
        more = self._log_limiter.admit((failure.kind, type(failure.__cause__).__name__))
        if more is not None and failure.kind == FAULT:
            log.error("%s; it counts as a failure of that source%s", failure, more)
        elif more is not None:
            log.info("%s (%s)%s", failure, failure.kind, more)
        if failure.kind == BUSY and self.limiter.note_busy(asked, besides):
            self.health.record_too_many()
        else:
            now = trio.current_time()
            self.health.record_failure(now, failure.kind, str(failure), failure.retry_after)

    def overtaken(self, asked: float) -> None:
        """Another source gave the block long after this one was `asked`. If nothing came from it meanwhile,
        that is a failure: else a source that takes requests and never answers would cost every read a wait,
        and look well."""
        if self._answered < asked:
            seconds = trio.current_time() - asked
            why = f"{self.source.name} has not answered for {seconds:.1f} s, and another source did"
            self.note(SourceFailed(why, "timeout"), asked)

    @property
    def repair(self) -> str:
        """What a user does about a wrong block in it."""
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
