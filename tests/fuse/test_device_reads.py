"""Reads of what waits in memory, against a model: which of them reach Python, and what the others get."""

import random

import pytest
import trio

from ipfsfuse.fuse.device import ReadWindows
from tests.fuse.kernel_side import ANSWERED_HERE, ASKED_FOR, kernel


@pytest.mark.parametrize("seed", range(3))
def test_reads_of_what_is_added_as_a_model_says(seed: int) -> None:
    trio.run(_reads_of_what_is_added, random.Random(seed))


async def _reads_of_what_is_added(dice: random.Random) -> None:
    """Windows of two open files, of any buffers, side by side and with gaps; reads within one are answered,
    of some not those to its end."""
    added: dict[tuple[int, int], bytes] = {}
    told: dict[tuple[int, int], bool] = {}
    windows_of = {handle: ReadWindows(handle) for handle in (3, ANSWERED_HERE | 4)}
    async with kernel() as asking:
        for _ in range(2_000):
            handle, start = dice.choice(list(windows_of)), dice.randrange(8) * 1_000
            windows = windows_of[handle]
            if dice.random() < 0.2:
                if added.pop((handle, start), None) is None:
                    content = added[handle, start] = dice.randbytes(dice.choice([0, 1, 500, 1_000]))
                    told[handle, start] = dice.random() < 0.5
                    windows.add(
                        start, dice.choice([bytes, bytearray, memoryview])(content), told[handle, start]
                    )
                else:
                    windows.remove(start)
                continue
            offset, size = start + dice.randrange(1_000), dice.choice([1, 100, 500, 1_000])
            inside = offset + size < start + len(added.get((handle, start), b"")) + (
                not told.get((handle, start))
            )
            got, asked = await asking.read(handle, offset, size)
            assert asked != inside
            assert got == (ASKED_FOR if asked else added[handle, start][offset - start :][:size])


def test_what_is_added_is_held_until_it_is_removed_and_not_longer() -> None:
    async def main() -> None:
        windows = ReadWindows(5)
        async with kernel() as asking:
            content = bytearray(b"x" * 100)
            windows.add(0, content, True)
            with pytest.raises(BufferError):
                content.clear()
            assert await asking.read(5, 0, 50) == (b"x" * 50, False)
            windows.remove(0)
            content.clear()
            assert await asking.read(5, 0, 50) == (ASKED_FOR, True)
            windows.add(0, content := bytearray(100), True)
        content.clear()  # the session has ended

    trio.run(main)


def test_more_than_there_is_room_for_is_not_added() -> None:
    async def main() -> None:
        windows = ReadWindows(6)
        async with kernel() as asking:
            for number in range(300):
                windows.add(number * 10, bytes([number % 256]) * 10, True)
            asked = [(await asking.read(6, number * 10, 5))[1] for number in range(300)]
            assert asked == [False] * 256 + [True] * 44
            for number in range(300):
                windows.remove(number * 10)

    trio.run(main)
