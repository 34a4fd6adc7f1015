"""One line in the log for each kind of event now and then, however often it comes."""

from collections.abc import Callable


class LogLimiter:
    """Says which events are logged, and how many like them were not."""

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
