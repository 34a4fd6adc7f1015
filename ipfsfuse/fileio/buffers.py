"""Page-aligned buffers for large answers, which are reused.

The kernel clears each page of new memory at its first use. For 1 MiB that takes 70 us of CPU, and several
times as long if a virtual machine must get the pages first. That is more than all further work with the
buffer.

Large buffers are parts of huge pages if the kernel has some: for direct I/O it pins and submits each page.

Concurrency: any thread. A buffer is free again when its last view is gone.
"""

import contextlib
import ctypes
import mmap
import weakref
from bisect import bisect_left
from collections import deque
from operator import mul
from typing import Any

BUFFER_SIZES = tuple(1 << power for power in range(16, 22))
"""Sizes of the reused buffers, in bytes: 64 KiB to 2 MiB, the largest block."""
KEPT = 32 << 20
"""The most bytes of unused buffers of one size: a reader at full speed uses as many at a time."""
KEPT_IN_ALL = 32 << 20
"""The most bytes of unused buffers of all sizes. Beyond this, a new buffer replaces buffers of other sizes,
since files mostly have leaves of one size."""
KEPT_IDLE = 8 << 20
"""Bytes of unused buffers of each size that `give_back` keeps."""

HUGE_PAGE = 2 << 20
"""Bytes of a huge page. On machines where it is larger, buffers are in small pages."""
_IN_HUGE_PAGES = 256 << 10
"""Buffers of at least this size are parts of a huge page. It is freed when none of them is used or kept."""

_unused: "dict[int, deque[_Unused]]" = {size: deque(maxlen=KEPT // size) for size in BUFFER_SIZES}
"""Unused buffers by size. A full deque drops its oldest item. `append` and `pop` are atomic, which is needed
since a buffer may be freed at any point of the program."""


def lend(size: int) -> memoryview:
    """A buffer of `size` bytes, at least one. Its content is undefined."""
    at = bisect_left(BUFFER_SIZES, size)
    kept = BUFFER_SIZES[at] if at < len(BUFFER_SIZES) else 0
    if not kept:
        return memoryview(mmap.mmap(-1, size))
    try:
        pages = _unused[kept].pop().pages
    except LookupError:
        pages = _new(kept)
    array = (ctypes.c_char * kept).from_buffer(pages)
    returned = _Unused(array, _unused[kept].append)  # no Python code runs then: Ctrl-C in it would be lost
    returned.pages = pages
    array.returned = returned  # type: ignore[attr-defined] # kept as long as the array
    return memoryview(array).cast("B")[:size]


class _Unused(weakref.ref[Any]):
    """Unused pages. While they are lent, refers to the array over them, and is not in `_unused`."""

    __slots__ = ("pages",)
    pages: memoryview


def _new(kept: int) -> memoryview:
    """A buffer of a size in BUFFER_SIZES. Makes room for it, and the rest of its huge page is unused."""
    if kept < _IN_HUGE_PAGES:
        pages = memoryview(mmap.mmap(-1, kept))
    else:
        whole = in_huge_pages(HUGE_PAGE)
        pages = whole[:kept]
        for start in range(kept, HUGE_PAGE, kept):
            rest = _Unused(whole)
            rest.pages = whole[start : start + kept]
            _unused[kept].append(rest)
    left = sum(map(mul, _unused, map(len, _unused.values())))
    for each in reversed(BUFFER_SIZES):  # drop buffers of other sizes, the largest first
        while left > KEPT_IN_ALL and each != kept and _unused[each]:
            with contextlib.suppress(IndexError):  # another thread took the last one
                _unused[each].pop()
            left -= each
    return pages


def in_huge_pages(size: int) -> memoryview:
    """`size` bytes of new memory, which begin where a huge page can begin. It is freed with its last view."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[start : start + size]


def give_back() -> None:
    """Gives most unused memory back to the system. Call it only every few seconds: a reader at full speed
    then needs new buffers, which the kernel has to clear."""
    for size, unused in _unused.items():
        taken: list[_Unused] = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(unused.pop())
        taken.sort(key=lambda each: id(each.pages.obj))  # keep whole huge pages
        unused.extend(taken[: KEPT_IDLE // size])


def advance(left: list[memoryview], count: int) -> None:
    """Removes the first `count` bytes of the buffers `left`, which are filled."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
