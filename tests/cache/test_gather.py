"""`gather` fetches the blocks of a directory by one request. Callers of these blocks wait for its answer. What
does not come is asked for one by one."""

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.reader import MIN_SUBTREE_BLOCKS
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import Unavailable
from ipfsfuse.sources.base import Subtree
from tests.cache.standin import Chain, random_bytes

BUDGET = 64 << 20
DEADLINE = 30.0


def small(chain: Chain, count: int) -> list[Cid]:
    return [chain.add(b"block %d" % number) for number in range(count)]


def subtree(chain: Chain) -> Subtree:
    return Subtree(chain.add(b"the directory", cids.DAG_PB), True, 1 << 20)


def nothing_more(_cid: Cid, _block: bytes) -> Sequence[Cid]:
    """A `seen` that adds no wanted blocks."""
    return ()


def with_cache(
    folder: Path, chain: Chain, main: Callable[[PinsetCache], Awaitable[None]], clock: MockClock | None = None
) -> None:
    async def opened() -> None:
        async with PinsetCache.open(folder, chain, BUDGET, deadline=DEADLINE) as cache:
            await main(cache)

    trio.run(opened, clock=clock)


async def read_all(cache: PinsetCache, wanted: Iterable[Cid]) -> list[bytes]:
    got: dict[Cid, bytes] = {}

    async def read(cid: Cid) -> None:
        got[cid] = await cache.reader.block(cid)

    async with trio.open_nursery() as nursery:
        for cid in wanted:
            nursery.start_soon(read, cid)
    return [got[cid] for cid in wanted]


def test_a_caller_waits_for_an_expected_block_and_makes_no_request(tmp_path: Path) -> None:
    chain = Chain()
    wanted, gate = small(chain, 20), trio.Event()
    chain.sends = [gate, *wanted]

    async def main(cache: PinsetCache) -> None:
        ended = cache.reader.gather(subtree(chain), wanted, nothing_more)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read_all, cache, wanted)
            await wait_all_tasks_blocked()
            assert (chain.asked, chain.sent, ended.is_set()) == ([], [], False)
            gate.set()
        await ended.wait()
        assert await read_all(cache, wanted) == [b"block %d" % number for number in range(20)]
        assert (chain.asked, chain.sent, len(chain.subtrees)) == ([], wanted, 1)

    with_cache(tmp_path, chain, main)


def test_a_block_that_does_not_come_is_asked_for_alone_only_if_a_caller_waits_for_it(tmp_path: Path) -> None:
    chain = Chain()
    wanted, gate, absent = small(chain, 6), trio.Event(), cids.make(cids.RAW, b"\x12\x20" + bytes(32))
    chain.sends = [*wanted[:4], gate]

    async def main(cache: PinsetCache) -> None:
        cache.reader.gather(subtree(chain), [*wanted, absent], nothing_more)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.reader.block, wanted[4])
            await wait_all_tasks_blocked()
            assert chain.asked == []
            gate.set()
        assert chain.asked == [wanted[4]]
        with pytest.raises(Unavailable, match="no source has it"):
            await cache.reader.block(absent)

    with_cache(tmp_path, chain, main)


def test_a_block_that_came_may_add_wanted_blocks_and_none_comes_twice(tmp_path: Path) -> None:
    chain = Chain()
    first, below = (
        small(chain, 2 * MIN_SUBTREE_BLOCKS)[:MIN_SUBTREE_BLOCKS],
        small(chain, 2 * MIN_SUBTREE_BLOCKS)[MIN_SUBTREE_BLOCKS:],
    )
    gate = trio.Event()
    chain.sends = [*first, *first, gate, *below, *first]

    def seen(cid: Cid, block: bytes) -> Sequence[Cid]:
        assert chain.blocks[cids.multihash(cid)] == block
        return [*below, *first] if cid == first[-1] else ()

    async def main(cache: PinsetCache) -> None:
        ended = cache.reader.gather(subtree(chain), first, seen)
        await cache.reader.block(first[-1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, cache, below)
            await wait_all_tasks_blocked()
            assert chain.asked == []
            gate.set()
        await ended.wait()
        assert (chain.asked, chain.sent) == ([], [*first, *below])

    with_cache(tmp_path, chain, main)


def test_blocks_that_are_staged_or_under_way_or_inline_are_not_wanted(tmp_path: Path) -> None:
    chain = Chain()
    wanted = [
        *small(chain, MIN_SUBTREE_BLOCKS),
        chain.add(random_bytes(200_000, 1)),
        chain.add(random_bytes(200_000, 2)),
        chain.add(b"here", cids.DAG_PB),
    ]
    large, as_leaf, node = wanted[MIN_SUBTREE_BLOCKS:]
    under_way = chain.add(b"under way")
    inline = cids.make(cids.RAW, b"\x00\x02hi")

    async def main(cache: PinsetCache) -> None:
        await cache.reader.block(large)
        await cache.reader.leaf(FileRef(as_leaf, 200_000), Leaf(as_leaf, 0, 200_000))
        await cache.reader.block(node)
        chain.stalled = {under_way}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.reader.block, under_way)
            await wait_all_tasks_blocked()
            asked = len(chain.asked)
            chain.sends = [*wanted, under_way, inline]
            await cache.reader.gather(subtree(chain), [*wanted, under_way, inline], nothing_more).wait()
            assert (chain.sent, len(chain.asked)) == (wanted[:MIN_SUBTREE_BLOCKS], asked)
            nursery.cancel_scope.cancel()
        chain.sent = []
        await cache.reader.gather(subtree(chain), [*wanted, inline], nothing_more).wait()
        assert (chain.sent, len(chain.subtrees), len(chain.asked)) == ([], 1, asked)

    with_cache(tmp_path, chain, main)


