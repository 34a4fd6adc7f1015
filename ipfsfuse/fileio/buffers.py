"""Buffers for what comes in large: leaves of a run. Each begins on a page, as direct writes want it, and is
used again.

A new block of memory costs more than what is then done with it: the kernel clears each page when it is first
touched (70 us of CPU for 1 MiB where pages are at hand, several times that where a virtual machine must be
given them first).

Concurrency: any thread. A buffer comes back by itself when nobody looks at it any more, whoever that was
last.
"""

import ctypes
import mmap
import weakref
from collections.abc import Iterator, Sequence

SIZES = tuple(1 << power for power in range(16, 22))
"""Of buffers that are kept: 64 KiB to 2 MiB, the largest block."""
KEPT = 16 << 20
"""Bytes of buffers that wait to be used again: what a run has in hand at a time."""


class _Pool:
    def __init__(self) -> None:
        self.waiting: dict[int, list[mmap.mmap]] = {size: [] for size in SIZES}
        self.size = 0
        """Bytes that wait. Threads may get it a little wrong at a time: nothing but how many are kept depends
        on it."""

    def take(self, size: int) -> mmap.mmap:
        try:
            pages = self.waiting[size].pop()
        except IndexError:
            return mmap.mmap(-1, size)
        self.size -= size
        return pages

    def put(self, pages: mmap.mmap, size: int) -> None:
        if self.size < KEPT:
            self.size += size
            self.waiting[size].append(pages)


_POOL = _Pool()


def lend(size: int) -> memoryview:
    """`size` bytes to write into, at least one; what stands in them is anything."""
    kept = next((each for each in SIZES if each >= size), 0)
    pages = _POOL.take(kept) if kept else mmap.mmap(-1, size)
    array = (ctypes.c_char * len(pages)).from_buffer(pages)
    if kept:  # an mmap does not say when its last view ends, an array on it does
        weakref.finalize(array, _POOL.put, pages, kept).atexit = False
    return memoryview(array).cast("B")[:size]


def is_aligned(data: memoryview, to: int) -> bool:
    """Whether `data` begins at an address and has a length that `to` divides; False where it can't be
    told."""
    if data.readonly or not data.contiguous or len(data) % to or not data:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % to == 0


TOGETHER = 4 << 20
"""Bytes of leaves that are read, verified and written together: a call in a thread costs 60 us of CPU."""
MOST_TOGETHER = 64
"""Leaves, however small."""


def together(sizes: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Where in `sizes` each stretch begins that is worth reading at once, and what it holds.

    The first is of one, the next of two: who waits for it need not wait for more."""
    start, most = 0, 1
    while start < len(sizes):
        end, left = start, TOGETHER
        while end < len(sizes) and end - start < most and (left := left - sizes[end]) >= 0:
            end += 1
        end = max(end, start + 1)
        yield start, sizes[start:end]
        start, most = end, min(2 * most, MOST_TOGETHER)


def fill(left: list[memoryview], piece: bytes) -> None:
    """Copies `piece` into the buffers that are `left`, which must have room for it, and leaves those that are
    still to fill."""
    view = memoryview(piece)
    while view:
        part = view[: len(left[0])]
        left[0][: len(part)] = part
        view = view[len(part) :]
        advance(left, len(part))


def advance(left: list[memoryview], count: int) -> None:
    """`count` more bytes of `left` are filled."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
