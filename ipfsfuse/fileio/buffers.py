"""Page-aligned buffers for large answers, which are reused.

The kernel clears each page of new memory at its first use. For 1 MiB that takes 70 us of CPU, and several
times as long if a virtual machine must get the pages first. That is more than all further work with the
buffer.

Concurrency: any thread. A buffer is free again when its last view is gone.
"""

import contextlib
import ctypes
import mmap
import weakref
from bisect import bisect_left
from collections import deque
from operator import mul

BUFFER_SIZES = tuple(1 << power for power in range(16, 22))
"""Sizes of the reused buffers, in bytes: 64 KiB to 2 MiB, the largest block."""
KEPT = 32 << 20
"""The most bytes of unused buffers of one size: a reader at full speed uses as many at a time."""
KEPT_IN_ALL = 32 << 20
"""The most bytes of unused buffers of all sizes. Beyond this, a new buffer replaces buffers of other sizes,
since files mostly have leaves of one size."""
KEPT_IDLE = 8 << 20
"""Bytes of unused buffers of each size that `give_back` keeps."""

_unused: dict[int, deque[mmap.mmap]] = {size: deque(maxlen=KEPT // size) for size in BUFFER_SIZES}
"""Unused buffers by size. A full deque drops its oldest item. `append` and `pop` are atomic, which is needed
since a buffer may be freed at any point of the program."""


def lend(size: int) -> memoryview:
    """A buffer of `size` bytes, at least one. Its content is undefined."""
    at = bisect_left(BUFFER_SIZES, size)
    kept = BUFFER_SIZES[at] if at < len(BUFFER_SIZES) else 0
    try:
        pages = _unused[kept].pop()
    except LookupError:  # none is unused, or the size is larger than the reused ones
        left = sum(map(mul, _unused, map(len, _unused.values())))
        for each in reversed(BUFFER_SIZES):  # drop buffers of other sizes, the largest first
            while left > KEPT_IN_ALL and each != kept and _unused[each]:
                with contextlib.suppress(IndexError):  # another thread took the last one
                    _unused[each].pop()
                left -= each
        pages = mmap.mmap(-1, kept or size)
    array = (ctypes.c_char * len(pages)).from_buffer(pages)
    if kept:  # an mmap can't tell when its last view is gone, an array over it can
        weakref.finalize(array, _unused[kept].append, pages).atexit = False
    return memoryview(array).cast("B")[:size]


def give_back() -> None:
    """Gives most unused memory back to the system. Call it only every few seconds: a reader at full speed
    then needs new buffers, which the kernel has to clear."""
    for size, pages in _unused.items():
        while len(pages) * size > KEPT_IDLE:
            with contextlib.suppress(IndexError):  # another thread took the last one
                pages.pop()


def advance(left: list[memoryview], count: int) -> None:
    """Removes the first `count` bytes of the buffers `left`, which are filled."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
