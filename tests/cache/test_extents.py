"""Intervals, compared with a set of numbers."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.cache.store.staging import Extents

positions = st.integers(0, 30)


@given(st.lists(st.tuples(st.booleans(), positions, positions)), positions, positions)
def test_extents_hold_the_same_numbers_as_a_set(
    steps: list[tuple[bool, int, int]], start: int, end: int
) -> None:
    extents, numbers = Extents(), set[int]()
    for add, low, high in steps:
        (extents.add if add else extents.remove)(low, high)
        numbers = numbers | set(range(low, high)) if add else numbers - set(range(low, high))
    intervals = list(extents)
    assert {number for low, high in intervals for number in range(low, high)} == numbers
    assert all(low < high for low, high in intervals)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(intervals))
    if start < end:
        assert extents.covers(start, end) == (set(range(start, end)) <= numbers)
