"""Readers get a leaf as soon as it is verified. It is written later. Code that needs it written waits."""

import errno
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.reader import MAX_UNWRITTEN, _Unwritten
from ipfsfuse.cache.single_flight import SingleFlight
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import StoreFailed
from tests.cache.standin import Chain, Recorder, make_file, staged, staged_items

BUDGET = 64 << 20
MIB = 1 << 20


@asynccontextmanager
async def nothing_written(cache: PinsetCache) -> AsyncIterator[None]:
    """A context manager in which nothing is written, because all threads that write are taken."""
    limiter = cache.store.io.writing
    takers = [object() for _ in range(int(limiter.total_tokens))]
    for taker in takers:
        await limiter.acquire_on_behalf_of(taker)
    try:
        yield
    finally:
        for taker in takers:
            limiter.release_on_behalf_of(taker)


async def read_early(cache: PinsetCache, file: FileRef, leaves: Sequence[Leaf], got: list[Leaf]) -> None:
    for leaf in leaves:
        await cache.reader.leaf(file, leaf, early=True)
        got.append(leaf)


def test_a_leaf_is_read_before_it_is_written_and_a_caller_that_wants_it_staged_waits(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, 2 * MIB, MIB)
        waited: list[bytes] = []

        async def wants_it_staged() -> None:
            waited.append(bytes(await cache.reader.leaf(file, leaves[0])))

        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache, trio.open_nursery() as nursery:
            async with nothing_written(cache):
                for _ in range(2):
                    assert await cache.reader.leaf(file, leaves[0], early=True) == content[:MIB]
                nursery.start_soon(wants_it_staged)
                await wait_all_tasks_blocked()
                assert not waited
                assert not staged(tmp_path, "staging")
            await wait_all_tasks_blocked(0.01)
            await cache.reader.leaf(file, leaves[0])
            await wait_all_tasks_blocked()  # both wait for the same event
            assert waited == [content[:MIB]]
            assert len(chain.asked) == 1
            assert staged_items(cache)[0].staged >= MIB

    trio.run(main)


def test_a_file_of_one_leaf_that_came_as_a_block_is_read_before_it_is_written(tmp_path: Path) -> None:
    """A lookup fetches it as a block. The read that follows asks for its leaf."""

    async def main() -> None:
        chain = Chain()
        content = bytes(range(256)) * 1024
        cid = chain.add(content)
        file, leaf = FileRef(cid, len(content)), Leaf(cid, 0, len(content))
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            async with nothing_written(cache):
                assert await cache.reader.block(cid, early=True) == content
                with trio.fail_after(5):
                    assert await cache.reader.leaf(file, leaf, early=True) == content
                assert not staged(tmp_path, "staging")
            await cache.reader.wait_until_staged()
            assert len(chain.asked) == 1
            assert await cache.store.has_leaf(file, leaf)

    trio.run(main)


def test_a_leaf_that_was_read_is_staged_before_the_cache_closes(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, 2 * MIB, MIB)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            may_write = trio.Event()

            async def hold(cache: PinsetCache, task_status: trio.TaskStatus[None]) -> None:
                async with nothing_written(cache):
                    task_status.started()
                    await may_write.wait()

            async def allow_writes() -> None:
                await wait_all_tasks_blocked()
                may_write.set()

            async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
                await nursery.start(hold, cache)
                await cache.reader.leaf(file, leaves[0], early=True)
                assert not staged(tmp_path, "staging")
                nursery.start_soon(allow_writes)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await cache.reader.leaf(file, leaves[0]) == content[:MIB]
            assert len(chain.asked) == 1

    trio.run(main)


def test_leaves_that_were_fetched_ahead_are_staged_although_their_reader_left(tmp_path: Path) -> None:
    """A reader closes a file once it has the last leaf. That ends its fetches ahead."""

    async def main() -> None:
        chain = Chain()
        file, leaves, _content = make_file(chain, 4 * MIB, MIB)
        arrived: list[Leaf] = []
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            async with trio.open_nursery() as nursery, nothing_written(cache):
                nursery.start_soon(
                    cache.reader.ahead, file, leaves, lambda leaf, _content: arrived.append(leaf)
                )
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await cache.reader.wait_until_staged()
            assert arrived
            for leaf in arrived:
                assert await cache.store.has_leaf(file, leaf)

    trio.run(main)


def test_a_block_that_was_read_just_before_the_close_is_in_the_index(tmp_path: Path) -> None:
    chain = Chain()
    small = chain.add(b"a small file")

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.block(small, early=True)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert (await cache.store.blocks.count()).blocks == 1

    trio.run(main)


