"""Page-aligned buffers for large answers, used again and again.

The kernel clears each page of new memory when it is first touched. That costs 70 us of CPU for 1 MiB where
pages are at hand, and several times that where a virtual machine must be given them first: more than what is
then done with it.

Concurrency: any thread. A buffer returns by itself when its last view is gone.
"""

import ctypes
import mmap
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence

SIZES = tuple(1 << power for power in range(16, 22))
"""Of buffers that are used again, in bytes: 64 KiB to 2 MiB, the largest block."""
KEPT = 16 << 20
"""Bytes of unused buffers that are kept: as much as one range of leaves needs at a time."""


class _Pool:
    def __init__(self) -> None:
        self.unused: dict[int, list[mmap.mmap]] = {size: [] for size in SIZES}
        self.size = 0
        """Bytes of unused buffers. Threads may miscount it a little: only how many are kept depends on it."""

    def put(self, pages: mmap.mmap, size: int) -> None:
        if self.size < KEPT:
            self.size += size
            self.unused[size].append(pages)


_POOL = _Pool()


def lend(size: int) -> memoryview:
    """A buffer of `size` bytes, at least one, with any content."""
    at = bisect_left(SIZES, size)
    kept = SIZES[at] if at < len(SIZES) else 0
    try:
        pages = _POOL.unused[kept].pop()
        _POOL.size -= kept
    except LookupError:  # none is left, or it is larger than those that are kept
        pages = mmap.mmap(-1, kept or size)
    array = (ctypes.c_char * len(pages)).from_buffer(pages)
    if kept:  # an mmap does not say when its last view ends, an array on it does
        weakref.finalize(array, _POOL.put, pages, kept).atexit = False
    return memoryview(array).cast("B")[:size]


def is_aligned(data: memoryview, to: int) -> bool:
    """Whether the address and the length of `data` are multiples of `to`; False where that can't be told."""
    if data.readonly or not data.contiguous or len(data) % to or not data:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % to == 0


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


def fill(left: list[memoryview], piece: bytes) -> None:
    """Copies `piece` into the buffers `left`, which must have room for it, and removes what is full."""
    view = memoryview(piece)
    while view:
        part = view[: len(left[0])]
        left[0][: len(part)] = part
        view = view[len(part) :]
        advance(left, len(part))


def advance(left: list[memoryview], count: int) -> None:
    """Removes the first `count` bytes of the buffers `left`: they are filled."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
