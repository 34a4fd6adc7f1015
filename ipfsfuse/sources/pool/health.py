"""The recent successes and failures of one source, and whether it may be asked now.

Pure: it is told what happened and when, and makes decisions. The caller waits, asks and logs. Times are
seconds of the caller's clock; the random numbers for jitter are passed in. Not thread-safe.
"""

import math
import random
from collections import Counter, deque
from dataclasses import dataclass

from ipfsfuse.structures import Histogram

OPENS_AFTER = 3
"""Failures in a row after which a source is not asked for a while. If one request in three fails at random,
three in a row fail once in 27."""
FIRST_OPEN_SECONDS, LONGEST_OPEN_SECONDS = 0.5, 10.0
LONGEST_RETRY_AFTER = 600.0
"""Seconds of the longest pause that a server can ask for."""
FIRST_QUARANTINE, LONGEST_QUARANTINE = 600.0, 86_400.0
LONGEST_PROBE = 1.0
"""Seconds for which the request that probes a failed source keeps other requests from it. A longer wait would
be wrong, because the probe may be for a block that nobody has."""
SAMPLES = 256
SORT_EVERY = 16
"""The percentiles are computed after so many answers: sorting 256 takes 15 us, a tenth of the whole cost of a
small block."""
MIN_SAMPLES = 20
"""With fewer answers, a percentile says little."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What `status` shows of one source."""

    name: str
    state: str
    """untried (has not answered yet), good, open (failed, not asked for a while), half_open (one request
    finds out whether it is back), quarantined (sent wrong bytes)."""
    why: str
    """The message of the last failure, while the state is not good."""
    requests: int
    blocks: int
    bytes: int
    absent: int
    """How often it did not have the block."""
    failures: dict[str, int]
    """By kind."""
    wrong: int
    hedges: int
    """How often it was asked because another source was slow."""
    median: float | None
    """Seconds until a block came, over the last 256."""
    p95: float | None
    in_flight: int = 0
    """Requests that it is answering now."""
    waiting: int = 0
    """Requests that wait in our queue for it."""
    most_in_flight: int = 0
    """The most requests at a time; lowered when the source answers that it is busy. 0 for no limit
    (files)."""
    most_per_caller: int = 0
    """The most requests at a time of one caller (user id)."""
    found: bool = False
    """Whether a router named the source, and not the user."""
    in_place: bool = False
    """Whether it is files on this machine: the library, or a CAR file."""


class Health:
    """The health of one source (a circuit breaker with quarantine).

    `may_quarantine`: whether wrong bytes quarantine it (a remote gateway). `slow`: seconds that stand for the
    95th percentile until there are enough answers. `answered`: whether opening the source has shown that it
    works."""

    def __init__(
        self, rng: random.Random, *, may_quarantine: bool, slow: float, answered: bool = False
    ) -> None:
        self._rng = rng
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
        """A verified block came. `seconds` is the time that it took; negative if that is unknown because many
        blocks came in one answer."""
        self.blocks += 1
        self.bytes += size
        self._answered, self._failed_in_a_row, self._probed_at, self.why = True, 0, -math.inf, ""
        if seconds >= 0:
            self.latencies.add(seconds)
            self._times.append(seconds)
            self._unsorted += 1
            if self._unsorted >= SORT_EVERY or len(self._times) <= MIN_SAMPLES:
                self._sorted = sorted(self._times)
                self._unsorted = 0

    def record_miss(self) -> None:
        """The source answered that it does not have the block: it works."""
        self.absent += 1
        self._answered, self._failed_in_a_row, self._probed_at, self.why = True, 0, -math.inf, ""

    def record_failure(self, now: float, kind: str, why: str, retry_after: float | None = None) -> None:
        """`retry_after`: seconds of the pause that the source asked for."""
        self.failures[kind] += 1
        self.why = why
        self._failed_in_a_row += 1
        self._failed_at = now
        self._probed_at = -math.inf
        if retry_after is not None and retry_after >= 0:  # false for NaN
            self._failed_in_a_row = max(self._failed_in_a_row, OPENS_AFTER)
            self._open_until = max(self._open_until, now + min(retry_after, LONGEST_RETRY_AFTER))
        elif self._failed_in_a_row >= OPENS_AFTER:
            pause = min(
                FIRST_OPEN_SECONDS * 2 ** min(self._failed_in_a_row - OPENS_AFTER, 10), LONGEST_OPEN_SECONDS
            )
            self._open_until = now + pause * self._rng.uniform(0.5, 1.0)

    def record_too_many(self) -> None:
        """The source is busy with other requests of ours. It works, and the limiter sends it fewer at a
        time."""
        self._answered = True
        self.failures["busy"] += 1

    def record_cancelled(self) -> None:
        """A request ended that says nothing about the source, because it was cancelled."""
        self._probed_at = -math.inf

    def record_wrong(self, now: float, *, others: bool) -> float | None:
        """Wrong bytes came. Returns the seconds for which the source is now quarantined; 0 if it was already
        quarantined (this request was made before); None if it is not quarantined. `others`: whether another
        source can be asked instead."""
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
        """The machine slept for so long while the clock stood still. For the source that time has passed."""
        self._failed_at -= seconds
        self._open_until -= seconds
        self._quarantined_until -= seconds
        self._probed_at -= seconds

    # -- what follows ----------------------------------------------------------------------------------------

    def is_quarantined(self, now: float) -> bool:
        return now < self._quarantined_until

    def wait(self, now: float, longest: float = math.inf) -> float:
        """Seconds until the source may be asked; 0 means now. After a pause, one request at a time probes it.

        `longest`: the most seconds to pause after a failure, for a source without alternatives."""
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
        answers: the time of the slowest of them, at least `slow`."""
        if len(self._times) < MIN_SAMPLES:
            return max(0.01, self._slow, *self._times)
        return max(0.01, self.percentile(0.95) or 0.0)

    def state(self, now: float) -> str:
        if self.is_quarantined(now):
            return "quarantined"
        if self._failed_in_a_row < OPENS_AFTER:
            return "good" if self._answered else "untried"
        return "open" if now < self._open_until else "half_open"


class HedgeBudget:
    """Allows one hedged request for each twenty requests. Saves up to MOST of them for when a source slows
    down."""

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
