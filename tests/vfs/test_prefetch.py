"""Prefetch in directories: which children are fetched ahead of a scan. A listing alone, or a program that
picks single files, fetches nothing ahead."""

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


def no_contents(_directory: Node) -> None:
    """A `contents_of` that fetches no directory as a whole."""


CHILDREN = [child(number) for number in range(1, 201)]


def taken(tracker: ScanTracker) -> Sequence[Cid]:
    return list(iter(tracker.take, None))


def test_one_window_is_fetched_ahead_of_a_sequential_reader() -> None:
    tracker = ScanTracker(DIRECTORY, CHILDREN)
    assert [tracker.note(index) for index in (0, 1)] == [False, False]
    assert tracker.take() is None
    assert tracker.note(2)
    assert taken(tracker) == CHILDREN[3 : 3 + PREFETCH_CHILDREN]
    assert not tracker.note(3), "a window is refilled by a quarter, not one by one"
    assert [tracker.note(index) for index in range(4, 3 + PREFETCH_CHILDREN // 4)] == [False] * (
        PREFETCH_CHILDREN // 4 - 2
    ) + [True]
    assert taken(tracker) == CHILDREN[3 + PREFETCH_CHILDREN : 3 + PREFETCH_CHILDREN + PREFETCH_CHILDREN // 4]


def test_picking_or_going_backwards_fetches_nothing_ahead() -> None:
    for order in ((0, 50, 100, 150), (9, 8, 7, 6), (0, 0, 0, 0), (0, 1, 40, 41)):
        tracker = ScanTracker(DIRECTORY, CHILDREN)
        assert not any(tracker.note(index) for index in order)
        assert tracker.take() is None


def test_a_scan_may_skip_some_children() -> None:
    tracker = ScanTracker(DIRECTORY, CHILDREN)
    assert [tracker.note(index) for index in (0, 2, 5)] == [False, False, True]


def test_a_scan_ends_at_the_end_of_its_page() -> None:
    tracker = ScanTracker(DIRECTORY, CHILDREN[:5])
    assert [tracker.note(index) for index in range(3)] == [False, False, True]
    assert taken(tracker) == CHILDREN[3:5]
    assert not tracker.note(3)
    assert not tracker.note(4)


def test_only_unknown_small_children_are_fetched_and_only_some_at_a_time() -> None:
    sizes = [(cid, SMALL_FILE if place % 2 else SMALL_FILE + 1) for place, cid in enumerate(CHILDREN)]
    small = CHILDREN[1::2]
    fetched: list[Cid] = []
    most = running = 0

    async def main() -> None:
        async def fetch(cid: Cid) -> Node:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await trio.testing.wait_all_tasks_blocked()
            running -= 1
            fetched.append(cid)
            return FILE

        async with trio.open_nursery() as nursery:
            prefetcher = DirectoryPrefetcher(
                nursery, fetch, lambda cid: cid if cid == small[5] else None, no_contents
            )
            prefetcher.listed(DIRECTORY, 0, sizes)
            for cid in small[:2]:
                prefetcher.used(cid)
            await trio.testing.wait_all_tasks_blocked()
            assert not fetched
            prefetcher.used(small[2])

    trio.run(main)
    assert sorted(fetched) == sorted([DIRECTORY, *small[3:5], *small[6 : 3 + PREFETCH_CHILDREN]])
    assert most == FETCHED_TOGETHER


def test_a_child_that_is_unavailable_ends_the_scan_without_an_error() -> None:
    asked: list[Cid] = []

    async def main() -> None:
        async def fetch(cid: Cid) -> Node:
            await trio.lowlevel.checkpoint()
            if cid == DIRECTORY:
                return FILE
            asked.append(cid)
            raise Unavailable("gone")

        async with trio.open_nursery() as nursery:
            prefetcher = DirectoryPrefetcher(nursery, fetch, lambda _cid: None, no_contents)
            prefetcher.listed(DIRECTORY, 0, [(cid, 1) for cid in CHILDREN])
            for cid in CHILDREN[:3]:
                prefetcher.used(cid)

    trio.run(main)
    assert 1 <= len(asked) <= FETCHED_TOGETHER


def test_only_the_last_listed_pages_are_remembered() -> None:
    fetched: list[Cid] = []

    async def main() -> None:
        async def fetch(cid: Cid) -> Node:
            await trio.lowlevel.checkpoint()
            fetched.append(cid)
            return FILE

        async with trio.open_nursery() as nursery:
            prefetcher = DirectoryPrefetcher(nursery, fetch, lambda _cid: None, no_contents)
            pages = [
                [child(1 + page * MAX_TRACKED // 2 + place) for place in range(MAX_TRACKED // 2)]
                for page in range(3)
            ]
            for place, page in enumerate(pages):
                prefetcher.listed(DIRECTORY, place, [(cid, 1) for cid in page])
            for page in pages:
                for cid in page[:3]:
                    prefetcher.used(cid)

    trio.run(main)
    assert len(fetched) == 2 * (1 + PREFETCH_CHILDREN)
    assert not {*fetched} & {child(number) for number in range(1, MAX_TRACKED // 2 + 1)}


def directory(number: int) -> Cid:
    return cids.make(cids.DAG_PB, b"\x12\x20" + number.to_bytes(32, "big"))


def test_reading_through_directories_fetches_the_next_ones_with_their_contents() -> None:
    below = [directory(number) for number in range(1, 21)]
    fetched_whole: list[Cid] = []

    async def main() -> None:
        async def fetch(cid: Cid) -> Node:
            await trio.lowlevel.checkpoint()
            return Directory(cid, dagpb.decode(dagpb.encode([Link(child(1), b"x", 1)], None)).links)

        def contents_of(node: Node) -> trio.Event:
            fetched_whole.append(node.cid)
            done = trio.Event()
            done.set()
            return done

        async with trio.open_nursery() as nursery:
            prefetcher = DirectoryPrefetcher(nursery, fetch, lambda _cid: True, contents_of)
            prefetcher.listed(DIRECTORY, 0, [(cid, 1 << 20) for cid in below])
            prefetcher.used(below[0])
            prefetcher.listed(below[0], 0, [(cid, 1) for cid in CHILDREN])
            prefetcher.used(CHILDREN[0])
            prefetcher.used(CHILDREN[1])
            await trio.testing.wait_all_tasks_blocked()
            assert fetched_whole == []
            prefetcher.used(CHILDREN[2])
            await trio.testing.wait_all_tasks_blocked()
            assert fetched_whole == below[:1]
            prefetcher.used(below[1])
            await trio.testing.wait_all_tasks_blocked()
            assert fetched_whole == [below[0], *below[2 : 2 + DIRECTORIES_AHEAD]]
            prefetcher.used(below[2])
            await trio.testing.wait_all_tasks_blocked()
            assert fetched_whole == [below[0], *below[2 : 3 + DIRECTORIES_AHEAD]]
            prefetcher.used(below[15])
            await trio.testing.wait_all_tasks_blocked()
            assert fetched_whole == [below[0], *below[2 : 3 + DIRECTORIES_AHEAD]], (
                "picking fetches nothing ahead"
            )

    trio.run(main)
