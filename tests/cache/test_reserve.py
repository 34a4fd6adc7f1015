"""A reserve of the disk stays free, and the budget follows what the disk has: on small file systems of their
own."""

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
"""What is counted ahead for the extent trees of files under way may be taken from the reserve."""


def free(folder: Path) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def filled(folder: Path, size: int) -> Path:
    """A file of another program's, of `size` bytes that are really taken."""
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


def test_by_default_a_twentieth_stays_free_and_at_most_2_gib(tmp_path: Path) -> None:
    info = os.statvfs(tmp_path)
    total = info.f_blocks * info.f_frsize
    assert FreeSpace(tmp_path, None).reserve == min(total // 20, MAX_RESERVE)
    assert FreeSpace(tmp_path, 12345).reserve == 12345
    assert FreeSpace(tmp_path, 0).reserve == 0


def test_what_is_reserved_and_not_written_yet_is_still_free() -> None:
    async def evict(_key: Key) -> None:
        raise AssertionError("nothing need leave")

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


def test_a_small_disk_is_never_filled_and_what_was_read_last_is_kept(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder, chain, BUDGET) as cache:
                await stage(cache, chain, 60)
                last = make_file(chain, MIB, 1 << 18, 59)[0]
                assert staged_bytes(cache, last.cid) >= MIB
                told = cache.statistics()
                assert (told.budget, told.reserve, told.trouble) == (BUDGET, DISK // 20, "")
                assert DISK * 0.8 < told.effective_budget <= DISK - DISK // 20 + SLACK
                assert taken(folder) <= told.used <= told.effective_budget
                assert told.evictions > 30

        sampler = Sampler(folder)
        sampler.start()
        try:
            trio.run(main)
        finally:
            sampler.ended.set()
            sampler.join()
        assert sampler.samples > 3
        assert DISK // 2 < sampler.most <= DISK - DISK // 20 + SLACK


def test_room_is_given_back_to_others_and_taken_again(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:
        (folder / "cache").mkdir()

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder / "cache", chain, BUDGET, reserve=2 * MIB) as cache:
                await stage(cache, chain, 26)
                before = cache.statistics()
                other = filled(folder, free(folder) - MIB)
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
def test_while_others_write_the_reserve_is_looked_after_by_our_own_writes(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", 64 * MIB) as folder:
        (folder / "cache").mkdir()

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder / "cache", chain, BUDGET, reserve=8 * MIB) as cache:
                for step in range(1, 9):
                    await stage(cache, chain, 10, 20 * step)
                    filled(folder, 6 * step * MIB)
                    await stage(
                        cache, chain, 10, 20 * step + 10
                    )  # more than one look's worth: no timer is needed
                    assert free(folder) >= 8 * MIB - SLACK, step
                    assert cache.trouble == ""

        trio.run(main)


@pytest.mark.logs("the disk is too full to cache anything", "reads go on without the cache")
def test_a_disk_that_others_have_filled_costs_speed_and_the_cache_comes_back(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", DISK) as folder:
        (folder / "cache").mkdir()
        other = filled(folder, free(folder) - MIB)

        async def main() -> None:
            chain = Chain()
            async with PinsetCache.open(folder / "cache", chain, BUDGET) as cache:
                await stage(cache, chain, 3)
                told = cache.statistics()
                assert told.evictions == 0
                assert "the disk is too full to cache anything" in told.trouble
                assert f"{DISK / 20 / MIB:.1f} MiB stay reserved" in told.trouble
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


def test_a_pin_that_the_disk_has_no_room_for_is_refused_by_what_there_is(tmp_path: Path) -> None:
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


def test_everything_that_lies_in_the_folder_is_counted(tmp_path: Path) -> None:
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
