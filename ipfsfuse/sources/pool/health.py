"""How one source has done lately, and what follows from it.

Pure: from what happened and when, it makes decisions; the caller waits, asks and logs. Times are
seconds of the caller's clock, and the chance for jitter is handed in. Not for several threads.
"""

import math
import random
from collections import Counter, deque
from dataclasses import dataclass

from ipfsfuse.structures import Histogram

OPENS_AFTER = 3
"""Failures in a row after which a source is not asked for a while. One in three at random does so once in
27."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
LONGEST_RETRY_AFTER = 600.0
"""Seconds: a server that asks for a longer pause is asked again after so many."""
FIRST_QUARANTINE, LONGEST_QUARANTINE = 600.0, 86_400.0
LONGEST_PROBE = 1.0
"""Seconds after which a request that should find out whether a source is back no longer keeps others from
asking: it may have met a block that nobody has."""
SAMPLES = 256
SORT_EVERY = 16
"""Answers between two looks at the percentiles: sorting 256 takes 15 us, a tenth of a small block's whole
cost."""
ENOUGH = 20
"""With fewer answers than that a percentile says little."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """One source, for people and for JSON."""

    name: str
    state: str
    """untried (has not answered yet), good, open (failed: not asked for a while), half_open (one request
    finds out whether it is back), quarantined (sent wrong bytes)."""
    why: str
    """The last failure's line while the state is not good."""
    requests: int
    blocks: int
    bytes: int
    absent: int
    """Times that it did not have the block."""
    failures: dict[str, int]
    """By kind."""
    wrong: int
    hedges: int
    """Times that it was asked because another was slow."""
    median: float | None
    """Seconds to a block, of the last 256."""
    p95: float | None
    in_flight: int = 0
    """Requests that it is answering now."""
    waiting: int = 0
    """Requests that wait for their turn at it."""
    most_in_flight: int = 0
    """The most that it is sent at a time; lowered when it answers that it is busy. 0 where nothing bounds it
    (files)."""
    most_per_caller: int = 0
    """The most of them that may be one caller's (user id)."""
    found: bool = False
    """Whether a router named it, not the user."""
    in_place: bool = False
    """Whether its blocks are files on this machine: the library, and CAR files."""


