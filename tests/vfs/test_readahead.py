"""The read-ahead policy and the bounded dictionary."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.structures import Lru
from ipfsfuse.vfs.open_file import MAX_WINDOW, MIN_WINDOW, SEQUENTIAL_SLACK, ReadAhead

GIB = 1 << 30
STEP = 128 << 10


def test_one_read_fetches_nothing_ahead() -> None:
    assert ReadAhead(GIB).note(0, 1) is None
    assert ReadAhead(GIB).note(GIB // 2, 4096) is None


def test_the_second_read_in_order_begins_a_window_and_windows_grow_to_the_largest() -> None:
    ahead = ReadAhead(GIB)
    windows = [w for at in range(0, 256 << 20, STEP) if (w := ahead.note(at, STEP))]
    assert windows[0] == (2 * STEP, MIN_WINDOW)
    assert windows[-1].size == MAX_WINDOW
    assert all(a.start + a.size == b.start for a, b in itertools.pairwise(windows))


def test_random_reads_far_apart_fetch_nothing_ahead() -> None:
    ahead = ReadAhead(GIB)
    assert all(ahead.note(at * 37_000_003 % GIB, 4096) is None for at in range(100))


def test_reads_that_the_kernel_swapped_count_as_sequential() -> None:
    ahead = ReadAhead(GIB)
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    assert any(ahead.note(at * STEP, STEP) for at in order)


@given(st.integers(1, 1 << 40), st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20))))
def test_windows_lie_within_the_file_and_are_bounded(size: int, reads: list[tuple[int, int]]) -> None:
    ahead = ReadAhead(size)
    for offset, length in reads:
        window = ahead.note(offset % size, length)
        if window:
            assert 0 < window.size <= MAX_WINDOW
            assert window.start + window.size <= size
    assert SEQUENTIAL_SLACK < MAX_WINDOW


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40))))
def test_the_bounded_dictionary_never_holds_more_than_its_limit_and_drops_the_least_used(
    steps: list[tuple[int, int]],
) -> None:
    lru: Lru[int, int] = Lru(100)
    model: dict[int, int] = {}
    for key, weight in steps:
        if weight == 0:
            assert (lru.get(key) is not None) == (key in model)
            if key in model:
                model[key] = model.pop(key)
            continue
        model.pop(key, None)
        lru.put(key, key, weight)
        model[key] = weight
        while sum(model.values()) > 100:
            del model[next(iter(model))]
    assert len(lru) == len(model)


def test_an_item_that_is_too_heavy_is_not_kept_and_replaces_no_other() -> None:
    lru: Lru[str, int] = Lru(10)
    lru.put("a", 1, 5)
    lru.put("b", 2, 11)
    assert (lru.get("a"), lru.get("b")) == (1, None)
