"""A reserve of the disk stays free, and the budget follows the free space. The tests mount small file
systems."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.budget import MAX_RESERVE, Budget, FreeSpace, Key
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import recovery
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import StoreFailed
from tests.cache.standin import Chain, make_file, staged_bytes
from tests.cache.test_budget import Sampler, own_filesystem, taken
from tests.cache.test_pinset import read

MIB = 1 << 20
BUDGET = 10 << 30
DISK = 30 * MIB
SLACK = 64 << 10
"""Bytes that may be taken from the reserve: those that are counted ahead for the extent trees of files under
way."""


def free(folder: Path) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def fill_disk(folder: Path, size: int) -> Path:
    """Writes a file of another program that takes `size` bytes of the disk."""
    path = folder / "of-another-program"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


async def stage(cache: PinsetCache, chain: Chain, mebibytes: int, seed: int = 0) -> None:
    for number in range(mebibytes):
        file, leaves, content = make_file(chain, MIB, 1 << 18, seed + number)
        assert await read(cache, file, leaves) == content


async def pin(cache: PinsetCache, file: FileRef, leaves: Sequence[Leaf]) -> None:
    async with cache.pinned.pin(file.cid) as pinning:
        await pinning.file(file)
        for leaf in leaves:
            await cache.reader.leaf(file, leaf)
        pinning.check()


def test_the_default_reserve_is_a_twentieth_of_the_disk_and_at_most_2_gib(tmp_path: Path) -> None:
    info = os.statvfs(tmp_path)
    total = info.f_blocks * info.f_frsize
    assert FreeSpace(tmp_path, None).reserve == min(total // 20, MAX_RESERVE)
    assert FreeSpace(tmp_path, 12345).reserve == 12345
    assert FreeSpace(tmp_path, 0).reserve == 0


def test_reserved_bytes_that_are_not_written_yet_count_as_free() -> None:
    async def evict(_key: Key) -> None:
        raise AssertionError("nothing needs to be evicted")

    async def main() -> None:
        written = 0
        budget = Budget(BUDGET, evict, lambda: 64 * MIB - written)
        budget.counted.set()
        size = await budget.reserve(1, 0, 8 * MIB)
        assert size >= 8 * MIB
        for _ in range(2):
            await budget.refit(0, MIB)
            assert budget.limit == 64 * MIB
            budget.adjust(1, 0, size)
            written = size
            await budget.refit(0, MIB)
            assert budget.limit == 64 * MIB
            budget.adjust(1, -size)
            written = 0
            assert await budget.reserve(1, 0, 8 * MIB) == size

    trio.run(main)


def test_a_small_disk_is_never_filled_and_the_last_file_that_was_read_is_kept(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder, chain, BUDGET) as cache:
                await stage(cache, chain, 60)
                last = make_file(chain, MIB, 1 << 18, 59)[0]
                assert staged_bytes(cache, last.cid) >= MIB
                statistics = cache.statistics()
                assert (statistics.budget, statistics.reserve, statistics.trouble) == (BUDGET, DISK // 20, "")
                assert DISK * 0.8 < statistics.effective_budget <= DISK - DISK // 20 + SLACK
                assert taken(folder) <= statistics.used <= statistics.effective_budget
                assert statistics.evictions > 30

        sampler = Sampler(folder)
        sampler.start()
        try:
            trio.run(main)
        finally:
            sampler.ended.set()
            sampler.join()
        assert sampler.samples > 3
        assert DISK // 2 < sampler.most <= DISK - DISK // 20 + SLACK


def test_room_is_given_to_other_programs_and_taken_again(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:
        (folder / "cache").mkdir()

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder / "cache", chain, BUDGET, reserve=2 * MIB) as cache:
                await stage(cache, chain, 26)
                before = cache.statistics()
                other = fill_disk(folder, free(folder) - MIB)
                await recovery.measure(cache.store)
                now = cache.statistics()
                assert free(folder) >= 2 * MIB
                assert taken(folder / "cache") <= now.used <= now.effective_budget < before.effective_budget
                other.unlink()
                await recovery.measure(cache.store)
                assert cache.statistics().effective_budget == pytest.approx(before.effective_budget, abs=MIB)
                await stage(cache, chain, 26)
                assert cache.statistics().used > 24 * MIB

        trio.run(main)


@pytest.mark.logs("the disk is too full to cache anything")
def test_our_own_writes_keep_the_reserve_free_while_other_programs_write(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", 64 * MIB) as folder:
        (folder / "cache").mkdir()

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder / "cache", chain, BUDGET, reserve=8 * MIB) as cache:
                for step in range(1, 9):
                    await stage(cache, chain, 10, 20 * step)
                    fill_disk(folder, 6 * step * MIB)
                    await stage(cache, chain, 10, 20 * step + 10)  # enough for another measurement
                    assert free(folder) >= 8 * MIB - SLACK, step
                    assert cache.trouble == ""

        trio.run(main)


@pytest.mark.logs("the disk is too full to cache anything", "reads go on without the cache")
def test_reads_go_on_when_other_programs_filled_the_disk_and_staging_resumes(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:
        (folder / "cache").mkdir()
        other = fill_disk(folder, free(folder) - MIB)

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder / "cache", chain, BUDGET) as cache:
                await stage(cache, chain, 3)
                statistics = cache.statistics()
                assert statistics.evictions == 0
                assert "the disk is too full to cache anything" in statistics.trouble
                assert f"{DISK / 20 / MIB:.1f} MiB stay reserved" in statistics.trouble
                other.unlink()
                await recovery.measure(cache.store)
                assert cache.trouble == ""
                await stage(cache, chain, 3)
                assert cache.statistics().used > 3 * MIB

        trio.run(main)


@pytest.mark.logs("reads go on without the cache")
def test_without_a_reserve_the_last_byte_may_be_used(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder, chain, BUDGET, reserve=0) as cache:
                await stage(cache, chain, 40)
                assert cache.statistics().effective_budget > DISK - MIB
                assert cache.trouble == ""

        trio.run(main)


def test_a_pin_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:

        async def main() -> None:
            chain = Chain()
            file, leaves, _content = make_file(chain, 40 * MIB, MIB)
            async with PinsetCache.open(folder, chain, BUDGET) as cache:
                with pytest.raises(
                    StoreFailed, match=r"of the budget of 29\d{6} bytes .*: make room on the disk"
                ):
                    await pin(cache, file, leaves)
                assert free(folder) >= DISK // 20 - SLACK

        trio.run(main)


def test_everything_in_the_cache_folder_is_counted(tmp_path: Path) -> None:
    budget = 8 * MIB
    names = [
        "log",
        "log.1",
        "pins/node/pins.sqlite",
        "indexes/some.index",
        "inode-key",
        "names/later",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(700_000))

    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, budget) as cache:
            await stage(cache, chain, 12)
            assert taken(tmp_path) <= cache.statistics().used <= budget
            with (tmp_path / "log").open("ab") as log:
                log.write(bytes(400_000))
            await recovery.measure(cache.store)
            assert taken(tmp_path) <= cache.statistics().used <= budget
        assert taken(tmp_path) <= budget

    trio.run(main)
