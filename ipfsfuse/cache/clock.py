"""When things were used last, by a clock that nobody sets.

In memory a time is the machine's: seconds since it was started, sleep included (CLOCK_BOOTTIME). People and
disks are told the wall clock's time of it, as that clock stands when they are told. So a wall clock that is
set, forwards or backwards, changes no order and makes no duration negative."""

import time
from collections.abc import Sequence

SET = 0.5
"""Seconds by which the wall clock must differ from the machine's to be taken for set. Less is how long we
took to look."""

_start = float("-inf")
"""The wall clock's time at the start of the machine."""


def now() -> float:
    """The machine's time, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def to_wall(moment: float) -> float:
    """Seconds since 1970 of a moment of the machine's time: of one moment the same, until the wall clock is
    set."""
    global _start
    start = time.time() - now()
    if abs(start - _start) > SET:
        _start = start
    return max(0.0, _start + moment)


def from_wall(whens: Sequence[float]) -> list[float]:
    """The machine's times of what was written with the wall clock's, the earliest first; their order is kept.
    What lies in the future was written before the wall clock was set back: that is taken for now."""
    machine, wall = now(), time.time()
    latest = machine - len(whens) * 1e-6
    return [min(machine - (wall - when), latest + number * 1e-6) for number, when in enumerate(whens, 1)]
