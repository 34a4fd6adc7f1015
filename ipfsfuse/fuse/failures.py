"""A line in the log for calls that failed: each kind with its cause, at a bounded rate.

Concurrency: the event loop's.
"""

import errno
import logging
import time
from collections.abc import Callable

from ipfsfuse import errors

log = logging.getLogger("ipfsfuse.fuse")

EVERY = 10.0
"""Seconds in which one kind of failure is logged once."""
LONGEST = 2000
"""Characters of one line."""

ORDINARY = (
    errors.NotFound, errors.NotACid, errors.NotADirectory, errors.IsADirectory, errors.NotALink,
    errors.NameTooLong, errors.ReadOnly, errors.Interrupted,
)  # fmt: skip
"""What callers do every day and nobody need look into."""


class FailureLog:
    """Logs failures by their kind, which is the exception's type."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: dict[type[BaseException], tuple[float, int]] = {}
        """When a kind was logged last, and how many there were since."""

    def note(self, exc: BaseException, number: int, *, foreseen: bool = True) -> None:
        """A call is answered with the errno `number` because of `exc`. What was not `foreseen` is logged with
        its traceback."""
        if isinstance(exc, ORDINARY):
            return
        kind, now = type(exc), self._clock()
        since, count = self._logged.get(kind, (float("-inf"), 0))
        if now - since < EVERY:
            self._logged[kind] = since, count + 1
            return
        self._logged[kind] = now, 0
        more = f" ({count} more like it in the {now - since:.0f} s before)" if count else ""
        answer = errno.errorcode.get(number, str(number))
        if foreseen:
            log.warning("a call was answered %s: %s%s", answer, _one_line(str(exc)), more)
        else:
            log.error(
                "a call was answered %s: it failed in a way that no one foresaw%s", answer, more, exc_info=exc
            )


def _one_line(text: str) -> str:
    """What a source said may hold anything: on one line, and nothing that a terminal would act on."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text[:LONGEST])


failures = FailureLog()
"""Of this process, which serves one mount."""
