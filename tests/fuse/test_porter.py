"""The porter against a model: which opens, reads and releases reach Python, with the test in the kernel's place.

libfuse and pyfuse3 are real; their device is one end of a socket pair, as it is while a session begins.
"""

import os
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pyfuse3
import pytest
import trio
from pyfuse3 import FileHandleT, FileInfo, FlagT, InodeT, RequestContext

from ipfsfuse.fuse import porter
from ipfsfuse.fuse.native import LIBRARY

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the C part is not compiled here")

OPEN, READ, RELEASE, INIT = 14, 15, 18, 26
OURS = 1 << 63
EVERYTHING = (1 << 20) - 1
"""What the kernel offers, of that time."""
ASKED = 77
"""The handle that our operations give."""
ASKED_FOR = b"asked for"
"""And what they read."""


class Operations(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.opened, self.released = Counter[int](), Counter[int]()

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        self.opened[inode] += 1
        return FileInfo(fh=FileHandleT(ASKED))

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return ASKED_FOR

    async def release(self, fh: FileHandleT) -> None:
        self.released[fh] += 1


class Kernel:
    """What the kernel does, by hand."""

    def __init__(self, ours: socket.socket, operations: Operations) -> None:
        self.operations = operations
        self._ours = ours
        self._unique = 2

    async def ask(self, opcode: int, inode: int, body: bytes) -> bytes:
        self._unique += 2
        self._ours.send(struct.pack("<IIQQIIII", 40 + len(body), opcode, self._unique, inode, 0, 0, 0, 0) + body)
        await trio.lowlevel.wait_readable(self._ours)
        answer = self._ours.recv(1 << 16)
        length, error, unique = struct.unpack_from("<IiQ", answer)
        assert (length, error, unique) == (len(answer), 0, self._unique)
        return answer[16:]

    async def open(self, inode: int, flags: int = os.O_RDONLY) -> tuple[int, bool]:
        """The handle, and whether Python was asked."""
        before = self.operations.opened.total()
        handle, how = struct.unpack("<QIxxxx", await self.ask(OPEN, inode, struct.pack("<II", flags, 0)))
        asked = self.operations.opened.total() > before
        assert asked or how & 2, "an open without asking keeps the page cache"
        return handle, asked

    async def read(self, handle: int, offset: int, size: int) -> tuple[bytes, bool]:
        """What came, and whether Python was asked."""
        got = await self.ask(READ, 1, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))
        return got, got == ASKED_FOR

    async def release(self, inode: int, handle: int) -> bool:
        """Whether Python was asked."""
        before = self.operations.released.total()
        assert await self.ask(RELEASE, inode, struct.pack("<QIIQ", handle, 0, 0, 0)) == b""
        return self.operations.released.total() > before


