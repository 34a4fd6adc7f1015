"""Buffers that are lent: each begins on a page, and has one borrower at a time."""

import ctypes
import gc

from ipfsfuse.fileio import buffers


def test_a_buffer_has_the_size_that_was_asked_for_and_begins_on_a_page() -> None:
    for size in (1, 4096, 65_536, 65_537, 1 << 20, (2 << 20) + 1, 5 << 20):
        lent = buffers.lend(size)
        assert (len(lent), lent.readonly) == (size, False)
        assert ctypes.addressof(ctypes.c_char.from_buffer(lent)) % 4096 == 0
        lent[:] = bytes(size)


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
    lent.clear()
    buffers.give_back()
    assert {size * len(pages) for size, pages in buffers._unused.items()} == {buffers.KEPT_IDLE}