class Health:
    """`may_quarantine` for a source that is quarantined for wrong bytes (a remote gateway); `slow` is what
    its 95th percentile is taken for, in seconds, before there is one. `answered` for a source that was seen
    to be well when it was opened."""

    def __init__(
        self, chance: random.Random, *, may_quarantine: bool, slow: float, answered: bool = False
    ) -> None:
        self._chance = chance
        self._may_quarantine = may_quarantine
        self._slow = slow
        self.latencies = Histogram()
        self._times: deque[float] = deque(maxlen=SAMPLES)
        self._sorted: list[float] = []
        self._unsorted = 0
        self._failed_in_a_row = 0
        self._failed_at = self._open_until = self._quarantined_until = self._probed_at = -math.inf
        self._next_quarantine = FIRST_QUARANTINE
        self._answered = answered
        self.why = ""
        self.requests = self.blocks = self.bytes = self.absent = self.wrong_blocks = self.hedges = 0
        self.failures: Counter[str] = Counter()

    # -- what happened ---------------------------------------------------------------------------------------

    def asked(self, now: float, *, hedge: bool = False) -> None:
        self.requests += 1
        self.hedges += hedge
        if self._failed_in_a_row >= OPENS_AFTER and now >= self._open_until:
            self._probed_at = now

    def record_success(self, seconds: float, size: int) -> None:
        """A verified block. `seconds` is the time it took, negative where it says nothing (one of a run)."""
        self.blocks += 1
        self.bytes += size
        self._answered, self._failed_in_a_row, self._probed_at, self.why = True, 0, -math.inf, ""
        if seconds >= 0:
            self.latencies.add(seconds)
            self._times.append(seconds)
            self._unsorted += 1
            if self._unsorted >= SORT_EVERY or len(self._times) <= ENOUGH:
                self._sorted = sorted(self._times)
                self._unsorted = 0

    def record_miss(self) -> None:
        """An answer, even if not a block: the source is well."""
        self.absent += 1
        self._answered, self._failed_in_a_row, self._probed_at, self.why = True, 0, -math.inf, ""

    def record_failure(self, now: float, kind: str, why: str, retry_after: float | None = None) -> None:
        """`retry_after` in seconds, as the source asked for it."""
        self.failures[kind] += 1
        self.why = why
        self._failed_in_a_row += 1
        self._failed_at = now
        self._probed_at = -math.inf
        if retry_after is not None and retry_after >= 0:  # not so of NaN
            self._failed_in_a_row = max(self._failed_in_a_row, OPENS_AFTER)
            self._open_until = max(self._open_until, now + min(retry_after, LONGEST_RETRY_AFTER))
        elif self._failed_in_a_row >= OPENS_AFTER:
            pause = min(FIRST_PAUSE * 2 ** min(self._failed_in_a_row - OPENS_AFTER, 10), LONGEST_PAUSE)
            self._open_until = now + pause * self._chance.uniform(0.5, 1.0)

    def record_too_many(self) -> None:
        """It is busy with other requests of ours: it is sent fewer at a time, and is well otherwise."""
        self._answered = True
        self.failures["busy"] += 1

    def record_cancelled(self) -> None:
        """A request ended without a word about the source: it was not needed any more."""
        self._probed_at = -math.inf

    def record_wrong(self, now: float, *, others: bool) -> float | None:
        """Bytes that do not match. Seconds for which the source is now quarantined, 0 if it was already (this
        request had been on its way); None if it loses this block alone."""
        self.wrong_blocks += 1
        self._answered = True
        self._probed_at = -math.inf
        if self.is_quarantined(now):
            return 0.0
        if not self._may_quarantine or not others:
            return None
        seconds, self._next_quarantine = (
            self._next_quarantine,
            min(2 * self._next_quarantine, LONGEST_QUARANTINE),
        )
        self._quarantined_until = now + seconds
        self.why = "sent wrong bytes"
        return seconds

    def slept(self, seconds: float) -> None:
        """The machine was asleep for so long, while the clock stood still: for the source that time has
        passed."""
        self._failed_at -= seconds
        self._open_until -= seconds
        self._quarantined_until -= seconds
        self._probed_at -= seconds

    # -- what follows ----------------------------------------------------------------------------------------

    def is_quarantined(self, now: float) -> bool:
        return now < self._quarantined_until

    def wait(self, now: float, longest: float = math.inf) -> float:
        """Seconds until it may be asked: 0 for now. After a pause one request at a time finds out.

        `longest` bounds the pause after a failure, in seconds: where there is no other source to ask."""
        if self._failed_in_a_row < OPENS_AFTER:
            return 0.0
        until = min(self._open_until, self._failed_at + longest)
        if now < until:
            return until - now
        return max(0.0, self._probed_at + min(self.slow_after(), LONGEST_PROBE) - now)

    def percentile(self, share: float) -> float | None:
        found = self._sorted
        return found[min(int(share * len(found)), len(found) - 1)] if found else None

    def slow_after(self) -> float:
        """Seconds after which an answer is late: the 95th percentile, at least 10 ms. While there are few
        answers, it is as long as the slowest of them took, if that is more than was expected."""
        if len(self._times) < ENOUGH:
            return max(0.01, self._slow, *self._times)
        return max(0.01, self.percentile(0.95) or 0.0)

    def state(self, now: float) -> str:
        if self.is_quarantined(now):
            return "quarantined"
        if self._failed_in_a_row < OPENS_AFTER:
            return "good" if self._answered else "untried"
        return "open" if now < self._open_until else "half_open"


class HedgeBudget:
    """At most one request in twenty more, saved up to a few for the moment when a source slows down."""

    SHARE, MOST = 0.05, 5.0

    def __init__(self) -> None:
        self._saved = 1.0

    def request(self) -> None:
        self._saved = min(self._saved + self.SHARE, self.MOST)

    def spend(self) -> bool:
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