def test_readers_wait_for_a_disk_that_does_not_keep_up(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, _content = make_file(chain, MAX_UNWRITTEN + 2 * MIB, MIB)
        got: list[Leaf] = []
        async with (
            PinsetCache.open(tmp_path, chain, BUDGET) as cache,
            trio.open_nursery() as nursery,
            nothing_written(cache),
        ):
            nursery.start_soon(read_early, cache, file, leaves, got)
            await wait_all_tasks_blocked()
            assert got == list(leaves[: MAX_UNWRITTEN // MIB])
        assert got == list(leaves)

    trio.run(main)


async def read_within_deadline(cache: PinsetCache, file: FileRef, leaves: Sequence[Leaf]) -> bytes:
    with trio.fail_after(10):
        return b"".join([bytes(await cache.reader.leaf(file, leaf, early=True)) for leaf in leaves])


@pytest.mark.logs("does not keep up")
@pytest.mark.parametrize("ahead", [False, True])
def test_readers_get_their_bytes_while_the_disk_hangs_and_memory_stays_bounded(
    tmp_path: Path, ahead: bool
) -> None:
    """There were two bugs. When 4 MiB waited for the disk, readers got an error at their deadline. And the
    bytes of each file that was read ahead stayed in memory."""

    async def main() -> None:
        chain = Chain()
        files = [make_file(chain, MAX_UNWRITTEN + 4 * MIB, MIB, seed) for seed in range(4)]
        async with PinsetCache.open(tmp_path, chain, BUDGET * 2, deadline=1.0) as cache:
            async with trio.open_nursery() as nursery, nothing_written(cache):
                for file, leaves, content in files:
                    if ahead:
                        nursery.start_soon(cache.reader.ahead, file, leaves, lambda _leaf, _content: None)
                    assert await read_within_deadline(cache, file, leaves) == content
                assert "does not keep up" in cache.trouble
                await wait_all_tasks_blocked()
                waits = [flight.result for flight in cache.reader._flights._flights.values() if flight.result]
                size = sum(len(result[0].content) for result in waits)
                assert 0 < size <= MAX_UNWRITTEN
            await cache.reader.wait_until_staged()
            cache.store.backoff._until = 0  # as if its five seconds were over
            file, leaves, content = make_file(chain, 2 * MIB, MIB, seed=100)
            assert await read_within_deadline(cache, file, leaves) == content
            await cache.reader.wait_until_staged()
            assert cache.trouble == ""
            assert await cache.store.has_leaf(file, leaves[1])

    trio.run(main)


@pytest.mark.logs("does not keep up")
def test_only_a_caller_that_wants_a_leaf_staged_gets_an_error_while_the_disk_hangs(tmp_path: Path) -> None:
    """The failure must not be remembered: the next reader would get it too."""

    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, 2 * MIB, MIB)
        async with (
            PinsetCache.open(tmp_path, chain, BUDGET, deadline=0.5) as cache,
            nothing_written(cache),
        ):
            with pytest.raises(StoreFailed, match="the disk has not written it"):
                await cache.reader.leaf(file, leaves[0])
            assert await cache.reader.leaf(file, leaves[0], early=True) == content[:MIB]
            assert len(chain.asked) == 1

    trio.run(main)


def test_a_block_counts_as_staged_while_it_is_being_written(tmp_path: Path) -> None:
    """Otherwise a small file that is opened at once would not be pinned, and the root would not list it."""

    async def main() -> None:
        chain, pins = Chain(), Recorder()
        small = chain.add(b"a small file")
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            assert await cache.reader.block(small, early=True) == b"a small file"
            assert cache.store.blocks.locate(small) is None, "it is not written yet"
            cache.names.note(small, cids.text(small))
            cache.reader.opened(FileRef(small, 12))
            assert pins.asked == [("add", small)]
            assert list(cache.names.staged()) == [(small, cids.text(small))]
            await cache.reader.wait_until_staged()
            assert cache.store.blocks.locate(small) is not None
            assert list(cache.names.staged()) == [(small, cids.text(small))]
            assert pins.asked == [("add", small)]

    trio.run(main)


@pytest.mark.logs("reads go on without the cache")
def test_a_block_that_could_not_be_staged_is_unpinned_again(tmp_path: Path) -> None:
    async def main() -> None:
        chain, pins = Chain(), Recorder()
        small = chain.add(b"a small file")
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            cache.store.backoff.failed("the folder", OSError(errno.ENOSPC, "No space left on device"))
            await cache.reader.block(small, early=True)
            cache.reader.opened(FileRef(small, 12))
            await cache.reader.wait_until_staged()
            assert not cache.store.holds(small)
            assert pins.asked == [("add", small), ("remove", small)]

    trio.run(main)


@pytest.mark.logs("after it had given its value")
def test_a_failure_after_the_value_was_given_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            flights: SingleFlight[str, str] = SingleFlight(nursery)

            async def fetch() -> AsyncGenerator[str]:
                yield "value"
                raise ValueError("a bug")

            assert await flights.join("k", fetch) == "value"
            await wait_all_tasks_blocked()
            assert len(flights) == 0

    trio.run(main)
    assert "a bug" in caplog.text


class NoStore:
    """Takes the place of a store. `failures` lists what `_Unwritten` reports."""

    def __init__(self) -> None:
        self.folder = Path("cache")
        self.backoff = self
        self.failures: list[str] = []

    def failed(self, _key: str, error: StoreFailed) -> None:
        self.failures.append(str(error))


def test_a_large_delivery_waits_for_the_disk_no_longer_than_small_ones() -> None:
    """Otherwise small deliveries take all the room that the disk makes, and then the log says that the disk
    took nothing."""

    async def main() -> None:
        store = NoStore()
        unwritten = _Unwritten(cast(Store, store), 1.0)

        async def write_small_ones() -> None:
            while True:
                assert await unwritten.add(MIB)
                await trio.sleep(0.1)
                unwritten.remove(MIB)

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_UNWRITTEN // MIB + 8):
                nursery.start_soon(write_small_ones)
            await wait_all_tasks_blocked()
            assert await unwritten.add(4 * MIB)
            assert store.failures == []
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_slow_disk_is_not_reported_as_a_disk_that_takes_nothing() -> None:
    async def main() -> None:
        store = NoStore()
        unwritten = _Unwritten(cast(Store, store), 1.0)
        for _ in range(MAX_UNWRITTEN // MIB):
            assert await unwritten.add(MIB)
        async with trio.open_nursery() as nursery:

            async def write_one() -> None:
                await trio.sleep(0.5)
                unwritten.remove(MIB)

            nursery.start_soon(write_one)
            assert not await unwritten.add(4 * MIB)
        assert (store.failures, unwritten.is_stuck) == ([], False)
        assert not await unwritten.add(4 * MIB)
        assert (len(store.failures), unwritten.is_stuck) == (1, True)

    trio.run(main, clock=MockClock(autojump_threshold=0))
