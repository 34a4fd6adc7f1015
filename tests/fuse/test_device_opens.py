"""Opens and releases against a model: which of them reach Python."""

import os
import random
from collections import Counter
from typing import Any

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inodes
from ipfsfuse.fuse.open_directories import _Reply
from ipfsfuse.vfs.tree import ROOT_ATTRIBUTES
from tests.fuse.kernel_side import ANSWERED_HERE, ASKED, Kernel, kernel


def neighbours(count: int) -> list[int]:
    """Inodes whose places in the table lie side by side, over its end too: any of them may stand in another's
    way."""
    found: list[int] = []
    inode = 1
    while len(found) < count:
        inode += 1
        if (inode * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 48 in (0xFFFE, 0xFFFF, 0, 1):
            found.append(inode)
    return found


def is_directory(inode: int) -> bool:
    return inode % 2 == 1


class Model:
    """What should be allowed, open and not drained; each step does the same to the device thread."""

    def __init__(self, asking: Kernel, dice: random.Random) -> None:
        self._asking, self._dice = asking, dice
        self.allowed: dict[int, int] = {}
        self._given = Counter[int]()
        self._undrained: list[int] = []

    async def allow(self, inode: int) -> None:
        device.allow(inode)
        self.allowed.setdefault(inode, 0)

    async def revoke(self, inode: int) -> None:
        assert device.revoke(inode) == self.allowed.pop(inode, 0)

    async def closed(self, inode: int) -> None:
        assert device.revoke_if_closed(inode) == (not self.allowed.get(inode))
        if not self.allowed.get(inode):
            self.allowed.pop(inode, None)

    async def idle(self, _inode: int) -> None:
        if self._dice.random() < 0.1:
            device.revoke_idle()
            self.allowed = {one: opens for one, opens in self.allowed.items() if opens}

    async def open(self, inode: int) -> None:
        handle, asked = await self._asking.open(inode, directory=is_directory(inode))
        assert asked == (inode not in self.allowed or len(self._undrained) == 32)
        assert handle == (ASKED if asked else ANSWERED_HERE | inode)
        if not asked:
            self.allowed[inode] += 1
            self._given[inode] += 1
            self._undrained.append(inode)

    async def open_for_writing(self, inode: int) -> None:
        _handle, asked = await self._asking.open(
            inode, self._dice.choice([os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
        )
        assert asked

    async def release(self, inode: int) -> None:
        if not self._given[inode]:
            assert await self._asking.release(inode, ASKED, is_directory(inode))
            return
        self._given[inode] -= 1
        asked = await self._asking.release(inode, ANSWERED_HERE | inode, is_directory(inode))
        assert asked == (not self.allowed.get(inode))
        if self.allowed.get(inode):
            self.allowed[inode] -= 1

    async def drain(self, _inode: int) -> None:
        if self._dice.random() < 0.3 or len(self._undrained) == 32:
            assert list(device.drain()) == self._undrained
            self._undrained.clear()


@pytest.mark.parametrize("seed", range(5))
def test_as_a_model_says(seed: int) -> None:
    trio.run(_as_a_model_says, random.Random(seed))


async def _as_a_model_says(dice: random.Random) -> None:
    inodes = neighbours(12)
    async with kernel() as asking:
        model = Model(asking, dice)
        steps = [model.allow, model.revoke, model.closed, model.idle, model.open_for_writing, model.drain]
        steps += [model.open] * 3 + [model.release] * 2
        for _ in range(1500):
            await dice.choice(steps)(dice.choice(inodes))
        for inode in inodes:
            await model.revoke(inode)


def test_more_files_than_the_table_holds() -> None:
    trio.run(_more_files_than_the_table_holds)


async def _more_files_than_the_table_holds() -> None:
    """Those that are open stay allowed; of the others the table starts anew."""
    async with kernel() as asking:
        device.allow(5)
        handle, asked = await asking.open(5)
        assert not asked
        for inode in range(1_000, 101_000):
            device.allow(inode)
        assert (await asking.open(1_000))[1], "the first made room"
        assert not (await asking.open(100_999))[1]
        assert not await asking.release(100_999, ANSWERED_HERE | 100_999)
        assert not await asking.release(5, handle)
        assert device.revoke(5) == 0


def test_every_33rd_open_in_a_row_comes_to_python() -> None:
    trio.run(_every_33rd_open_in_a_row_comes_to_python)


async def _every_33rd_open_in_a_row_comes_to_python() -> None:
    async with kernel() as asking:
        device.allow(9)
        assert [(await asking.open(9))[1] for _ in range(34)] == [False] * 32 + [True] * 2, (
            "until it has drained"
        )
        assert list(device.drain()) == [9] * 32
        assert not (await asking.open(9))[1]
        assert device.revoke(9) == 33


def test_behind_the_last_entry_of_a_listing_python_is_not_asked() -> None:
    trio.run(_behind_the_last_entry_of_a_listing_python_is_not_asked)


async def _behind_the_last_entry_of_a_listing_python_is_not_asked() -> None:
    async with kernel() as asking:
        assert await asking.list(7, 52), "nobody has told"
        device.listing_ends(7, 52)
        assert not await asking.list(7, 52)
        assert await asking.list(7, 51), "a reader that goes back"
        assert await asking.list(8, 52), "another's"
        assert not await asking.release_listing(7)
        assert list(device.released_listings()) == [7]
        assert list(device.released_listings()) == []
        assert await asking.list(7, 52), "it is released"
        assert await asking.release_listing(7)
        device.listing_ends(8, 3)
        device.listing_ends(8 + 1024, 3)
        assert await asking.list(8, 3), "another took its place"
        assert await asking.release_listing(8)
        assert not await asking.release_listing(8 + 1024)
        assert list(device.released_listings()) == [8 + 1024]


def test_every_33rd_release_of_a_listing_in_a_row_comes_to_python() -> None:
    trio.run(_every_33rd_release_of_a_listing_in_a_row_comes_to_python)


async def _every_33rd_release_of_a_listing_in_a_row_comes_to_python() -> None:
    async with kernel() as asking:
        for handle in range(1, 34):
            device.listing_ends(handle, 2)
        assert [await asking.release_listing(handle) for handle in range(1, 34)] == [False] * 32 + [True]
        assert list(device.released_listings()) == list(range(1, 33))


def test_no_end_of_a_listing_outlives_its_session() -> None:
    async def one(ends: bool) -> None:
        async with kernel() as asking:
            assert await asking.list(7, 52)
            if ends:
                device.listing_ends(7, 52)

    trio.run(one, True)
    trio.run(one, False)


def test_what_a_reply_that_is_not_sent_held_last_is_opened_by_python() -> None:
    trio.run(_what_a_reply_that_is_not_sent_held_last_is_opened_by_python)


async def _what_a_reply_that_is_not_sent_held_last_is_opened_by_python() -> None:
    """The kernel has forgotten it meanwhile, and may get another size of it."""
    inodes = Inodes(bytes(32))
    inode = inodes.file(cids.EMPTY, ROOT_ATTRIBUTES)
    unused: Any = None
    reply = _Reply(inode, unused, inodes, unused, unused)
    async with kernel() as asking:
        device.allow(inode.number)
        inodes.refer(inode)
        reply._referred.append(inode)
        reply.undo()
        assert inodes.known(inode.number) is None
        assert (await asking.open(inode.number))[1]