def test_a_large_file_that_was_evicted_is_wanted_again(tmp_path: Path) -> None:
    chain = Chain()
    wanted = [*small(chain, MIN_SUBTREE_BLOCKS), chain.add(random_bytes(200_000, 1))]
    others = [chain.add(b"another %d" % number) for number in range(MIN_SUBTREE_BLOCKS)]
    chain.sends = list(wanted)

    async def main(cache: PinsetCache) -> None:
        await cache.reader.gather(subtree(chain), wanted, nothing_more).wait()
        assert (chain.sent, cache.store.item_of(wanted[-1]) is not None) == (wanted, True)
        await cache.store.evict(wanted[-1])
        chain.sent = []
        await cache.reader.gather(subtree(chain), [*wanted, *others], nothing_more).wait()
        assert chain.sent == [wanted[-1]]

    with_cache(tmp_path, chain, main)


def test_a_few_missing_blocks_are_asked_for_one_by_one(tmp_path: Path) -> None:
    chain = Chain()
    wanted = small(chain, MIN_SUBTREE_BLOCKS + 2)

    async def main(cache: PinsetCache) -> None:
        for cid in wanted[:3]:
            await cache.reader.block(cid)
        await cache.reader.gather(subtree(chain), wanted, nothing_more).wait()
        assert chain.subtrees == []
        await read_all(cache, wanted)
        assert sorted(chain.asked) == sorted(wanted)

    with_cache(tmp_path, chain, main)


def test_a_slow_answer_leaves_callers_time_to_ask_elsewhere(tmp_path: Path) -> None:
    chain = Chain()
    wanted = small(chain, 6)
    chain.sends = [trio.Event()]  # never set. An answer of blocks that are not wanted would be the same

    async def main(cache: PinsetCache) -> None:
        start = trio.current_time()
        ended = cache.reader.gather(subtree(chain), wanted, nothing_more)
        assert await cache.reader.block(wanted[3]) == b"block 3"
        assert trio.current_time() - start < DEADLINE / 2
        assert chain.asked == [wanted[3]]
        await ended.wait()

    with_cache(tmp_path, chain, main, MockClock(autojump_threshold=0.05))


def test_an_answer_goes_on_for_the_others_when_one_reader_leaves(tmp_path: Path) -> None:
    chain = Chain()
    wanted, gate = small(chain, 6), trio.Event()
    chain.sends = [gate, *wanted]

    async def main(cache: PinsetCache) -> None:
        ended = cache.reader.gather(subtree(chain), wanted, nothing_more)
        with trio.move_on_after(0.01):
            await cache.reader.block(wanted[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, cache, wanted)
            await wait_all_tasks_blocked()
            gate.set()
        await ended.wait()
        assert (chain.asked, chain.sent) == ([], wanted)

    with_cache(tmp_path, chain, main)


def test_a_cache_that_is_closed_does_not_wait_for_an_answer(tmp_path: Path) -> None:
    chain = Chain()
    wanted = small(chain, 6)
    chain.sends = [*wanted[:2], trio.Event()]
    ended: list[trio.Event] = []

    async def main(cache: PinsetCache) -> None:
        ended.append(cache.reader.gather(subtree(chain), wanted, nothing_more))
        await cache.reader.block(wanted[1])

    with_cache(tmp_path, chain, main)
    assert ended[0].is_set()


@pytest.mark.logs("ended unexpectedly")
def test_an_error_of_seen_ends_the_answer_and_reads_go_on(tmp_path: Path) -> None:
    chain = Chain()
    wanted = small(chain, 6)
    chain.sends = list(wanted)

    def seen(cid: Cid, _block: bytes) -> Sequence[Cid]:
        if cid == wanted[2]:
            raise ValueError
        return ()

    async def main(cache: PinsetCache) -> None:
        await cache.reader.gather(subtree(chain), wanted, seen).wait()
        assert await read_all(cache, wanted) == [b"block %d" % number for number in range(6)]
        assert sorted(chain.asked) == sorted(wanted[2:]), "also the block at which `seen` failed"

    with_cache(tmp_path, chain, main)


def test_all_of_a_directory_of_40000_entries_is_registered_in_slices(tmp_path: Path) -> None:
    chain = Chain()
    wanted, gate = small(chain, 40_000), trio.Event()
    chain.sends = [gate, wanted[0], wanted[-1]]

    async def main(cache: PinsetCache) -> None:
        before = time.thread_time()
        ended = cache.reader.gather(subtree(chain), wanted, nothing_more)
        assert time.thread_time() - before < 0.05
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, cache, [wanted[0], wanted[-1]])
            await wait_all_tasks_blocked()
            assert (chain.asked, ended.is_set()) == ([], False)
            gate.set()
        await ended.wait()
        assert chain.asked == []

    with_cache(tmp_path, chain, main)
