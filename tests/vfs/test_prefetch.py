"""Fetching ahead in directories: what a trail says should be brought in, and that listings and pickers bring
nothing."""

from collections.abc import Sequence

import trio
import trio.testing

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Link, Node
from ipfsfuse.errors import Unavailable
from ipfsfuse.vfs.prefetch import (
    DIRECTORIES_AHEAD,
    FETCHED_TOGETHER,
    MAX_TRACKED,
    PREFETCH_CHILDREN,
    SMALL_FILE,
    DirectoryPrefetcher,
    ScanTracker,
)

DIRECTORY = cids.make(cids.DAG_PB, b"\x12\x20" + bytes(32))


def child(number: int) -> Cid:
    return cids.make(cids.RAW, b"\x12\x20" + number.to_bytes(32, "big"))


FILE = File(DIRECTORY, 0, 0)


def nothing(_directory: Node) -> None:
    """`contents_of` where nothing can be brought in at once."""


CHILDREN = [child(number) for number in range(1, 201)]


def taken(trail: ScanTracker) -> Sequence[Cid]:
    return list(iter(trail.take, None))


def test_who_follows_the_order_is_kept_ahead_of_by_one_window() -> None:
    trail = ScanTracker(DIRECTORY, CHILDREN)
    assert [trail.note(index) for index in (0, 1)] == [False, False]
    assert trail.take() is None
    assert trail.note(2)
    assert taken(trail) == CHILDREN[3 : 3 + PREFETCH_CHILDREN]
    assert not trail.note(3), "a window is topped up by the quarter, not one by one"
    assert [trail.note(index) for index in range(4, 3 + PREFETCH_CHILDREN // 4)] == [False] * (
        PREFETCH_CHILDREN // 4 - 2
    ) + [True]
    assert taken(trail) == CHILDREN[3 + PREFETCH_CHILDREN : 3 + PREFETCH_CHILDREN + PREFETCH_CHILDREN // 4]


def test_who_picks_or_goes_backwards_is_not_helped() -> None:
    for order in ((0, 50, 100, 150), (9, 8, 7, 6), (0, 0, 0, 0), (0, 1, 40, 41)):
        trail = ScanTracker(DIRECTORY, CHILDREN)
        assert not any(trail.note(index) for index in order)
        assert trail.take() is None


def test_some_children_may_be_left_out_on_the_way() -> None:
    trail = ScanTracker(DIRECTORY, CHILDREN)
    assert [trail.note(index) for index in (0, 2, 5)] == [False, False, True]


def test_the_end_of_a_page_ends_its_trail() -> None:
    trail = ScanTracker(DIRECTORY, CHILDREN[:5])
    assert [trail.note(index) for index in range(3)] == [False, False, True]
    assert taken(trail) == CHILDREN[3:5]
    assert not trail.note(3)
    assert not trail.note(4)


def test_only_unknown_small_children_are_brought_in_and_no_more_than_some_at_a_time() -> None:
    sizes = [(cid, SMALL_FILE if place % 2 else SMALL_FILE + 1) for place, cid in enumerate(CHILDREN)]
    small = CHILDREN[1::2]
    brought: list[Cid] = []
    most = running = 0

    async def main() -> None:
        async def bring(cid: Cid) -> Node:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await trio.testing.wait_all_tasks_blocked()
            running -= 1
            brought.append(cid)
            return FILE

        async with trio.open_nursery() as nursery:
            ahead = DirectoryPrefetcher(nursery, bring, lambda cid: cid if cid == small[5] else None, nothing)
            ahead.listed(DIRECTORY, 0, sizes)
            for cid in small[:2]:
                ahead.used(cid)
            await trio.testing.wait_all_tasks_blocked()
            assert not brought
            ahead.used(small[2])

    trio.run(main)
    assert sorted(brought) == sorted([DIRECTORY, *small[3:5], *small[6 : 3 + PREFETCH_CHILDREN]])
    assert most == FETCHED_TOGETHER


def test_a_child_that_cannot_be_had_ends_the_trail_quietly() -> None:
    asked: list[Cid] = []

    async def main() -> None:
        async def bring(cid: Cid) -> Node:
            await trio.lowlevel.checkpoint()
            if cid == DIRECTORY:
                return FILE
            asked.append(cid)
            raise Unavailable("gone")

        async with trio.open_nursery() as nursery:
            ahead = DirectoryPrefetcher(nursery, bring, lambda _cid: None, nothing)
            ahead.listed(DIRECTORY, 0, [(cid, 1) for cid in CHILDREN])
            for cid in CHILDREN[:3]:
                ahead.used(cid)

    trio.run(main)
    assert 1 <= len(asked) <= FETCHED_TOGETHER


def test_of_many_pages_the_last_are_remembered() -> None:
    brought: list[Cid] = []

    async def main() -> None:
        async def bring(cid: Cid) -> Node:
            await trio.lowlevel.checkpoint()
            brought.append(cid)
            return FILE

        async with trio.open_nursery() as nursery:
            ahead = DirectoryPrefetcher(nursery, bring, lambda _cid: None, nothing)
            pages = [
                [child(1 + page * MAX_TRACKED // 2 + place) for place in range(MAX_TRACKED // 2)]
                for page in range(3)
            ]
            for place, page in enumerate(pages):
                ahead.listed(DIRECTORY, place, [(cid, 1) for cid in page])
            for page in pages:
                for cid in page[:3]:
                    ahead.used(cid)

    trio.run(main)
    assert len(brought) == 2 * (1 + PREFETCH_CHILDREN)
    assert not {*brought} & {child(number) for number in range(1, MAX_TRACKED // 2 + 1)}


def directory(number: int) -> Cid:
    return cids.make(cids.DAG_PB, b"\x12\x20" + number.to_bytes(32, "big"))


def test_who_reads_what_a_directory_holds_finds_the_next_ones_brought_in_with_all_they_hold() -> None:
    below = [directory(number) for number in range(1, 21)]
    whole: list[Cid] = []

    async def main() -> None:
        async def bring(cid: Cid) -> Node:
            await trio.lowlevel.checkpoint()
            return Directory(cid, dagpb.decode(dagpb.encode([Link(child(1), b"x", 1)], None)).links)

        def contents_of(node: Node) -> trio.Event:
            whole.append(node.cid)
            come = trio.Event()
            come.set()
            return come

        async with trio.open_nursery() as nursery:
            ahead = DirectoryPrefetcher(nursery, bring, lambda _cid: True, contents_of)
            ahead.listed(DIRECTORY, 0, [(cid, 1 << 20) for cid in below])
            ahead.used(below[0])
            ahead.listed(below[0], 0, [(cid, 1) for cid in CHILDREN])
            ahead.used(CHILDREN[0])
            ahead.used(CHILDREN[1])
            await trio.testing.wait_all_tasks_blocked()
            assert whole == []
            ahead.used(CHILDREN[2])
            await trio.testing.wait_all_tasks_blocked()
            assert whole == below[:1]
            ahead.used(below[1])
            await trio.testing.wait_all_tasks_blocked()
            assert whole == [below[0], *below[2 : 2 + DIRECTORIES_AHEAD]]
            ahead.used(below[2])
            await trio.testing.wait_all_tasks_blocked()
            assert whole == [below[0], *below[2 : 3 + DIRECTORIES_AHEAD]]
            ahead.used(below[15])
            await trio.testing.wait_all_tasks_blocked()
            assert whole == [below[0], *below[2 : 3 + DIRECTORIES_AHEAD]], "a reader who picks is not helped"

    trio.run(main)
