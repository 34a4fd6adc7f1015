"""Many names, many files and many blocks: how they are listed, and what they cost."""

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache import pinset
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.staging import Extents, StagingEntry
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.cache.standin import Chain, random_bytes, staged_items
from tests.cache.test_budget import taken

BUDGET = 64 << 20
SMALL_BLOCKS = int(os.environ.get("IPFSFUSE_SMALL_BLOCKS", "100000"))


def test_names_of_content_that_is_not_staged_any_more_are_forgotten_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinset, "MAX_STAGED_NAMES", 100)

    async def main() -> None:
        chain = Chain()
        staged = [chain.add(random_bytes(100, number)) for number in range(150)]
        gone = [chain.add(random_bytes(100, 1000 + number)) for number in range(150)]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            checked: list[Cid] = []
            holds = cache.store.holds
            monkeypatch.setattr(cache.store, "holds", lambda cid: checked.append(cid) or holds(cid))
            for one, other in zip(staged, gone, strict=True):
                await cache.reader.block(one)
                for cid in (one, other):
                    before = len(checked)
                    cache.names.note(cid, cids.text(cid))
                    assert len(checked) - before <= pinset.LOOK_AT
            assert {cid for cid, _spelling in cache.named_roots()} == set(staged)
            assert len(cache.names._names) < 150 + 100
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert {cid for cid, _spelling in cache.named_roots()} == set(staged)

    trio.run(main)


def test_other_tasks_run_while_a_long_list_is_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            entries = cache.store.staging.entries
            for number in range(20_000):
                cid = cids.make(cids.RAW, b"\x12\x20" + number.to_bytes(32, "big"))
                used = number % 1000
                entries[cid] = StagingEntry(cid, 100_000, extents=Extents(), proved=Extents(), last_used=used)
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                listed = await cache.store.listed()
                nursery.cancel_scope.cancel()
            assert turns >= 20_000 // 500
            assert listed == staged_items(cache)
            assert len(listed) == 20_000

    trio.run(main)


def test_small_blocks_take_little_more_than_their_bytes_and_few_directory_entries(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """IPFSFUSE_SMALL_BLOCKS says how many blocks. They have 8 to 4,095 bytes."""

    async def main() -> int:
        dice, chain, content = random.Random(1), Chain(), 0
        async with PinsetCache.open(tmp_path, chain, 64 << 30) as cache:
            for number in range(SMALL_BLOCKS):
                block = number.to_bytes(8, "big") + dice.randbytes(dice.randrange(4088))
                cid = cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(block).digest())
                assert await cache.store.blocks.put(cid, block)
                content += len(block)
        async with PinsetCache.open(tmp_path, chain, 64 << 30) as cache:
            assert (await cache.store.blocks.count()).blocks == SMALL_BLOCKS
            assert await cache.reader.block(cid) == block
            assert chain.asked == []
        return content

    content = trio.run(main)
    entries = sum(1 for _path in tmp_path.rglob("*"))
    record_property("bytes for each byte", round(taken(tmp_path) / content, 3))
    record_property("directory entries", entries)
    assert taken(tmp_path) <= 1.3 * content
    assert entries < SMALL_BLOCKS / 100


def test_blocks_that_come_together_fill_pack_after_pack(tmp_path: Path) -> None:
    async def main() -> None:
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            packs = cache.store.blocks.packs
            together = [
                [random_bytes(10_000, 100 * answer + number) for number in range(70)] for answer in range(12)
            ]
            kept = [
                (cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(block).digest()), block)
                for blocks in together
                for block in blocks
            ]
            for answer in range(12):
                await cache.store.blocks.put_many(kept[70 * answer : 70 * answer + 70])
            *filled, _last = sorted(packs.sizes)
            assert len(filled) >= 7
            assert all(packs.limit - 10_100 <= packs.sizes[pack] <= packs.limit for pack in filled)
            for cid, block in kept:
                assert await cache.store.blocks.get(cid) == block

    trio.run(main)
