"""Leaves that wait in memory for a reader: how long they stay, and which reads C may answer from them."""

from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.structures import Buffer
from ipfsfuse.vfs.open_file import BEHIND, UNSEEN, BufferBudget, PrefetchBuffer
from tests.sources.content import raw_blocks

LEAF = 1 << 20
(CID,) = raw_blocks(10, 1)


class Windows:
    """Read windows that note what C could give to a reader."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, bool]] = {}
        self.expected: set[int] = set()

    def expect(self, offset: int, _size: int) -> None:
        self.expected.add(offset)

    def add(self, offset: int, content: Buffer, notify: bool) -> None:
        assert offset not in self.held
        self.held[offset] = len(content), notify
        self.expected.discard(offset)

    def remove(self, offset: int) -> None:
        self.held.pop(offset, None)
        self.expected.discard(offset)

    def allow(self, *_arguments: object) -> None:
        raise NotImplementedError


def filled(size: int, budget: BufferBudget) -> tuple[PrefetchBuffer, Windows]:
    """The buffer and the windows of a file of `size` bytes, after all leaves were put into it."""
    windows = Windows()
    buffer = PrefetchBuffer(budget, size, windows)
    for offset in range(0, size, LEAF):
        buffer.put(offset, bytes(min(LEAF, size - offset)))
    return buffer, windows


def test_each_leaf_is_added_to_and_removed_from_the_windows() -> None:
    buffer, windows = filled(3 * LEAF, BufferBudget())
    buffer.put(0, bytes(LEAF))
    assert list(windows.held) == [0, LEAF, 2 * LEAF]
    buffer.drop(LEAF)
    assert list(windows.held) == [0, 2 * LEAF]
    buffer.passed(LEAF + BEHIND)
    assert list(windows.held) == [2 * LEAF]
    buffer.close()
    assert not windows.held


def test_python_is_notified_of_one_leaf_in_some_and_of_the_last() -> None:
    size = 2 * UNSEEN + LEAF + 100
    _buffer, windows = filled(size, BufferBudget())
    assert {offset for offset, (_size, notify) in windows.held.items() if notify} == {
        UNSEEN - LEAF,
        2 * UNSEEN - LEAF,
        2 * UNSEEN + LEAF,
    }


def test_a_leaf_for_which_there_is_no_room_is_not_kept() -> None:
    budget = BufferBudget(2 * LEAF)
    buffer, windows = filled(3 * LEAF, budget)
    assert len(buffer.leaves) == len(windows.held) == 2
    buffer.clear()
    assert budget.left == 2 * LEAF


def test_a_leaf_that_comes_after_the_close_is_not_kept() -> None:
    buffer, windows = filled(LEAF, BufferBudget())
    buffer.close()
    buffer.put(0, bytes(LEAF))
    assert not len(buffer.leaves)
    assert not windows.held


def leaves(*offsets: int) -> list[Leaf]:
    return [Leaf(CID, offset, LEAF) for offset in offsets]


def test_leaves_under_way_are_expected_until_they_arrive_or_are_given_up() -> None:
    windows = Windows()
    buffer = PrefetchBuffer(BufferBudget(2 * LEAF), 100 * LEAF, windows)
    buffer.put(0, bytes(LEAF))
    coming = leaves(0, LEAF, 2 * LEAF, UNSEEN - LEAF, UNSEEN)
    buffer.expect(coming)
    assert windows.expected == {LEAF, 2 * LEAF, UNSEEN}, (
        "one leaf is there, and Python has to see another one"
    )
    buffer.put(LEAF, bytes(LEAF))
    assert (windows.expected, set(windows.held)) == ({2 * LEAF, UNSEEN}, {0, LEAF})
    buffer.put(2 * LEAF, bytes(LEAF))
    assert (windows.expected, set(windows.held)) == ({UNSEEN}, {0, LEAF}), "there was no room for this leaf"
    buffer.give_up(coming)
    assert (windows.expected, set(windows.held)) == (set(), {0, LEAF})


def test_nothing_is_expected_after_the_close() -> None:
    windows = Windows()
    buffer = PrefetchBuffer(BufferBudget(), 100 * LEAF, windows)
    buffer.close()
    buffer.expect(leaves(*range(0, 2 * UNSEEN, LEAF)))
    assert not windows.expected


def test_no_leaf_of_a_short_window_is_expected() -> None:
    windows = Windows()
    buffer = PrefetchBuffer(BufferBudget(), 100 * LEAF, windows)
    buffer.expect(leaves(*range(0, UNSEEN, LEAF)))
    assert not windows.expected
    buffer.expect(leaves(*range(0, UNSEEN + LEAF, LEAF)))
    assert windows.expected == set(range(0, UNSEEN + LEAF, LEAF)) - {UNSEEN - LEAF}
