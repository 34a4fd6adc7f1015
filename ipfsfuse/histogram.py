"""Counts of durations in fixed classes, cheap enough for every call. Pure. Not for several threads."""

from bisect import bisect_left

BOUNDS = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)
"""Seconds."""


class Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def as_dict(self) -> dict[str, object]:
        """The bounds in seconds, the number in each class (one more than bounds), and the sum."""
        return {"bounds": list(BOUNDS), "counts": list(self.counts), "sum": self.sum}
