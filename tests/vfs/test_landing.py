"""What waits for a reader: how long, and what he may take unasked."""

from ipfsfuse.cache.base import Content
from ipfsfuse.vfs.landing import BEHIND, TOLD, Landing, Room

LEAF = 1 << 20


class Desk:
    """A counter that notes what lies on it."""

    def __init__(self) -> None:
        self.offered: dict[int, tuple[int, bool]] = {}

    def offer(self, offset: int, content: Content, told: bool) -> None:
        assert offset not in self.offered
        self.offered[offset] = len(content), told

    def withdraw(self, offset: int) -> None:
        del self.offered[offset]


def landed(size: int, room: Room) -> tuple[Landing, Desk]:
    """A file of `size` bytes, all of which has landed."""
    desk = Desk()
    landing = Landing(room, size, desk)
    for offset in range(0, size, LEAF):
        landing.put(offset, bytes(min(LEAF, size - offset)))
    return landing, desk


def test_what_waits_is_offered_and_withdrawn_with_it() -> None:
    landing, desk = landed(3 * LEAF, Room())
    landing.put(0, bytes(LEAF))
    assert list(desk.offered) == [0, LEAF, 2 * LEAF]
    landing.drop(LEAF)
    assert list(desk.offered) == [0, 2 * LEAF]
    landing.passed(LEAF + BEHIND)
    assert list(desk.offered) == [2 * LEAF]
    landing.close()
    assert not desk.offered


def test_one_leaf_in_some_and_the_last_are_told_of() -> None:
    size = 2 * TOLD + LEAF + 100
    _landing, desk = landed(size, Room())
    assert {offset for offset, (_size, told) in desk.offered.items() if told} == {TOLD - LEAF, 2 * TOLD - LEAF, 2 * TOLD + LEAF}


def test_what_finds_no_room_is_offered_nowhere() -> None:
    room = Room(2 * LEAF)
    landing, desk = landed(3 * LEAF, room)
    assert len(landing) == len(desk.offered) == 2
    landing.clear()
    assert room.left == 2 * LEAF


def test_what_comes_after_the_end_is_not_kept() -> None:
    landing, desk = landed(LEAF, Room())
    landing.close()
    landing.put(0, bytes(LEAF))
    assert not len(landing)
    assert not desk.offered
