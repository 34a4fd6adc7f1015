"""Small data structures: a dictionary that is bounded, counts for metrics, and one log line for each kind of
event. Pure. Not for several threads."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """A dictionary that drops what was used least recently. All items weigh at most `limit` together. One
    that is heavier is not kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        found = self._items.get(key)
        if found is None:
            return None
        self._items.move_to_end(key)
        return found[0]

    def clear(self) -> None:
        self._items.clear()
        self._weight = 0

    def put(self, key: K, value: V, weight: int = 1) -> None:
        old = self._items.pop(key, None)
        self._weight -= old[1] if old else 0
        if weight > self._limit:
            return
        self._items[key] = (value, weight)
        self._weight += weight
        while self._weight > self._limit:
            self._weight -= self._items.popitem(last=False)[1][1]


BOUNDS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)
"""Seconds."""


@dataclass(slots=True)
class Histogram:
    """Counts of durations in fixed classes, cheap enough for every call."""

    counts: list[int] = field(default_factory=([0] * (len(BOUNDS) + 1)).copy)
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def as_dict(self) -> dict[str, object]:
        """The bounds in seconds, the number in each class (one more than bounds), and the sum."""
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "sum": self.sum}


class LogLimiter:
    """Says which events are logged, and how many like them were not: one line for each kind now and then."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """One event of a kind is logged in `seconds`, by `clock`."""
        self._seconds, self._clock = seconds, clock
        self._logged: dict[object, tuple[float, int]] = {}
        """By kind, which is hashable: when it was logged last, and how often it came since."""

    def admit(self, kind: object) -> str | None:
        """The end of the line for an event of this kind: "", or how many were left out since the last line.
        None if this one is left out too."""
        now = self._clock()
        since, count = self._logged.get(kind, (float("-inf"), 0))
        if now - since < self._seconds:
            self._logged[kind] = since, count + 1
            return None
        self._logged[kind] = now, 0
        return f" ({count} more like it in the {now - since:.0f} s before)" if count else ""
