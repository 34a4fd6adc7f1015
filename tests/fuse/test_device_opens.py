"""Which opens and releases reach Python, and what is stored into the page cache, compared with a model."""

import os
import random
import struct
from collections import Counter
from typing import Any

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inodes
from ipfsfuse.fuse.open_directories import _Reply
from ipfsfuse.vfs.tree import ROOT_ATTRIBUTES
from tests.fuse.kernel_side import ANSWERED_IN_C, OPEN, PYTHON_HANDLE, Kernel, kernel, uninitialized

UNDRAINED, DRAIN_AT, OFFERS = 256, 64, 256
"""As in opens.c."""


def neighbours(count: int) -> list[int]:
    """Inodes whose places in the table lie next to each other, also across the table's end: each may collide
    with any other."""
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
    """The inodes that should be allowed, open, offered and not drained. Each step does the same in the
    device."""

    def __init__(self, fake_kernel: Kernel, dice: random.Random) -> None:
        self._fake_kernel, self._dice = fake_kernel, dice
        self.allowed: dict[int, int] = {}
        self._given = Counter[int]()
        self._offered: dict[int, tuple[int, bytes]] = {}
        """By inode: the number of the offer, and the content."""
        self._offers = 0
        self._stored: list[tuple[int, bytes]] = []
        self._undrained: list[int] = []

    async def allow(self, inode: int) -> None:
        device.allow(inode)
        self.allowed.setdefault(inode, 0)

    async def revoke(self, inode: int) -> None:
        assert device.revoke(inode) == self.allowed.pop(inode, 0)
        self._offered.pop(inode, None)

    async def offer(self, inode: int) -> None:
        if not is_directory(inode):
            content = self._dice.randbytes(self._dice.choice([0, 1, 5000]))
            self._offered[inode] = self._offers, content
            self._offers += 1
            device.offer(inode, content)

    async def withdraw(self, inode: int) -> None:
        device.withdraw(inode)
        self._offered.pop(inode, None)

    async def idle(self, _inode: int) -> None:
        if self._dice.random() < 0.1:
            device.revoke_idle()
            self.allowed = {one: opens for one, opens in self.allowed.items() if opens}
            self._offered.clear()

    async def open(self, inode: int) -> None:
        number, content = self._offered.pop(inode, (self._offers - OFFERS - 1, b""))
        if self._offers - number <= OFFERS and not self.allowed.get(inode):
            self._stored.append((inode, content))
            self.allowed[inode] = 0
        handle, asked = await self._fake_kernel.open(inode, directory=is_directory(inode))
        assert self._fake_kernel.stored == self._stored
        assert asked == (inode not in self.allowed or len(self._undrained) == UNDRAINED)
        assert handle == (PYTHON_HANDLE if asked else ANSWERED_IN_C | inode)
        if not asked:
            self.allowed[inode] += 1
            self._given[inode] += 1
            self._undrained.append(inode)

    async def open_for_writing(self, inode: int) -> None:
        _handle, asked = await self._fake_kernel.open(
            inode, self._dice.choice([os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
        )
        assert asked

    async def release(self, inode: int) -> None:
        if not self._given[inode]:
            assert await self._fake_kernel.release(inode, PYTHON_HANDLE, is_directory(inode))
            return
        self._given[inode] -= 1
        asked = await self._fake_kernel.release(inode, ANSWERED_IN_C | inode, is_directory(inode))
        assert asked == (not self.allowed.get(inode))
        if self.allowed.get(inode):
            self.allowed[inode] -= 1

    async def drain(self, _inode: int) -> None:
        if self._dice.random() < 0.03 or len(self._undrained) == UNDRAINED:
            assert [inode for inode, _user in device.drain()] == self._undrained
            self._undrained.clear()


@pytest.mark.parametrize("seed", range(5))
def test_opens_and_releases_match_a_model(seed: int) -> None:
    trio.run(_opens_and_releases_match_a_model, random.Random(seed))


async def _opens_and_releases_match_a_model(dice: random.Random) -> None:
    inodes = neighbours(12)
    async with kernel() as fake_kernel:
        model = Model(fake_kernel, dice)
        steps = [model.allow, model.revoke, model.idle, model.open_for_writing, model.drain, model.withdraw]
        steps += [model.open] * 3 + [model.release] * 2 + [model.offer] * 2
        for _ in range(2500):
            await dice.choice(steps)(dice.choice(inodes))
        for inode in inodes:
            await model.revoke(inode)


def test_open_files_stay_allowed_when_the_table_overflows() -> None:
    trio.run(_open_files_stay_allowed_when_the_table_overflows)


async def _open_files_stay_allowed_when_the_table_overflows() -> None:
    """Open files stay allowed. The table drops all others and starts anew."""
    async with kernel() as fake_kernel:
        device.allow(5)
        handle, asked = await fake_kernel.open(5)
        assert not asked
        for inode in range(1_000, 101_000):
            device.allow(inode)
        assert (await fake_kernel.open(1_000))[1], "the table has dropped the first one"
        assert not (await fake_kernel.open(100_999))[1]
        assert not await fake_kernel.release(100_999, ANSWERED_IN_C | 100_999)
        assert not await fake_kernel.release(5, handle)
        assert device.revoke(5) == 0


def test_opens_that_are_never_drained_come_to_python_in_the_end() -> None:
    trio.run(_opens_that_are_never_drained_come_to_python_in_the_end)


async def _opens_that_are_never_drained_come_to_python_in_the_end() -> None:
    async with kernel() as fake_kernel:
        device.allow(9)
        asked = [(await fake_kernel.open(9))[1] for _ in range(UNDRAINED + 2)]
        assert asked == [False] * UNDRAINED + [True] * 2
        assert list(device.drain()) == [(9, 0)] * UNDRAINED
        assert not (await fake_kernel.open(9))[1]
        assert device.revoke(9) == UNDRAINED + 1


def test_drained_opens_say_who_opened() -> None:
    async def main() -> None:
        async with kernel() as fake_kernel:
            device.allow(9)
            for user in (1000, 0, 1001):
                fake_kernel.send(OPEN, 9, struct.pack("<II", os.O_RDONLY, 0), user)
                await fake_kernel.answer()
            assert list(device.drain()) == [(9, 1000), (9, 0), (9, 1001)]

    trio.run(main)


def test_a_file_whose_release_python_has_counted_is_closed() -> None:
    async def main() -> None:
        async with kernel() as fake_kernel:
            device.allow(8)
            handle, _asked = await fake_kernel.open(8)
            device.offer(8, b"first")
            await fake_kernel.open(8)
            assert not fake_kernel.stored, "it is open"
            for _ in range(2):
                device.release(handle)
            device.offer(8, b"second")
            await fake_kernel.open(8)
            assert fake_kernel.stored == [(8, b"second")]
            for _ in range(3):
                device.release(handle)
            assert device.revoke(8) == 0

    trio.run(main)


def test_python_is_woken_to_drain_opens() -> None:
    trio.run(_python_is_woken_to_drain_opens)


async def _python_is_woken_to_drain_opens() -> None:
    async with uninitialized() as (fake_kernel, reader):
        await fake_kernel.initialize()
        await reader.notified()  # of INIT
        device.allow(9)
        for _ in range(DRAIN_AT - 1):
            await fake_kernel.open(9)
        with trio.move_on_after(0.1) as waiting:
            await reader.notified()
        assert waiting.cancelled_caught, "there is little to drain"
        await fake_kernel.open(9)
        with trio.fail_after(60):
            await reader.notified()
        assert list(device.drain()) == [(9, 0)] * DRAIN_AT


def test_only_the_last_offers_are_kept() -> None:
    trio.run(_only_the_last_offers_are_kept)


async def _only_the_last_offers_are_kept() -> None:
    async with kernel() as fake_kernel:
        for inode in range(2, OFFERS + 3):
            device.offer(inode, b"%d" % inode)
        assert [(await fake_kernel.open(inode))[1] for inode in (2, 3, OFFERS + 2)] == [True, False, False]
        assert fake_kernel.stored == [(3, b"3"), (OFFERS + 2, b"%d" % (OFFERS + 2))]


def test_an_offer_ends_with_its_session() -> None:
    async def one(offers: bool) -> None:
        async with kernel() as fake_kernel:
            assert (await fake_kernel.open(7))[1]
            if offers:
                device.offer(7, b"seven")

    trio.run(one, True)
    trio.run(one, False)


def test_reads_behind_the_last_entry_of_a_listing_do_not_reach_python() -> None:
    trio.run(_reads_behind_the_last_entry_of_a_listing_do_not_reach_python)


async def _reads_behind_the_last_entry_of_a_listing_do_not_reach_python() -> None:
    async with kernel() as fake_kernel:
        assert await fake_kernel.list(7, 52), "the device was not told of the end"
        device.listing_ends(7, 52)
        assert not await fake_kernel.list(7, 52)
        assert await fake_kernel.list(7, 51), "the reader goes back"
        assert await fake_kernel.list(8, 52), "the handle is another one"
        assert not await fake_kernel.release_listing(7)
        assert list(device.released_listings()) == [7]
        assert list(device.released_listings()) == []
        assert await fake_kernel.list(7, 52), "the handle is released"
        assert await fake_kernel.release_listing(7)
        device.listing_ends(8, 3)
        device.listing_ends(8 + 1024, 3)
        assert await fake_kernel.list(8, 3), "another handle took its place"
        assert await fake_kernel.release_listing(8)
        assert not await fake_kernel.release_listing(8 + 1024)
        assert list(device.released_listings()) == [8 + 1024]


def test_releases_of_listings_that_are_never_drained_come_to_python_in_the_end() -> None:
    trio.run(_releases_of_listings_that_are_never_drained_come_to_python_in_the_end)


async def _releases_of_listings_that_are_never_drained_come_to_python_in_the_end() -> None:
    handles = range(1, UNDRAINED + 2)
    async with kernel() as fake_kernel:
        for handle in handles:
            device.listing_ends(handle, 2)
        assert [await fake_kernel.release_listing(handle) for handle in handles] == [False] * UNDRAINED + [
            True
        ]
        assert list(device.released_listings()) == list(range(1, UNDRAINED + 1))


def test_the_end_of_a_listing_is_forgotten_with_its_session() -> None:
    async def one(ends: bool) -> None:
        async with kernel() as fake_kernel:
            assert await fake_kernel.list(7, 52)
            if ends:
                device.listing_ends(7, 52)

    trio.run(one, True)
    trio.run(one, False)


def test_an_inode_whose_last_reference_was_an_unsent_reply_is_opened_by_python() -> None:
    trio.run(_an_inode_whose_last_reference_was_an_unsent_reply_is_opened_by_python)


async def _an_inode_whose_last_reference_was_an_unsent_reply_is_opened_by_python() -> None:
    """The kernel has forgotten the inode meanwhile, and may get another size for it."""
    inodes = Inodes(bytes(32))
    inode = inodes.file(cids.EMPTY, ROOT_ATTRIBUTES)
    unused: Any = None
    reply = _Reply(inode, unused, inodes, unused, unused)
    async with kernel() as fake_kernel:
        device.allow(inode.number)
        inodes.refer(inode)
        reply._referred.append(inode)
        reply.undo()
        assert inodes.known(inode.number) is None
        assert (await fake_kernel.open(inode.number))[1]
