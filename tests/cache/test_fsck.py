"""fsck when packs are damaged, or when the index has lost blocks that are in packs."""

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.packs import PackLocation
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.cache.standin import Chain, Recorder, flip, random_bytes, staged
from tests.cache.test_keeping import churn, fetches, file_node, read_all, tree

BUDGET = 16 << 20
COUNT = 60

DAMAGE = {
    "length": lambda head: bytes([head[0] ^ 0x10]) + head[1:],
    "codec": lambda head: head[:3] + bytes([head[3] ^ 0x80]) + head[4:],
    "digest": lambda head: head[:-1] + bytes([head[-1] ^ 1]),
    "all": lambda head: bytes(len(head)),
}


def make(chain: Chain) -> list[Cid]:
    """Blocks of both codecs."""
    return [
        chain.add(random_bytes(3000, number), [cids.RAW, cids.DAG_PB][number % 2]) for number in range(COUNT)
    ]


async def fill(folder: Path, chain: Chain, blocks: Sequence[Cid]) -> list[PackLocation]:
    """Stages the blocks, all in one pack, and returns their locations."""
    async with PinsetCache.open(folder, chain, BUDGET << 3) as cache:
        for cid in blocks:
            await cache.reader.block(cid)
        locations = [cache.store.blocks.locate(cid) for cid in blocks]
    chain.asked.clear()
    assert {location.pack for location in locations if location} == {1}
    return [location for location in locations if location]


def damage_head(folder: Path, location: PackLocation, how: str) -> None:
    size = 2 + 36
    with (folder / "packs" / "1.pack").open("r+b") as pack:
        pack.seek(location.at - size)
        head = pack.read(size)
        pack.seek(location.at - size)
        pack.write(DAMAGE[how](head))


@pytest.mark.logs("wrong bytes in the cache")
@pytest.mark.parametrize("how", DAMAGE)
def test_blocks_behind_a_damaged_head_are_checked_and_the_head_is_written_anew(
    tmp_path: Path, how: str
) -> None:
    async def main() -> None:
        chain = Chain()
        blocks = make(chain)
        locations = await fill(tmp_path, chain, blocks)
        for number in (7, 8, 30):
            damage_head(tmp_path, locations[number], how)
        for number in (3, 20, 50):
            flip(tmp_path / "packs" / "1.pack", locations[number].at + 77)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            report = await cache.fsck()
            assert (report.blocks, report.wrong, report.mended, report.heads, report.found) == (
                COUNT,
                3,
                3,
                3,
                0,
            )
            assert chain.asked == [blocks[number] for number in (3, 20, 50)]
            chain.asked.clear()
            report = await cache.fsck()
            assert (report.blocks, report.wrong, report.heads) == (COUNT, 0, 0)

    async def from_the_heads_alone() -> None:
        chain = Chain()
        blocks = make(chain)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            with trio.fail_after(10):
                while cache.store.blocks.index.anew:
                    await trio.lowlevel.checkpoint()
            for cid in blocks:
                assert await cache.reader.block(cid) == chain.blocks[cids.multihash(cid)]
        assert chain.asked == []

    trio.run(main)
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    trio.run(from_the_heads_alone)


def test_right_blocks_that_the_index_lost_are_found_again(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        blocks = make(chain)
        locations = await fill(tmp_path, chain, blocks)
        with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as database, database:
            for number in (0, 11, 12, 59):
                assert (
                    database.execute(
                        "DELETE FROM blocks WHERE key = ?", (cids.multihash(blocks[number]),)
                    ).rowcount
                    == 1
                )
        damage_head(tmp_path, locations[5], "all")
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            report = await cache.fsck()
            assert (report.blocks, report.wrong, report.heads, report.found) == (COUNT, 0, 1, 4)
            for cid in blocks:
                await cache.reader.block(cid)
        assert chain.asked == []

    trio.run(main)


@pytest.mark.logs("wrong bytes in the cache")
@pytest.mark.parametrize("by", ["fsck", "reading"])
def test_a_wrong_block_of_a_pin_is_mended_and_stays_pinned(tmp_path: Path, by: str) -> None:
    async def main() -> None:
        chain = Chain()
        root = tree(chain, 2, seed=100)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, root, pin=True)
        for path in staged(tmp_path, "packs"):
            for _cid, location in list(cache.store.blocks.packs.sections(int(path.stem))):
                flip(path, location.at + location.size // 2)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            if by == "fsck":
                report = await cache.fsck()
                assert report.wrong == report.mended > 3
            else:
                await read_all(cache, root)
            await churn(cache, chain)
            await cache.store.evict()
            assert await fetches(cache, chain, root) == 0

    trio.run(main)


def test_all_blocks_of_a_damaged_pack_that_is_evicted_are_unpinned_and_leave_the_index(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        chain, pins = Chain(), Recorder()
        blocks = make(chain)
        locations = await fill(tmp_path, chain, blocks)
        damage_head(tmp_path, locations[10], "all")
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            await cache.store.evict(blocks[0])
            assert {cid for verb, cid in pins.asked if verb == "remove"} >= set(blocks)
        with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as database:
            assert database.execute("SELECT COUNT(*) FROM blocks").fetchone() == (0,)

    trio.run(main)


def test_a_file_stays_held_at_the_node_after_the_pack_with_its_root_is_evicted(tmp_path: Path) -> None:
    async def main() -> None:
        chain, pins = Chain(), Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            file = file_node(chain, 1 << 20, 5)
            await read_all(cache, file)
            location = cache.store.blocks.locate(file)
            assert location is not None
            await cache.store.budget.evict(location.pack)
            assert cache.store.blocks.locate(file) is None
            assert pins.asked == [("add", file)]
            await cache.store.evict(file)
            assert pins.asked == [("add", file), ("remove", file)]

    trio.run(main)
