"""Buffers that are lent: each begins on a page, and has one borrower at a time."""

import ctypes
import gc
import random
import sys
from pathlib import Path

import pytest

from ipfsfuse.fileio import buffers


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_a_buffer_has_the_size_that_was_asked_for_and_begins_on_a_page() -> None:
    for size in (1, 4096, 65_536, 65_537, 1 << 20, (2 << 20) + 1, 5 << 20):
        lent = buffers.lend(size)
        assert (len(lent), lent.readonly) == (size, False)
        assert address(lent) % 4096 == 0
        lent[:] = bytes(size)


@pytest.mark.parametrize("size", [256 << 10, 512 << 10, 1 << 20, 2 << 20])
def test_large_buffers_are_parts_of_huge_pages(size: int) -> None:
    parts = buffers.HUGE_PAGE // size
    # other parts of unused buffers' pages may be lent to what an earlier test left behind
    buffers._unused[size].clear()
    lent = [buffers.lend(size) for _ in range(4 * parts)]
    starts = [address(each) for each in [*lent, *(each.pages for each in buffers._unused[size])]]
    assert {start % size for start in starts} == {0}
    assert len(set(starts)) == len(starts), "each has one borrower"
    pages = {start // buffers.HUGE_PAGE for start in map(address, lent)}
    assert sum(start // buffers.HUGE_PAGE in pages for start in starts) == parts * len(pages)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this kernel has no transparent huge pages",
)
def test_the_kernel_is_asked_for_huge_pages() -> None:
    memory = buffers.in_huge_pages(5 << 20)
    assert (len(memory), address(memory) % buffers.HUGE_PAGE) == (5 << 20, 0)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *flags = line.split()
        if "-" in first:
            low, high = (int(each, 16) for each in first.split("-"))
            inside = low <= address(memory) < high
        elif inside and first == "VmFlags:":
            assert "hg" in flags
            return
    raise AssertionError("the memory has no mapping")


def test_a_buffer_is_lent_again_only_after_its_last_view_is_gone() -> None:
    first = buffers.lend(1 << 20)
    first[:4] = b"mark"
    part = first[:4]
    del first
    others = [buffers.lend(1 << 20) for _ in range(32)]
    for other in others:
        other[:4] = b"over"
    assert part == b"mark"
    del part, other
    gc.collect()
    again = [buffers.lend(1 << 20) for _ in range(32)]
    assert any(each[:4] == b"mark" for each in again)
    assert all(each[:4] != b"over" for each in again), "the other buffers are in use"


def test_the_number_of_unused_buffers_of_each_size_is_limited() -> None:
    lent = [buffers.lend(1 << 20) for _ in range(64)]
    lent.clear()
    assert {size: len(pages) for size, pages in buffers._unused.items() if pages}[1 << 20] == 32
    assert all(size * len(pages) <= buffers.KEPT for size, pages in buffers._unused.items())


def test_unused_buffers_of_other_sizes_are_freed_when_a_new_one_is_made() -> None:
    lent = [buffers.lend(size) for size in buffers.BUFFER_SIZES for _ in range(buffers.KEPT // size)]
    lent.clear()
    assert sum(size * len(pages) for size, pages in buffers._unused.items()) == 6 * buffers.KEPT
    lent = [buffers.lend(1 << 20) for _ in range(33)]
    assert sum(size * len(pages) for size, pages in buffers._unused.items()) <= buffers.KEPT_IN_ALL
    lent.clear()
    assert len(buffers._unused[1 << 20]) == 32


def test_give_back_frees_most_unused_buffers() -> None:
    lent = [buffers.lend(size) for size in buffers.BUFFER_SIZES for _ in range(buffers.KEPT // size)]
    random.Random(1).shuffle(lent)
    lent.clear()
    buffers.give_back()
    assert {size * len(pages) for size, pages in buffers._unused.items()} == {buffers.KEPT_IDLE}
    kept = buffers._unused[1 << 20]
    assert len({address(each.pages) // buffers.HUGE_PAGE for each in kept}) == len(kept) // 2, (
        "whole huge pages are kept"
    )


def test_no_python_code_runs_when_a_buffer_is_returned() -> None:
    """Python would drop the KeyboardInterrupt of a Ctrl-C in such code."""
    calls = []
    lent = [buffers.lend(1 << 20) for _ in range(3)]
    sys.setprofile(lambda _frame, event, _argument: calls.append(event))
    lent.clear()
    sys.setprofile(None)
    assert "call" not in calls
