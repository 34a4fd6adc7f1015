"""The budget is never exceeded. A small budget costs only speed."""

import contextlib
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.budget import Budget
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.reader import OF_BUDGET
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from tests.cache.standin import Chain, make_file, random_bytes, staged_bytes
from tests.cache.test_gather import nothing_more, small, subtree
from tests.mounting import wait_until

MIB = 1 << 20
BUDGET = 12 * MIB


@contextlib.contextmanager
def own_filesystem(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "ipfsfuse-test", str(folder)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        umount = ["umount", str(folder)]
        wait_until(lambda: not subprocess.run(umount, check=False).returncode, f"{folder} is unmounted")


class Sampler(threading.Thread):
    """A thread that measures again and again how much of a file system is taken, and keeps the most."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.most = 0
        self.samples = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.0005):
            info = os.statvfs(self.folder)
            self.most = max(self.most, (info.f_blocks - info.f_bfree) * info.f_frsize)
            self.samples += 1


def taken(folder: Path) -> int:
    """Bytes on disk of everything in `folder`, the folders included."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += path.lstat().st_blocks * 512
    return total


def make_load(chain: Chain) -> tuple[list[tuple[FileRef, list[Leaf], bytes]], list[FileRef]]:
    """Content of about 4 times the budget: files of many sizes, and small files."""
    shapes = [
        (size, chunk, number)
        for number, (size, chunk) in enumerate([(3 * MIB, 1 << 18), (MIB, 1 << 16), (700_001, 50_003)] * 8)
    ]
    files = [make_file(chain, size, chunk, seed) for size, chunk, seed in shapes]
    small = [FileRef(chain.add(random_bytes(20_000, 1000 + number)), 20_000) for number in range(300)]
    return files, small


async def fifty_readers(cache: PinsetCache, chain: Chain, rounds: int) -> None:
    files, small = make_load(chain)

    async def reader(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(rounds):
            file, leaves, content = dice.choice(files)
            leaf = dice.choice(leaves)
            assert (
                bytes(await cache.reader.leaf(file, leaf)) == content[leaf.offset : leaf.offset + leaf.size]
            )
            for one in dice.sample(small, 3):
                await cache.reader.leaf(one, Leaf(one.cid, 0, one.size))
            assert cache.statistics().used <= BUDGET

    async with trio.open_nursery() as nursery:
        for seed in range(50):
            nursery.start_soon(reader, seed)


def test_fifty_readers_never_take_more_than_the_budget(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", 10 * BUDGET) as folder:

        async def main() -> None:
            async with PinsetCache.open(folder, Chain(), BUDGET) as cache:
                chain = cache.reader._blocks
                assert isinstance(chain, Chain)
                await fifty_readers(cache, chain, 40)
                assert cache.statistics().evictions > 20

        sampler = Sampler(folder)
        sampler.start()
        try:
            trio.run(main)
        finally:
            sampler.ended.set()
            sampler.join()
    assert sampler.samples > 100
    assert BUDGET // 2 < sampler.most <= BUDGET


def test_the_cache_counts_at_least_the_bytes_that_it_takes_on_disk(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await fifty_readers(cache, chain, 20)
            file, leaves, _content = make_load(chain)[0][2]
            for leaf in leaves:
                await cache.reader.leaf(file, leaf)
            entry = cache.store.staging.entries[file.cid]
            with trio.fail_after(30):  # until it is complete, its extent tree is counted ahead
                while not entry.complete or cache.store.budget.size(entry.cid) != entry.disk:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert taken(tmp_path) <= cache.statistics().used <= BUDGET
        assert taken(tmp_path) <= BUDGET
        async with PinsetCache.open(tmp_path, chain, BUDGET // 3) as cache:
            assert taken(tmp_path) <= cache.statistics().used <= BUDGET // 3

    trio.run(main)


def test_a_file_larger_than_the_budget_and_an_evicted_open_file_can_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, 2 * BUDGET, 1 << 20)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            cache.reader.opened(file)
            got = b"".join([bytes(await cache.reader.leaf(file, leaf)) for leaf in leaves])
            assert got == content
            assert 0 < staged_bytes(cache, file.cid) <= BUDGET
            await cache.store.evict(file.cid)
            assert staged_bytes(cache, file.cid) == 0
            assert bytes(await cache.reader.leaf(file, leaves[3])) == content[3 * MIB : 4 * MIB]

    trio.run(main)


@pytest.mark.parametrize("budget", [600_000, 2 * MIB])
def test_a_budget_of_a_few_blocks_works(tmp_path: Path, budget: int) -> None:
    async def main() -> None:
        chain = Chain()
        small = [FileRef(chain.add(random_bytes(9000, number)), 9000) for number in range(200)]
        large = [chain.add(random_bytes(150_000, 1000 + number), cids.DAG_PB) for number in range(5)]
        file, leaves, _content = make_file(chain, 3 * MIB, 1 << 18)
        async with PinsetCache.open(tmp_path, chain, budget) as cache:
            for _ in range(2):
                for number, one in enumerate(small):
                    await cache.reader.block(one.cid)
                    if number % 20 == 0:
                        await cache.reader.leaf(file, leaves[number // 20])
                        await cache.reader.block(large[number // 40])
                        await trio.sleep(0.02)
                    assert cache.statistics().used <= budget
                assert taken(tmp_path) <= budget
            assert cache.statistics().evictions > 10
            chain.asked.clear()
            await cache.reader.block(small[-1].cid)
            assert chain.asked == []

    trio.run(main)


def test_a_file_that_was_used_again_survives_a_scan_and_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        hot, hot_leaves, _content = make_file(chain, 2 * MIB, 1 << 18, seed=1)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for leaf in hot_leaves:
                await cache.reader.leaf(hot, leaf)
            cache.reader.opened(hot)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for seed in range(10, 30):
                file, leaves, _content = make_file(chain, 2 * MIB, 1 << 18, seed=seed)
                for leaf in leaves:
                    await cache.reader.leaf(file, leaf)
            chain.asked.clear()
            for leaf in hot_leaves:
                await cache.reader.leaf(hot, leaf)
            assert chain.asked == []

    trio.run(main)


def test_a_subtree_that_could_fill_much_of_the_budget_is_not_fetched_by_one_request(tmp_path: Path) -> None:
    chain = Chain()
    wanted = small(chain, 20)
    chain.sends = list(wanted)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            whole = subtree(chain)
            ended = cache.reader.gather(replace(whole, limit=BUDGET // OF_BUDGET + 1), wanted, nothing_more)
            assert ended.is_set()
            await cache.reader.block(wanted[0])
            assert (chain.asked, len(chain.subtrees)) == ([wanted[0]], 0)
            await cache.reader.gather(replace(whole, limit=BUDGET // OF_BUDGET), wanted, nothing_more).wait()
            assert len(chain.subtrees) == 1

    trio.run(main)


def test_a_new_budget_keeps_a_measurement_that_came_before_it() -> None:
    async def main() -> None:
        async def evict(_key: object) -> None:
            await trio.sleep(0.05)

        budget = Budget(100 * MIB, evict, lambda: None)
        budget.counted.set()
        for key in range(20):
            budget.adjust(key, 0, reserved=await budget.reserve(key, 0, 4 * MIB))

        async def needs_room() -> None:
            budget.adjust(20, 0, reserved=await budget.reserve(20, 0, 24 * MIB))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(needs_room)  # it gets the first turn, and evicts
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(budget.refit, 40 * MIB, 0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(budget.resize, 90 * MIB)
        assert budget.used == budget.arc.bytes + 40 * MIB <= 90 * MIB

    trio.run(main)
