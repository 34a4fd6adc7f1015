"""Reads through the cache: what is fetched, what is read back, and that all of it is verified."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import Unavailable
from tests.cache.standin import Chain, Recorder, make_file, staged_bytes, staged_items

BUDGET = 64 << 20
KIB = 1 << 10
MIB = 1 << 20


async def read(cache: PinsetCache, file: FileRef, leaves: Sequence[Leaf]) -> bytes:
    return b"".join([bytes(await cache.reader.leaf(file, leaf)) for leaf in leaves])


@pytest.mark.parametrize("dag_pb", [False, True])
@pytest.mark.parametrize("chunk", [64 * KIB, 70_001])
def test_content_that_was_read_once_is_read_from_the_disk_even_after_a_restart(
    tmp_path: Path, dag_pb: bool, chunk: int
) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, 3 * MIB + 5, chunk, dag_pb=dag_pb)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.block(file.cid)
            assert await read(cache, file, leaves) == content
            assert len(chain.asked) == len(leaves) + 1
            assert await read(cache, file, leaves) == content
            await cache.reader.block(file.cid)
            assert len(chain.asked) == len(leaves) + 1
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await read(cache, file, leaves) == content
            await cache.reader.block(file.cid)
            assert len(chain.asked) == len(leaves) + 1
            (kept,) = staged_items(cache)
            assert (kept.cid, kept.size, kept.complete) == (file.cid, file.size, True)
            assert kept.staged == staged_bytes(cache, file.cid) >= file.size

    trio.run(main)
    assert [item.name for item in (tmp_path / "staging").iterdir()] == [cids.text(file.cid)]


def test_a_part_of_a_file_is_kept_and_completed_after_a_restart(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.leaf(file, leaves[3])
            await cache.reader.leaf(file, leaves[9])
        assert [item.name for item in (tmp_path / "staging").iterdir()] == [cids.text(file.cid) + ".part"]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert not staged_items(cache)[0].complete
            assert await read(cache, file, leaves) == content
            assert len(chain.asked) == len(leaves)

    trio.run(main)


def test_a_hundred_readers_of_a_cold_file_ask_for_each_block_once(tmp_path: Path) -> None:
    chain = Chain()
    chain.delay = 0.001
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache, trio.open_nursery() as nursery:

            async def reader() -> None:
                await cache.reader.block(file.cid)
                assert await read(cache, file, leaves) == content

            for _ in range(100):
                nursery.start_soon(reader)

    trio.run(main)
    assert sorted(chain.asked) == sorted([file.cid, *(leaf.cid for leaf in leaves)])


def test_content_that_is_read_in_place_is_not_staged(tmp_path: Path) -> None:
    chain = Chain(in_place=True)
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        pins = Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            await cache.reader.block(file.cid)
            assert await read(cache, file, leaves) == content
            got: dict[int, bytes] = {}
            await cache.reader.ahead(
                file, leaves, lambda leaf, data: got.__setitem__(leaf.offset, bytes(data))
            )
            assert b"".join(got[leaf.offset] for leaf in leaves) == content
            assert list(staged_items(cache)) == []
            assert staged_bytes(cache, file.cid) == 0
            assert pins.asked == []

    trio.run(main)
    assert not list((tmp_path / "staging").iterdir())
    assert not list((tmp_path / "packs").iterdir())


def test_ahead_asks_once_for_all_missing_leaves_and_hands_over_each_leaf_once(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.leaf(file, leaves[5])
            got: list[tuple[Leaf, bytes]] = []
            await cache.reader.ahead(file, leaves, lambda leaf, data: got.append((leaf, bytes(data))))
            assert [run.leaves for run in chain.runs] == [[*leaves[:5], *leaves[6:]]]
            assert b"".join(data for _leaf, data in sorted(got, key=lambda item: item[0].offset)) == content
            asked = len(chain.asked)
            await cache.reader.ahead(file, leaves)
            assert await read(cache, file, leaves) == content
            assert (len(chain.runs), len(chain.asked)) == (1, asked)

    trio.run(main)


def test_a_leaf_that_occurs_many_times_in_a_file_is_asked_for_once(tmp_path: Path) -> None:
    chain = Chain()
    zeros = chain.add(bytes(64 * KIB))
    leaves = [Leaf(zeros, 64 * KIB * number, 64 * KIB) for number in range(16)]
    file = FileRef(chain.add(b"root", cids.DAG_PB), MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            got: list[int] = []
            await cache.reader.ahead(file, leaves, lambda leaf, data: got.append(leaf.offset))
            assert sorted(got) == [leaf.offset for leaf in leaves]
            assert await read(cache, file, leaves) == bytes(MIB)
            assert chain.asked == [zeros]

    trio.run(main)


def test_ahead_raises_nothing_and_a_read_of_the_missing_leaf_fails(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    del chain.blocks[cids.multihash(leaves[2].cid)]

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            got: list[Leaf] = []
            await cache.reader.ahead(file, leaves, lambda leaf, data: got.append(leaf))
            assert leaves[0] in got
            assert leaves[2] not in got
            with pytest.raises(Unavailable):
                await cache.reader.leaf(file, leaves[2])
            await cache.reader.leaf(file, leaves[3])

    trio.run(main)


def test_a_stalled_leaf_fails_at_its_deadline_and_delays_no_other(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    chain.stalled.add(leaves[1].cid)

    async def main() -> None:
        async with (
            PinsetCache.open(tmp_path, chain, BUDGET, deadline=7) as cache,
            trio.open_nursery() as nursery,
        ):
            ended: list[str] = []

            async def stalled() -> None:
                with pytest.raises(Unavailable):
                    await cache.reader.leaf(file, leaves[1])
                ended.append("stalled")

            nursery.start_soon(stalled)
            await wait_all_tasks_blocked()
            await cache.reader.leaf(file, leaves[0])
            clock.jump(6.9)
            await wait_all_tasks_blocked()
            assert ended == []
            clock.jump(0.2)
            await wait_all_tasks_blocked()
            assert ended == ["stalled"]
            await stalled()  # the failure is remembered: no time passes here

    clock = MockClock()  # its time passes only by jumps
    trio.run(main, clock=clock)


def test_a_request_is_cancelled_when_its_last_reader_is_cancelled(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    chain.stalled.add(leaves[0].cid)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cache.reader.leaf, file, leaves[0])
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await wait_all_tasks_blocked()
            assert chain.cancelled == [leaves[0].cid]
            assert list(staged_items(cache)) == []

    trio.run(main)
