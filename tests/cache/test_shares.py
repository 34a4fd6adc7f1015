"""Of several callers none pushes out what the others have by one sweep; one alone has the whole cache."""

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


def of_files(chain: Chain, cache: PinsetCache, seed: int, size: int) -> list[Read]:
    """Reads of files of 1 MiB, `size` bytes in all."""
    reads: list[Read] = []
    for number in range(size // MIB):
        file, leaves, _content = make_file(chain, MIB, 1 << 18, seed=seed + number)
        reads += [lambda file=file, leaf=leaf: cache.reader.leaf(file, leaf) for leaf in leaves]  # type: ignore[misc]
    return reads


def of_small(chain: Chain, cache: PinsetCache, seed: int, size: int) -> list[Read]:
    """Reads of small blocks, `size` bytes in all."""
    refs = [
        FileRef(chain.add(random_bytes(20_000, 10_000 * seed + number)), 20_000)
        for number in range(size // 20_000)
    ]
    return [lambda ref=ref: cache.reader.block(ref.cid) for ref in refs]  # type: ignore[misc]


async def all_of(reads: list[Read], caller: int | None) -> None:
    with request_of(caller):
        for read in reads:
            await read()


@pytest.mark.parametrize("kind", [of_files, of_small])
def test_a_sweep_of_one_user_leaves_another_what_he_has_read(
    tmp_path: Path, kind: Callable[..., list[Read]]
) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            alices = kind(chain, cache, 1, 4 * MIB)
            await all_of(alices, ALICE)
            await all_of(kind(chain, cache, 1000, 3 * BUDGET), BOB)
            told = cache.statistics()
            assert told.used <= BUDGET
            assert told.evictions > 10
            assert told.callers[str(ALICE)] >= 4 * MIB
            assert told.callers[str(BOB)] > told.per_caller_bytes > BUDGET * 0.4, "he has what was free"
            chain.asked.clear()
            await all_of(alices, ALICE)
            assert chain.asked == []

    trio.run(main)


def test_small_blocks_that_two_users_read_at_a_time_are_kept_apart(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            alices, bobs = of_small(chain, cache, 1, 2 * MIB), of_small(chain, cache, 2, 8 * MIB)
            for number, read in enumerate(alices):
                await all_of([read], ALICE)
                await all_of(bobs[4 * number : 4 * number + 4], BOB)
            await all_of(of_small(chain, cache, 3, 2 * BUDGET), BOB)
            chain.asked.clear()
            await all_of(alices, ALICE)
            assert chain.asked == []

    trio.run(main)


def test_who_filled_the_cache_alone_gives_the_next_user_half(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await all_of(of_files(chain, cache, 1000, 2 * BUDGET), BOB)
            assert cache.statistics().callers[str(BOB)] > BUDGET * 0.8
            alices = of_files(chain, cache, 1, 6 * MIB)
            for _ in range(2):
                await all_of(alices, ALICE)
                await all_of(of_files(chain, cache, 2000, BUDGET), BOB)
            chain.asked.clear()
            await all_of(alices, ALICE)
            assert chain.asked == []

    trio.run(main)


def test_one_user_alone_has_the_whole_cache_after_a_restart_too(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await all_of(of_files(chain, cache, 1000, BUDGET), ALICE)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await all_of(of_files(chain, cache, 2000, 2 * BUDGET), ALICE)
            assert cache.statistics().callers[str(ALICE)] > BUDGET * 0.8

    trio.run(main)


def test_a_fetch_that_another_user_waits_for_too_is_of_who_began_it(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        chain.delay = 0.1
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            reads = of_files(chain, cache, 1, MIB)[:1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(all_of, reads, ALICE)
                await trio.sleep(0.01)
                nursery.start_soon(all_of, reads, BOB)
            assert cache.statistics().callers.keys() == {str(ALICE)}

    trio.run(main)