@asynccontextmanager
async def kernel() -> AsyncIterator[Kernel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    operations = Operations()
    number = theirs.detach()
    standing = porter.hired()
    assert standing is not None
    pyfuse3.init(operations, f"/dev/fd/{number}", set())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            asking = Kernel(ours, operations)
            standing.ring()
            await asking.ask(INIT, 0, struct.pack("<IIII", 7, 31, 1 << 17, EVERYTHING))
            standing.begin(number)
            yield asking
            nursery.cancel_scope.cancel()
    finally:
        porter.heard()
        porter.dismiss_idle()
        standing.end()
        pyfuse3.close(unmount=False)
        ours.close()


def neighbours(count: int) -> list[int]:
    """Inodes whose places in the table lie side by side, over its end too: any of them may stand in another's way."""
    found: list[int] = []
    inode = 1
    while len(found) < count:
        inode += 1
        if (inode * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 48 in (0xFFFE, 0xFFFF, 0, 1):
            found.append(inode)
    return found


class Model:
    """What should be known, open and unheard of; each step does the same to the porter."""

    def __init__(self, asking: Kernel, dice: random.Random) -> None:
        self._asking, self._dice = asking, dice
        self.known: dict[int, int] = {}
        self._given = Counter[int]()
        self._unheard: list[int] = []

    async def know(self, inode: int) -> None:
        porter.know(inode)
        self.known.setdefault(inode, 0)

    async def dismiss(self, inode: int) -> None:
        assert porter.dismiss(inode) == self.known.pop(inode, 0)

    async def closed(self, inode: int) -> None:
        assert porter.closed(inode) == (not self.known.get(inode))
        if not self.known.get(inode):
            self.known.pop(inode, None)

    async def idle(self, _inode: int) -> None:
        if self._dice.random() < 0.1:
            porter.dismiss_idle()
            self.known = {one: opens for one, opens in self.known.items() if opens}

    async def open(self, inode: int) -> None:
        handle, asked = await self._asking.open(inode)
        assert asked == (inode not in self.known or len(self._unheard) == 32)
        assert handle == (ASKED if asked else OURS | inode)
        if not asked:
            self.known[inode] += 1
            self._given[inode] += 1
            self._unheard.append(inode)

    async def open_for_writing(self, inode: int) -> None:
        _handle, asked = await self._asking.open(inode, self._dice.choice([os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC]))
        assert asked

    async def release(self, inode: int) -> None:
        if not self._given[inode]:
            assert await self._asking.release(inode, ASKED)
            return
        self._given[inode] -= 1
        assert await self._asking.release(inode, OURS | inode) == (not self.known.get(inode))
        if self.known.get(inode):
            self.known[inode] -= 1

    async def hear(self, _inode: int) -> None:
        if self._dice.random() < 0.3 or len(self._unheard) == 32:
            assert list(porter.heard()) == self._unheard
            self._unheard.clear()


@pytest.mark.parametrize("seed", range(5))
def test_as_a_model_says(seed: int) -> None:
    trio.run(_as_a_model_says, random.Random(seed))


async def _as_a_model_says(dice: random.Random) -> None:
    inodes = neighbours(12)
    async with kernel() as asking:
        model = Model(asking, dice)
        steps = [model.know, model.dismiss, model.closed, model.idle, model.open_for_writing, model.hear]
        steps += [model.open] * 3 + [model.release] * 2
        for _ in range(1500):
            await dice.choice(steps)(dice.choice(inodes))
        for inode in inodes:
            await model.dismiss(inode)


def test_more_files_than_the_table_holds() -> None:
    trio.run(_more_files_than_the_table_holds)


async def _more_files_than_the_table_holds() -> None:
    """Those that are open stay known; of the others the table starts anew."""
    async with kernel() as asking:
        porter.know(5)
        handle, asked = await asking.open(5)
        assert not asked
        for inode in range(1_000, 101_000):
            porter.know(inode)
        assert (await asking.open(1_000))[1], "the first made room"
        assert not (await asking.open(100_999))[1]
        assert not await asking.release(100_999, OURS | 100_999)
        assert not await asking.release(5, handle)
        assert porter.dismiss(5) == 0


def test_every_33rd_open_in_a_row_comes_to_python() -> None:
    trio.run(_every_33rd_open_in_a_row_comes_to_python)


async def _every_33rd_open_in_a_row_comes_to_python() -> None:
    async with kernel() as asking:
        porter.know(9)
        assert [(await asking.open(9))[1] for _ in range(34)] == [False] * 32 + [True] * 2, "until it has heard"
        assert list(porter.heard()) == [9] * 32
        assert not (await asking.open(9))[1]
        assert porter.dismiss(9) == 33


@pytest.mark.parametrize("seed", range(3))
def test_reads_of_what_is_offered_as_a_model_says(seed: int) -> None:
    trio.run(_reads_of_what_is_offered, random.Random(seed))


async def _reads_of_what_is_offered(dice: random.Random) -> None:
    """Windows of two open files, of any buffers, side by side and with gaps; reads within one and not to its end are answered."""
    offered: dict[tuple[int, int], bytes] = {}
    counters = {handle: porter.counter(handle) for handle in (3, OURS | 4)}
    async with kernel() as asking:
        for _ in range(2_000):
            handle, start = dice.choice(list(counters)), dice.randrange(8) * 1_000
            counter = counters[handle]
            assert counter is not None
            if dice.random() < 0.2:
                if offered.pop((handle, start), None) is None:
                    content = offered[handle, start] = dice.randbytes(dice.choice([0, 1, 500, 1_000]))
                    counter.offer(start, dice.choice([bytes, bytearray, memoryview])(content))
                else:
                    counter.withdraw(start)
                continue
            offset, size = start + dice.randrange(1_000), dice.choice([1, 100, 500, 1_000])
            inside = offset + size < start + len(offered.get((handle, start), b""))
            got, asked = await asking.read(handle, offset, size)
            assert asked != inside
            assert got == (ASKED_FOR if asked else offered[handle, start][offset - start :][:size])


def test_what_is_offered_is_held_until_it_is_withdrawn_and_not_longer() -> None:
    async def main() -> None:
        counter = porter.counter(5)
        assert counter is not None
        async with kernel() as asking:
            content = bytearray(b"x" * 100)
            counter.offer(0, content)
            with pytest.raises(BufferError):
                content.clear()
            assert await asking.read(5, 0, 50) == (b"x" * 50, False)
            counter.withdraw(0)
            content.clear()
            assert await asking.read(5, 0, 50) == (ASKED_FOR, True)
            counter.offer(0, content := bytearray(100))
        content.clear()  # the session has ended

    trio.run(main)


def test_more_than_there_is_room_for_is_not_offered() -> None:
    async def main() -> None:
        counter = porter.counter(6)
        assert counter is not None
        async with kernel() as asking:
            for number in range(300):
                counter.offer(number * 10, bytes([number % 256]) * 10)
            asked = [(await asking.read(6, number * 10, 5))[1] for number in range(300)]
            assert asked == [False] * 256 + [True] * 44
            for number in range(300):
                counter.withdraw(number * 10)

    trio.run(main)
