"""Reads of parts of a leaf: once the whole leaf was verified, only the pieces that are read are checked."""

import os
import random
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import store as stores
from ipfsfuse.cache.store.staging import PIECE
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.fileio.tags import TAG_BYTES
from tests.cache.standin import Chain, flip, make_file, staged

FLIPS = int(os.environ.get("IPFSFUSE_FLIPS", "2000"))
BUDGET = 64 << 20
LEAF = 16 * PIECE


async def read_whole(cache: PinsetCache, file: FileRef, leaves: list[Leaf]) -> None:
    """Reads the file twice: the first time it is fetched and staged, the second time it is read from the disk
    and verified. After that it has its final name."""
    for _ in range(2):
        for leaf in leaves:
            await cache.reader.leaf(file, leaf)
    await cache.store.finish(cache.store.staging.entries[file.cid])


LOGS_WRONG_BYTES = pytest.mark.logs("wrong bytes in the cache at .*, set aside")


@LOGS_WRONG_BYTES
@pytest.mark.parametrize("dag_pb", [False, True], ids=["raw", "dag-pb"])
def test_a_part_is_checked_without_the_rest_of_its_leaf(tmp_path: Path, dag_pb: bool) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, 2 * LEAF + 70_000, LEAF, dag_pb=dag_pb)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_whole(cache, file, leaves)
            flip(staged(tmp_path, "staging")[0], 2 * PIECE + 5)
            chain.asked.clear()
            for start, stop in [(0, 1), (PIECE - 1, PIECE + 1), (3 * PIECE + 9, LEAF), (10, 20)]:
                part = await cache.reader.part(file, leaves[0], start, stop)
                assert part.content == content[start:stop]
            last = leaves[-1]
            assert (await cache.reader.part(file, last, 69_990, 70_000)).content == content[-10:]
            assert not chain.asked, "the wrong piece was not read"
            # a range with the wrong piece in it: the leaf is fetched again in the same read
            part = await cache.reader.part(file, leaves[0], 100, 3 * PIECE)
            assert part.content == content[100 : 3 * PIECE]
            assert chain.asked == [leaves[0].cid]
            await cache.reader.leaf(file, leaves[0])
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            flip(staged(tmp_path, "staging")[0], LEAF + 2 * PIECE)
            chain.asked.clear()
            part = await cache.reader.part(file, leaves[1], 0, 9)
            assert part.content == content[LEAF : LEAF + 9]
            assert chain.asked == [leaves[1].cid], "the first read after a start verifies the whole leaf"

    trio.run(main)


def test_leaves_that_were_verified_in_another_file_complete_a_file(tmp_path: Path) -> None:
    """Two files have leaves in common. Their tags are known from one file when they are read in the other."""
    chain = Chain()
    one, its_leaves, content = make_file(chain, 3 * LEAF, LEAF)
    other, shared = FileRef(chain.add(b"root of another file", cids.DAG_PB), one.size), its_leaves[:2]
    new = Leaf(chain.add(bytes(LEAF)), 2 * LEAF, LEAF)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for file in (one, other):
                for leaf in shared:
                    await cache.reader.leaf(file, leaf)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for file in (one, other):
                read = [await cache.reader.leaf(file, leaf) for leaf in shared]
                assert b"".join(read) == content[: 2 * LEAF]
            await cache.reader.leaf(other, new)
        assert (tmp_path / "staging" / cids.text(other.cid)).exists()

    trio.run(main)


@LOGS_WRONG_BYTES
def test_no_flipped_bit_reaches_a_reader(tmp_path: Path) -> None:
    """Random reads of a staging file. Before, one bit of each leaf is flipped."""
    chain, chance = Chain(), random.Random(0)
    file, leaves, content = make_file(chain, 16 * LEAF, LEAF)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_whole(cache, file, leaves)
            chain.asked.clear()
            for _ in range(FLIPS // len(leaves)):
                where = [leaf.offset + chance.randrange(LEAF) for leaf in leaves]
                for at in where:
                    flip(staged(tmp_path, "staging")[0], at)
                for at, leaf in zip(where, leaves, strict=True):
                    start = max(0, at % LEAF - chance.randrange(4096))
                    part = await cache.reader.part(file, leaf, start, min(start + 4096, LEAF))
                    assert (
                        part.content == content[leaf.offset + start : leaf.offset + min(start + 4096, LEAF)]
                    )
                await cache.reader.wait_until_staged()  # the next bits are flipped in staged bytes
            assert len(chain.asked) > FLIPS // 10, "the other bits were flipped where nothing was staged yet"

    trio.run(main)


@LOGS_WRONG_BYTES
def test_a_file_whose_leaves_were_all_wrong_leaves_no_second_file(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, 4 * LEAF, LEAF)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_whole(cache, file, leaves)
            await cache.reader.wait_until_staged()
            (whole,) = staged(tmp_path, "staging")
            for leaf in leaves:
                flip(whole, leaf.offset)
                await cache.reader.part(file, leaf, 0, 9)
            await cache.reader.wait_until_staged()
            assert len(staged(tmp_path, "staging")) == 1
            await read_whole(cache, file, leaves)  # a leaf may have come too late for the removed file
            await cache.reader.wait_until_staged()
        assert staged(tmp_path, "staging")[0].read_bytes() == content

    trio.run(main)


def test_the_memory_for_tags_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_TAGS", 3 * (16 * TAG_BYTES + stores.TAGS_OVERHEAD))
    chain = Chain()
    file, leaves, content = make_file(chain, 8 * LEAF, LEAF)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_whole(cache, file, leaves)
            known = [await cache.store.part(file, leaf, 0, 9) is not None for leaf in leaves]
            assert known == [False] * 5 + [True] * 3
            for leaf in leaves:
                part = await cache.reader.part(file, leaf, 0, 9)
                assert part.content == content[leaf.offset : leaf.offset + 9]

    trio.run(main)
