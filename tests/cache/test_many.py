"""Many names, many files: what is told of them, and at what cost to others."""

from pathlib import Path

import pytest
import trio

from ipfsfuse.cache import names
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.cache.standin import Chain, random_bytes

BUDGET = 64 << 20


def test_of_many_names_those_that_are_staged_no_more_are_forgotten_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_NAMES", 100)

    async def main() -> None:
        chain = Chain()
        staged = [chain.add(random_bytes(100, number)) for number in range(150)]
        gone = [chain.add(random_bytes(100, 1000 + number)) for number in range(150)]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            looked: list[Cid] = []
            holds = cache.store.holds
            monkeypatch.setattr(cache.store, "holds", lambda cid: looked.append(cid) or holds(cid))
            for one, other in zip(staged, gone, strict=True):
                await cache.block(one)
                for cid in (one, other):
                    before = len(looked)
                    cache.note_root(cid, cids.text(cid))
                    assert len(looked) - before <= names.LOOK_AT
            assert {cid for cid, _spelling in cache.named_roots()} == set(staged)
            assert len(cache._names._names) < 150 + 100
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert {cid for cid, _spelling in cache.named_roots()} == set(staged)

    trio.run(main)


def test_a_long_list_is_told_while_other_calls_have_their_turn(tmp_path: Path) -> None:
    async def main() -> None:
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            for number in range(20_000):
                cid = cids.make(cids.RAW, b"\x12\x20" + number.to_bytes(32, "big"))
                cache.store.staging.entry(cid, 100_000).last_used = number % 1000
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    await trio.lowlevel.checkpoint()
                    turns += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                listed = await cache.listed()
                nursery.cancel_scope.cancel()
            assert turns >= 20_000 // 500
            assert listed == cache.kept()
            assert len(listed) == 20_000

    trio.run(main)
