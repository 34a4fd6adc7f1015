"""What waits for a reader: how long, and what he may take unasked."""

from ipfsfuse.cache.base import Content
from ipfsfuse.vfs.open_file import BEHIND, UNSEEN, BufferBudget, PrefetchBuffer

LEAF = 1 << 20


class Windows:
    """Notes what a reader could get."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, bool]] = {}

    def add(self, offset: int, content: Content, told: bool) -> None:
        assert offset not in self.held
        self.held[offset] = len(content), told

    def remove(self, offset: int) -> None:
        del self.held[offset]


def filled(size: int, budget: BufferBudget) -> tuple[PrefetchBuffer, Windows]:
    """A file of `size` bytes, all of which has filled."""
    windows = Windows()
    buffer = PrefetchBuffer(budget, size, windows)
    for offset in range(0, size, LEAF):
        buffer.put(offset, bytes(min(LEAF, size - offset)))
    return buffer, windows


def test_what_waits_is_added_and_removed_with_it() -> None:
    buffer, windows = filled(3 * LEAF, BufferBudget())
    buffer.put(0, bytes(LEAF))
    assert list(windows.held) == [0, LEAF, 2 * LEAF]
    buffer.drop(LEAF)
    assert list(windows.held) == [0, 2 * LEAF]
    buffer.passed(LEAF + BEHIND)
    assert list(windows.held) == [2 * LEAF]
    buffer.close()
    assert not windows.held


def test_one_leaf_in_some_and_the_last_are_told_of() -> None:
    size = 2 * UNSEEN + LEAF + 100
    _buffer, windows = filled(size, BufferBudget())
    assert {offset for offset, (_size, told) in windows.held.items() if told} == {
        UNSEEN - LEAF,
        2 * UNSEEN - LEAF,
        2 * UNSEEN + LEAF,
    }


def test_what_finds_no_room_is_added_nowhere() -> None:
    budget = BufferBudget(2 * LEAF)
    buffer, windows = filled(3 * LEAF, budget)
    assert len(buffer.leaves) == len(windows.held) == 2
    buffer.clear()
    assert budget.left == 2 * LEAF


def test_what_comes_after_the_end_is_not_kept() -> None:
    buffer, windows = filled(LEAF, BufferBudget())
    buffer.close()
    buffer.put(0, bytes(LEAF))
    assert not len(buffer.leaves)
    assert not windows.held
