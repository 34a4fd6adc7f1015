"""A sweep of one user does not evict what others have read. A single user has the whole cache."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.sources.base import request_of
from tests.cache.standin import Chain, make_file, random_bytes

MIB = 1 << 20
BUDGET = 16 * MIB
ALICE, BOB = 1000, 1001
Read = Callable[[], Awaitable[object]]


def reads_of_files(chain: Chain, cache: PinsetCache, seed: int, size: int) -> list[Read]:
    """Reads of files of 1 MiB, `size` bytes in all."""
    reads: list[Read] = []
    for number in range(size // MIB):
        file, leaves, _content = make_file(chain, MIB, 1 << 18, seed=seed + number)
        reads += [lambda file=file, leaf=leaf: cache.reader.leaf(file, leaf) for leaf in leaves]  # type: ignore[misc]
    return reads


def reads_of_small_blocks(chain: Chain, cache: PinsetCache, seed: int, size: int) -> list[Read]:
    """Reads of small blocks, `size` bytes in all."""
    refs = [
        FileRef(chain.add(random_bytes(20_000, 10_000 * seed + number)), 20_000)
        for number in range(size // 20_000)
    ]
    return [lambda ref=ref: cache.reader.block(ref.cid) for ref in refs]  # type: ignore[misc]


async def read_all(reads: list[Read], caller: int | None) -> None:
    with request_of(caller):
        for read in reads:
            await read()


@pytest.mark.parametrize("kind", [reads_of_files, reads_of_small_blocks])
def test_a_sweep_of_one_user_does_not_evict_what_another_has_read(
    tmp_path: Path, kind: Callable[..., list[Read]]
) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            alices = kind(chain, cache, 1, 4 * MIB)
            await read_all(alices, ALICE)
            await read_all(kind(chain, cache, 1000, 3 * BUDGET), BOB)
            statistics = cache.statistics()
            assert statistics.used <= BUDGET
            assert statistics.evictions > 10
            assert statistics.callers[str(ALICE)] >= 4 * MIB
            assert statistics.callers[str(BOB)] > statistics.per_caller_bytes > BUDGET * 0.4, (
                "bob has the room that was free"
            )
            chain.asked.clear()
            await read_all(alices, ALICE)
            assert chain.asked == []

    trio.run(main)


def test_small_blocks_that_two_users_read_at_the_same_time_are_kept_apart(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            alices, bobs = (
                reads_of_small_blocks(chain, cache, 1, 2 * MIB),
                reads_of_small_blocks(chain, cache, 2, 8 * MIB),
            )
            for number, read in enumerate(alices):
                await read_all([read], ALICE)
                await read_all(bobs[4 * number : 4 * number + 4], BOB)
            await read_all(reads_of_small_blocks(chain, cache, 3, 2 * BUDGET), BOB)
            chain.asked.clear()
            await read_all(alices, ALICE)
            assert chain.asked == []

    trio.run(main)


def test_a_user_that_filled_the_cache_gives_half_to_the_next_user(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(reads_of_files(chain, cache, 1000, 2 * BUDGET), BOB)
            assert cache.statistics().callers[str(BOB)] > BUDGET * 0.8
            alices = reads_of_files(chain, cache, 1, 6 * MIB)
            for _ in range(2):
                await read_all(alices, ALICE)
                await read_all(reads_of_files(chain, cache, 2000, BUDGET), BOB)
            chain.asked.clear()
            await read_all(alices, ALICE)
            assert chain.asked == []

    trio.run(main)


def test_a_single_user_has_the_whole_cache_even_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(reads_of_files(chain, cache, 1000, BUDGET), ALICE)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(reads_of_files(chain, cache, 2000, 2 * BUDGET), ALICE)
            assert cache.statistics().callers[str(ALICE)] > BUDGET * 0.8

    trio.run(main)


def test_the_result_of_a_shared_fetch_belongs_to_the_user_that_began_it(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        chain.delay = 0.1
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            reads = reads_of_files(chain, cache, 1, MIB)[:1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_all, reads, ALICE)
                await trio.sleep(0.01)
                nursery.start_soon(read_all, reads, BOB)
            assert len(chain.asked) == 1
            (file,) = cache.store.staging.entries.values()
            assert file.disk >= 1 << 18
            assert cache.statistics().callers == {str(ALICE): cache.store.budget.size(file.cid)}

    trio.run(main)
