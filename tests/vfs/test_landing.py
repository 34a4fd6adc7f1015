"""What waits for a reader: how long, and what he may take unasked."""

from ipfsfuse.cache.base import Content
from ipfsfuse.vfs.landing import BEHIND, TOLD, Landing, Room

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


def landed(size: int, room: Room) -> tuple[Landing, Windows]:
    """A file of `size` bytes, all of which has landed."""
    windows = Windows()
    landing = Landing(room, size, windows)
    for offset in range(0, size, LEAF):
        landing.put(offset, bytes(min(LEAF, size - offset)))
    return landing, windows


def test_what_waits_is_added_and_removed_with_it() -> None:
    landing, windows = landed(3 * LEAF, Room())
    landing.put(0, bytes(LEAF))
    assert list(windows.held) == [0, LEAF, 2 * LEAF]
    landing.drop(LEAF)
    assert list(windows.held) == [0, 2 * LEAF]
    landing.passed(LEAF + BEHIND)
    assert list(windows.held) == [2 * LEAF]
    landing.close()
    assert not windows.held


def test_one_leaf_in_some_and_the_last_are_told_of() -> None:
    size = 2 * TOLD + LEAF + 100
    _landing, windows = landed(size, Room())
    assert {offset for offset, (_size, told) in windows.held.items() if told} == {
        TOLD - LEAF,
        2 * TOLD - LEAF,
        2 * TOLD + LEAF,
    }


def test_what_finds_no_room_is_added_nowhere() -> None:
    room = Room(2 * LEAF)
    landing, windows = landed(3 * LEAF, room)
    assert len(landing) == len(windows.held) == 2
    landing.clear()
    assert room.left == 2 * LEAF


def test_what_comes_after_the_end_is_not_kept() -> None:
    landing, windows = landed(LEAF, Room())
    landing.close()
    landing.put(0, bytes(LEAF))
    assert not len(landing)
    assert not windows.held
