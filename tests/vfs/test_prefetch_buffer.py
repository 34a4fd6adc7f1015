"""What waits for a reader: how long, and what he may take unasked."""

from ipfsfuse.cache.base import Content
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.vfs.open_file import BEHIND, UNSEEN, BufferBudget, PrefetchBuffer
from tests.sources.content import raw_blocks

LEAF = 1 << 20
(CID,) = raw_blocks(10, 1)


class Windows:
    """Notes what a reader could get."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, bool]] = {}
        self.expected: set[int] = set()

    def expect(self, offset: int, _size: int) -> None:
        self.expected.add(offset)

    def add(self, offset: int, content: Content, told: bool) -> None:
        assert offset not in self.held
        self.held[offset] = len(content), told
        self.expected.discard(offset)

    def remove(self, offset: int) -> None:
        self.held.pop(offset, None)
        self.expected.discard(offset)

    def allow(self, *_arguments: object) -> None:
        raise NotImplementedError


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


def leaves(*offsets: int) -> list[Leaf]:
    return [Leaf(CID, offset, LEAF) for offset in offsets]


def test_what_is_fetched_is_expected_until_it_is_there_or_given_up() -> None:
    windows = Windows()
    buffer = PrefetchBuffer(BufferBudget(2 * LEAF), 100 * LEAF, windows)
    buffer.put(0, bytes(LEAF))
    coming = leaves(0, LEAF, 2 * LEAF, UNSEEN - LEAF, UNSEEN)
    buffer.expect(coming)
    assert windows.expected == {LEAF, 2 * LEAF, UNSEEN}, "one is there, and Python has to see one"
    buffer.put(LEAF, bytes(LEAF))
    assert (windows.expected, set(windows.held)) == ({2 * LEAF, UNSEEN}, {0, LEAF})
    buffer.put(2 * LEAF, bytes(LEAF))
    assert (windows.expected, set(windows.held)) == ({UNSEEN}, {0, LEAF}), "there was no room"
    buffer.give_up(coming)
    assert (windows.expected, set(windows.held)) == (set(), {0, LEAF})


def test_nothing_is_expected_after_the_end() -> None:
    windows = Windows()
    buffer = PrefetchBuffer(BufferBudget(), 100 * LEAF, windows)
    buffer.close()
    buffer.expect(leaves(*range(0, 2 * UNSEEN, LEAF)))
    assert not windows.expected


def test_of_a_short_window_nothing_is_expected() -> None:
    windows = Windows()
    buffer = PrefetchBuffer(BufferBudget(), 100 * LEAF, windows)
    buffer.expect(leaves(*range(0, UNSEEN, LEAF)))
    assert not windows.expected
    buffer.expect(leaves(*range(0, UNSEEN + LEAF, LEAF)))
    assert windows.expected == set(range(0, UNSEEN + LEAF, LEAF)) - {UNSEEN - LEAF}
