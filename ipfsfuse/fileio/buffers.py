"""Page-aligned buffers for large answers, used again and again.

The kernel clears each page of new memory when it is first touched. That costs 70 us of CPU for 1 MiB where
pages are at hand, and several times that where a virtual machine must be given them first: more than what is
then done with it.

Concurrency: any thread. A buffer returns by itself when its last view is gone.
"""

import contextlib
import ctypes
import mmap
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from operator import mul

SIZES = tuple(1 << power for power in range(16, 22))
"""Of buffers that are used again, in bytes: 64 KiB to 2 MiB, the largest block."""
KEPT = 32 << 20
"""Bytes of unused buffers that are kept of each size: a reader at full speed has as many on their way."""
KEPT_IN_ALL = 32 << 20
"""Bytes of them, of all sizes, beyond which those of another size go when one is made: files mostly have
leaves of one size."""
KEPT_IDLE = 8 << 20
"""Bytes of each size that `give_back` leaves."""

_unused: dict[int, deque[mmap.mmap]] = {size: deque(maxlen=KEPT // size) for size in SIZES}
"""By size. A deque that is full drops its oldest. `append` and `pop` are atomic: no Python code of ours runs
where a buffer returns, which may be anywhere."""


def lend(size: int) -> memoryview:
    """A buffer of `size` bytes, at least one, with any content."""
    at = bisect_left(SIZES, size)
    kept = SIZES[at] if at < len(SIZES) else 0
    try:
        pages = _unused[kept].pop()
    except LookupError:  # none is left, or it is larger than those that are kept
        left = sum(map(mul, _unused, map(len, _unused.values())))
        for each in reversed(SIZES):  # of other sizes there may be too many, the largest go first
            while left > KEPT_IN_ALL and each != kept and _unused[each]:
                with contextlib.suppress(IndexError):  # another thread took the last one
                    _unused[each].pop()
                left -= each
        pages = mmap.mmap(-1, kept or size)
    array = (ctypes.c_char * len(pages)).from_buffer(pages)
    if kept:  # an mmap does not say when its last view ends, an array on it does
        weakref.finalize(array, _unused[kept].append, pages).atexit = False
    return memoryview(array).cast("B")[:size]


def give_back() -> None:
    """Gives unused memory back to the system, but for a part of it. To be called every few seconds: a reader
    that is at full speed has new buffers cleared for it each time."""
    for size, pages in _unused.items():
        while len(pages) * size > KEPT_IDLE:
            with contextlib.suppress(IndexError):  # another thread took the last one
                pages.pop()


TOGETHER = 4 << 20
"""Bytes of leaves that are read, verified and written by one call: a call in a thread costs 60 us of CPU."""
MOST_TOGETHER = 64
"""Leaves, however small."""


def together(sizes: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Cuts `sizes` into stretches that are read by one call each: the index of the first, and their sizes.

    The first stretch has one leaf, the next two: a reader that waits for it need not wait for more."""
    start, most = 0, 1
    while start < len(sizes):
        end, left = start, TOGETHER
        while end < len(sizes) and end - start < most and (left := left - sizes[end]) >= 0:
            end += 1
        end = max(end, start + 1)
        yield start, sizes[start:end]
        start, most = end, min(2 * most, MOST_TOGETHER)


def advance(left: list[memoryview], count: int) -> None:
    """Removes the first `count` bytes of the buffers `left`: they are filled."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
