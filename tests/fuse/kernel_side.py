"""The test plays the kernel. libfuse, pyfuse3 and the device thread are real; their device is one end of a
socket pair.
"""

import os
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileInfo, FlagT, InodeT, ReaddirToken, RequestContext

from ipfsfuse.fuse import device

OPEN, READ, RELEASE, INIT, OPENDIR, RELEASEDIR, BATCH_FORGET, READDIRPLUS = 14, 15, 18, 26, 27, 29, 42, 44
KEEP_CACHE, CACHE_DIR = 2, 8
NOTIFY_STORE = 4
ANSWERED_IN_C = 1 << 63
"""The bit in the handles of opens that the device thread answered."""
ALL_FLAGS = (1 << 20) - 1
"""All flags of INIT that a kernel with protocol 7.31 offers."""
PYTHON_HANDLE = 77
"""The handle of an open that Python answered."""
PYTHON_BYTES = b"asked for"
"""The bytes of a read that Python answered."""


class Operations(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.opened, self.released, self.forgotten = Counter[int](), Counter[int](), Counter[int]()
        self.listed = Counter[int]()

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        self.opened[inode] += 1
        return FileInfo(fh=FileHandleT(PYTHON_HANDLE))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self.forgotten[inode] += count

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return PYTHON_BYTES

    async def release(self, fh: FileHandleT) -> None:
        self.released[fh] += 1

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        self.opened[inode] += 1
        return FileHandleT(PYTHON_HANDLE)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        self.listed[fh] += 1

    async def releasedir(self, fh: FileHandleT) -> None:
        self.released[fh] += 1


class Kernel:
    """Sends the kernel's requests one by one."""

    def __init__(self, ours: socket.socket, operations: Operations) -> None:
        self.operations = operations
        self.stored: list[tuple[int, bytes]] = []
        """Inodes and contents that were stored into the page cache."""
        self._ours = ours
        self._unique = 2

    async def initialize(self) -> None:
        await self.ask(INIT, 0, struct.pack("<IIII", 7, 31, 1 << 17, ALL_FLAGS))

    async def ask(self, opcode: int, inode: int, body: bytes) -> bytes:
        number = self.send(opcode, inode, body)
        answered, error, answer = await self.answer()
        assert (answered, error) == (number, 0)
        return answer

    async def answer(self) -> tuple[int, int, bytes]:
        """The next answer: the number of its request, the errno (negative, or 0), and the body."""
        while True:
            await trio.lowlevel.wait_readable(self._ours)
            answer = self._ours.recv(1 << 17)
            length, error, number = struct.unpack_from("<IiQ", answer)
            assert length == len(answer)
            if number:
                return number, error, answer[16:]
            self._notified(error, answer[16:])

    def _notified(self, code: int, body: bytes) -> None:
        assert code == NOTIFY_STORE
        inode, offset, size, _padding = struct.unpack_from("<QQII", body)
        assert (offset, size) == (0, len(body) - 24)
        self.stored.append((inode, body[24:]))

    async def open(self, inode: int, flags: int = os.O_RDONLY, directory: bool = False) -> tuple[int, bool]:
        """The handle, and whether Python was asked."""
        before = self.operations.opened.total()
        opcode = OPENDIR if directory else OPEN
        handle, how = struct.unpack("<QIxxxx", await self.ask(opcode, inode, struct.pack("<II", flags, 0)))
        asked = self.operations.opened.total() > before
        assert asked or how == KEEP_CACHE | (CACHE_DIR if directory else 0), "the kernel may keep its cache"
        return handle, asked

    async def read(self, handle: int, offset: int, size: int, inode: int = 1) -> tuple[bytes, bool]:
        """The bytes, and whether Python was asked."""
        number = self.send_read(handle, offset, size, inode)
        answered, error, got = await self.answer()
        assert (answered, error) == (number, 0)
        return got, got == PYTHON_BYTES

    def send_read(self, handle: int, offset: int, size: int, inode: int = 1) -> int:
        """Sends a READ. Returns its number."""
        return self.send(READ, inode, struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0))

    async def release(self, inode: int, handle: int, directory: bool = False) -> bool:
        """Returns whether Python was asked."""
        before = self.operations.released.total()
        opcode = RELEASEDIR if directory else RELEASE
        assert await self.ask(opcode, inode, struct.pack("<QIIQ", handle, 0, 0, 0)) == b""
        return self.operations.released.total() > before

    async def list(self, handle: int, offset: int) -> bool:
        """Asks for the entries behind `offset`. There are none. Returns whether Python was asked."""
        before = self.operations.listed.total()
        assert (
            await self.ask(READDIRPLUS, 1, struct.pack("<QQIIQII", handle, offset, 4096, 0, 0, 0, 0)) == b""
        )
        return self.operations.listed.total() > before

    async def release_listing(self, handle: int) -> bool:
        """Returns whether Python was asked."""
        return await self.release(1, handle, directory=True)

    def send(self, opcode: int, inode: int, body: bytes, user: int = 0) -> int:
        """Sends a request. Returns its number."""
        self._unique += 2
        self._ours.send(
            struct.pack("<IIQQIIII", 40 + len(body), opcode, self._unique, inode, user, 0, 0, 0) + body
        )
        return self._unique


@asynccontextmanager
async def uninitialized(readahead: bool = True) -> AsyncIterator[tuple[Kernel, device.Device]]:
    """A session whose kernel has not sent INIT yet."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    operations = Operations()
    reader = device.Device(readahead)
    pyfuse3.init(operations, f"/dev/fd/{theirs.fileno()}", set())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            yield Kernel(ours, operations), reader
            nursery.cancel_scope.cancel()
    finally:
        reader.stop()
        pyfuse3.close(unmount=False)
        ours.close()
        theirs.close()


@asynccontextmanager
async def kernel() -> AsyncIterator[Kernel]:
    async with uninitialized() as (fake_kernel, _reader):
        await fake_kernel.initialize()
        yield fake_kernel


@asynccontextmanager
async def interrupting(calls: Mapping[int, trio.CancelScope]) -> AsyncIterator[Kernel]:
    """A session in which an INTERRUPT cancels the scope of the request that it names, if it is in `calls`."""

    async def deliver(reader: device.Device) -> None:
        while True:
            await reader.notified()
            for number in reader.interrupted():
                if number in calls:
                    calls[number].cancel()

    async with uninitialized() as (fake_kernel, reader), trio.open_nursery() as nursery:
        await fake_kernel.initialize()
        await reader.initialized()
        nursery.start_soon(deliver, reader)
        yield fake_kernel
        nursery.cancel_scope.cancel()
