"""Small data types: buffers, a bounded dictionary, a histogram, and a limiter of log lines. Pure. Not for
several threads."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Buffer = bytes | memoryview
"""Bytes that are read and not changed. Large ones are memoryviews, so that they need not be copied."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """A dictionary that drops the least recently used items. The weights of all items are at most `limit`
    together. A heavier item is not kept."""

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
"""The upper bounds of the classes, in seconds."""


@dataclass(slots=True)
class Histogram:
    """Counts of durations in fixed classes, cheap enough for every call."""

    counts: list[int] = field(default_factory=([0] * (len(BOUNDS) + 1)).copy)
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def as_dict(self) -> dict[str, object]:
        """The bounds in seconds, the counts of the classes (the last one has no bound), and the sum."""
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "sum": self.sum}


class LogLimiter:
    """Limits log lines: one line for each kind of event in a time. It says how many events were left out."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """At most one event of each kind is logged in `seconds`, measured by `clock`."""
        self._seconds, self._clock = seconds, clock
        self._logged: dict[object, tuple[float, int]] = {}
        """By kind: when it was logged last, and how many events came since."""

    def admit(self, kind: object) -> str | None:
        """To be called for each event. None if this event is not to be logged. Else the text to add to its
        log line: "", or how many events were left out since the last line."""
        now = self._clock()
        since, count = self._logged.get(kind, (float("-inf"), 0))
        if now - since < self._seconds:
            self._logged[kind] = since, count + 1
            return None
        self._logged[kind] = now, 0
        return f" ({count} more like it in the {now - since:.0f} s before)" if count else ""
