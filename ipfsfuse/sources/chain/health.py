"""How one source has done lately, and what follows from it.

Pure: told what happened and when, it answers with decisions; the caller waits, asks and logs. The clock's seconds and
the chance for jitter are handed in. Not for several threads.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass

OPENS_AFTER = 3
"""Failures in a row after which a source rests. One in three at random does so once in 27."""
FIRST_REST, LONGEST_REST = 0.5, 10.0
LONGEST_ASKED_REST = 600.0
"""A Retry-After beyond it is not believed."""
FIRST_ASIDE, LONGEST_ASIDE = 600.0, 86_400.0
SAMPLES = 256
SORT_EVERY = 16
"""Answers between two looks at the percentiles: sorting 256 takes 15 us, a tenth of a small block's whole cost."""
ENOUGH = 20
"""With fewer answers than that a percentile says little."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """One source, for people and for JSON."""

    name: str
    state: str
    """untried (has not answered yet), good, resting (failed, asked again soon), trial (one request finds
    out), aside (sent wrong bytes)."""
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


class Health:
    """`may_aside` for a source that is set aside for wrong bytes (a remote gateway); `slow` is what its 95th percentile
    is taken for, in seconds, before there is one; `answered` for a source that was seen to be well when it
    was opened."""

    def __init__(self, chance: random.Random, *, may_aside: bool, slow: float, answered: bool = False) -> None:
        self._chance = chance
        self._may_aside = may_aside
        self._slow = slow
        self._times: deque[float] = deque(maxlen=SAMPLES)
        self._sorted: list[float] = []
        self._unsorted = 0
        self._row = 0
        self._rest_until = self._aside_until = float("-inf")
        self._next_aside = FIRST_ASIDE
        self._trial = False
        self._answered = answered
        self.why = ""
        self.requests = self.blocks = self.bytes = self.absent = self.wrong_blocks = self.hedges = 0
        self.failures: Counter[str] = Counter()

    # -- what happened ------------------------------------------------------------------------------------------

    def asked(self, now: float, *, hedge: bool = False) -> None:
        self.requests += 1
        self.hedges += hedge
        self._trial = self._row >= OPENS_AFTER and now >= self._rest_until

    def gave(self, seconds: float, size: int) -> None:
        """A verified block. `seconds` is the time it took, negative where it says nothing (one of a run)."""
        self.blocks += 1
        self.bytes += size
        self._well()
        if seconds >= 0:
            self._times.append(seconds)
            self._unsorted += 1
            if self._unsorted >= SORT_EVERY or len(self._times) <= ENOUGH:
                self._sorted = sorted(self._times)
                self._unsorted = 0

    def lacked(self) -> None:
        """An answer, even if not a block: the source is well."""
        self.absent += 1
        self._well()

    def _well(self) -> None:
        self._answered = True
        self._row = 0
        self._trial = False
        self.why = ""

    def failed(self, now: float, kind: str, why: str, retry_after: float | None = None) -> None:
        self.failures[kind] += 1
        self.why = why
        self._row += 1
        self._trial = False
        if retry_after is not None:
            self._row = max(self._row, OPENS_AFTER)
            self._rest_until = max(self._rest_until, now + min(retry_after, LONGEST_ASKED_REST))
        elif self._row >= OPENS_AFTER:
            rest = min(FIRST_REST * 2 ** min(self._row - OPENS_AFTER, 10), LONGEST_REST)
            self._rest_until = now + rest * self._chance.uniform(0.5, 1.0)

    def left(self) -> None:
        """A request ended without a word about the source: it was not needed any more."""
        self._trial = False

    def wrong(self, now: float, *, others: bool) -> float | None:
        """Bytes that do not match. Seconds for which the source is now set aside, 0 if it was already (this request had
        been on its way); None if it loses this block alone."""
        self.wrong_blocks += 1
        self._answered = True
        self._trial = False
        if self.is_aside(now):
            return 0.0
        if not self._may_aside or not others:
            return None
        aside, self._next_aside = self._next_aside, min(2 * self._next_aside, LONGEST_ASIDE)
        self._aside_until = now + aside
        self.why = "sent wrong bytes"
        return aside

    # -- what follows -------------------------------------------------------------------------------------------

    def is_aside(self, now: float) -> bool:
        return now < self._aside_until

    def wait(self, now: float) -> float:
        """Seconds until it may be asked: 0 for now. After a rest one request at a time finds out."""
        if self._row < OPENS_AFTER:
            return 0.0
        if now < self._rest_until:
            return self._rest_until - now
        return 0.1 if self._trial else 0.0

    def percentile(self, share: float) -> float | None:
        found = self._sorted
        return found[min(int(share * len(found)), len(found) - 1)] if found else None

    def slow_after(self) -> float:
        """Seconds after which an answer is late: the 95th percentile, at least 10 ms."""
        found = self.percentile(0.95) if len(self._times) >= ENOUGH else None
        return max(0.01, self._slow if found is None else found)

    def state(self, now: float) -> str:
        if self.is_aside(now):
            return "aside"
        if self._row < OPENS_AFTER:
            return "good" if self._answered else "untried"
        return "resting" if now < self._rest_until else "trial"

    def statistics(self, name: str, now: float) -> Statistics:
        state = self.state(now)
        return Statistics(
            name, state, self.why if state != "good" else "", self.requests, self.blocks, self.bytes, self.absent, dict(self.failures),
            self.wrong_blocks, self.hedges, self.percentile(0.5), self.percentile(0.95),
        )  # fmt: skip


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
