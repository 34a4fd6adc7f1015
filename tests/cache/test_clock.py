"""Setting the wall clock forwards or backwards changes no order of use. No time becomes negative or later
than now."""

import shutil
import time
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import staging
from ipfsfuse.cache.store import store as stores
from tests.cache.standin import Chain, make_file, staged_bytes, staged_items
from tests.cache.test_pinset import read

MIB = 1 << 20
BUDGET = 64 * MIB
YEAR = 365 * 86400.0


class Clock:
    """The wall clock, shifted by `shift` seconds."""

    def __init__(self) -> None:
        self.shift = 0.0
        self._real = time.time

    def __call__(self) -> float:
        return self._real() + self.shift


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


async def use_in_turn(cache: PinsetCache, chain: Chain, clock: Clock) -> list[int]:
    """Reads six files of 1 MiB one after the other. Sets the clock before each, and returns by how many
    years."""
    jumps = [0, 30, -20, 10, -49, 0]
    for seed, years in enumerate(jumps):
        clock.shift = years * YEAR
        file, leaves, content = make_file(chain, MIB, seed=seed)
        cache.reader.opened(file)
        assert await read(cache, file, leaves) == content
        await trio.sleep(0.02)
    return jumps


def in_order_of_use(cache: PinsetCache, chain: Chain) -> list[int]:
    """The seeds of the staged files, the last used first. Checks that no time is negative or in the
    future."""
    kept = staged_items(cache)
    times = [each.last_used for each in kept]
    assert times == pytest.approx(sorted(times, reverse=True), abs=0.01)
    assert all(0 <= each <= time.time() for each in times)
    seeds = {make_file(chain, MIB, seed=seed)[0].cid: seed for seed in range(6)}
    return [seeds[each.cid] for each in kept]


def test_the_order_of_use_survives_a_clock_that_jumps(tmp_path: Path, clock: Clock) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await use_in_turn(cache, chain, clock)
            assert in_order_of_use(cache, chain) == [5, 4, 3, 2, 1, 0]
            assert all(time.time() - each.last_used < 60 for each in staged_items(cache)), (
                "times are by the clock as it is set now"
            )
        clock.shift = -30 * YEAR
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert in_order_of_use(cache, chain) == [5, 4, 3, 2, 1, 0]
        async with PinsetCache.open(tmp_path, chain, int(4.5 * MIB)) as cache:
            assert in_order_of_use(cache, chain) == [5, 4, 3], (
                "the files that were used first are evicted first"
            )

    trio.run(main)


def test_after_a_crash_no_time_lies_in_the_future(tmp_path: Path, clock: Clock) -> None:
    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path / "cache", chain, BUDGET) as cache:
            await use_in_turn(cache, chain, clock)
            shutil.copytree(tmp_path / "cache", tmp_path / "crashed")
        async with PinsetCache.open(tmp_path / "crashed", chain, BUDGET) as cache:
            assert sorted(in_order_of_use(cache, chain)) == [0, 1, 2, 3, 4, 5]
            last, leaves, _content = make_file(chain, MIB, seed=3)
            cache.reader.opened(last)
            assert in_order_of_use(cache, chain)[0] == 3
            assert staged_bytes(cache, last.cid) >= MIB
            assert len(leaves) == 16

    (tmp_path / "cache").mkdir()
    trio.run(main)


def test_a_use_is_written_to_the_disk_after_the_clock_was_set_back(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "NOTE_USE", 0.1)

    async def main() -> None:
        chain = Chain()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            file, leaves, _content = make_file(chain, MIB, seed=1)
            await read(cache, file, leaves)
            clock.shift = -40 * YEAR
            with trio.fail_after(20):
                while next((tmp_path / "staging").iterdir()).stat().st_mtime > time.time():
                    await trio.sleep(0.03)  # less than NOTE_USE: frequent uses are noted too
                    cache.reader.opened(file)

    trio.run(main)


def test_times_that_are_read_in_two_calls_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, a process may wait between its reads of the two clocks."""
    wall = time.time()
    (first,) = staging.from_wall([wall - 10.0])
    monkeypatch.setattr(time, "time", lambda: wall + 0.3)
    (second,) = staging.from_wall([wall - 9.9])
    assert second > first
