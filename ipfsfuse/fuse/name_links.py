"""The directory of IPNS names (/ipns): a mount of its own, in which each name is a symlink.

pyfuse3 and libfuse serve one mount per process. This directory needs only a few kinds of requests, so this
module implements the protocol itself (linux/fuse.h, version 7.31), on the same event loop. The kernel does
not cache symlinks: it asks for a target each time, and caches an entry as long as the name's value is valid.

Concurrency: requests that resolve a name run as tasks, any number in parallel. All others are answered at
once.
"""

import contextlib
import errno
import hashlib
import logging
import os
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import trio

from ipfsfuse.errors import MountFailed, NameTooLong, NotFound, ReadOnly, Unavailable
from ipfsfuse.fuse import errnos
from ipfsfuse.fuse.session import INIT_SECONDS, MountedDevice, MountHelper, close_mount

log = logging.getLogger("ipfsfuse.fuse")

Target = Callable[[bytes], Awaitable[tuple[bytes, float]]]
"""Returns the target of a name's symlink, and until when it is valid, on trio's clock. Raises domain
errors."""
Listed = Callable[[], Sequence[bytes]]
"""The names that a listing shows."""

ROOT_INODE = 1
NAME_MAX = 255
BUFFER = 64 << 10
"""Bytes of the largest request: a setxattr's value has at most 64 KiB."""
MAX_WRITE = 4096
"""The least that the kernel accepts; nothing is ever written."""
MINOR = 31
MAX_BACKGROUND, CONGESTION = 4096, 3072
PARALLEL_DIROPS = 1 << 18
"""As in `replies.c`."""

_IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
_OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QII")
_READ_IN = struct.Struct("<QQI")
_DIRENT = struct.Struct("<QQII")
_STATFS = struct.Struct("<5Q4I24x")


class Op(IntEnum):
    """Opcodes of the requests that are not answered ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    STATFS = 17
    SETXATTR = 21
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BATCH_FORGET = 42
    RENAME2 = 45


MUTATING = frozenset({
    Op.SETATTR, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.LINK, Op.SETXATTR,
    Op.REMOVEXATTR, Op.CREATE, Op.RENAME2,
})  # fmt: skip
UNANSWERED = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT})


@dataclass(slots=True)
class _Link:
    name: bytes
    size: int = 0
    """Bytes of its target at the last lookup."""
    until: float = 0.0
    references: int = 0


class NameLinks:
    """Serves one device until it is unmounted."""

    def __init__(self, mount: MountedDevice, target: Target, listed: Listed, deadline: float) -> None:
        self._fd, self._target, self._listed, self._deadline = mount.fd, target, listed, deadline
        self._links: dict[int, _Link] = {}
        self._numbers: dict[bytes, int] = {}
        self._last = ROOT_INODE
        self._listings: dict[int, list[bytes]] = {}
        self._waiting: dict[int, trio.CancelScope] = {}
        """What an interrupt cancels, by the request's number."""

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Returns when the mount is gone. Raises MountFailed if the kernel speaks another version of FUSE."""
        os.set_blocking(self._fd, False)
        async with trio.open_nursery() as nursery:
            while (request := await self._receive()) is not None:
                self._handle(request, nursery)
                if request[4] == Op.INIT:
                    task_status.started()
            nursery.cancel_scope.cancel()

    async def _receive(self) -> bytes | None:
        """The next request; None when the mount is gone."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                return os.read(self._fd, BUFFER + 4096)
            except OSError as exc:
                if exc.errno in (errno.ENODEV, errno.EBADF, errno.ECONNABORTED):
                    return None
                if exc.errno not in (errno.EAGAIN, errno.ENOENT, errno.EINTR):  # ENOENT: it was taken back
                    raise

    def _handle(self, request: bytes, nursery: trio.Nursery) -> None:
        _length, opcode, unique, node, *_ = _IN_HEADER.unpack_from(request)
        body = request[_IN_HEADER.size :]
        if opcode in UNANSWERED:
            self._take_note(opcode, node, body)
        elif opcode in (Op.LOOKUP, Op.READLINK):
            nursery.start_soon(self._resolve, opcode, unique, node, body)
        elif opcode == Op.ACCESS:  # as in the mount itself: no user may write
            self._refuse(unique, errno.EACCES if struct.unpack_from("<I", body)[0] & os.W_OK else 0)
        else:
            try:
                self._reply(unique, self._answer(opcode, node, body))
            except NotImplementedError:
                self._refuse(unique, errno.ENOSYS)
            except Exception as exc:  # a failure of one request must not end the mount
                self._refuse(unique, errnos.of(exc))

    def _take_note(self, opcode: int, node: int, body: bytes) -> None:
        if opcode == Op.INTERRUPT:
            scope = self._waiting.get(*struct.unpack_from("<Q", body))
            if scope is not None:
                scope.cancel()
        elif opcode == Op.FORGET:
            self._forget(node, *struct.unpack_from("<Q", body))
        else:
            (count,) = struct.unpack_from("<I", body)
            for number, times in struct.iter_unpack("<QQ", body[8 : 8 + 16 * count]):
                self._forget(number, times)

    def _forget(self, number: int, times: int) -> None:
        link = self._links.get(number)
        if link is not None:
            link.references -= times
            if link.references <= 0:
                del self._links[number], self._numbers[link.name]

    # -- answers at once -------------------------------------------------------------------------------------

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        if opcode in MUTATING:
            raise ReadOnly("the directory of names is read-only")
        if opcode == Op.INIT:
            major, minor, _readahead, offered = struct.unpack_from("<IIII", body)
            if major != 7:
                raise MountFailed(f"the kernel speaks version {major} of FUSE")
            limits = (offered & PARALLEL_DIROPS, MAX_BACKGROUND, CONGESTION, MAX_WRITE)
            return _INIT_OUT.pack(7, min(minor, MINOR), 0, *limits, 1, 0, 0, 0)
        if opcode == Op.GETATTR:
            if node == ROOT_INODE:
                return _ATTR_OUT.pack(1, 0, 0) + _attr(ROOT_INODE, stat.S_IFDIR | 0o555, 0)
            link = self._links[node]
            seconds, nanoseconds = _left(link.until)
            return _ATTR_OUT.pack(seconds, nanoseconds, 0) + _link_attr(link)
        if opcode == Op.OPENDIR:
            self._last += 1
            self._listings[self._last] = [b".", b"..", *self._listed()]
            return _OPEN_OUT.pack(self._last, 0, 0)
        if opcode == Op.READDIR:
            return self._page(*_READ_IN.unpack_from(body))
        if opcode == Op.RELEASEDIR:
            (handle,) = struct.unpack_from("<Q", body)
            self._listings.pop(handle, None)
            return b""
        if opcode == Op.STATFS:
            return _STATFS.pack(0, 0, 0, 0, 0, 4096, NAME_MAX, 4096, 0)
        raise NotImplementedError

    def _page(self, handle: int, offset: int, size: int) -> bytes:
        page = bytearray()
        for place, name in enumerate(self._listings[handle][offset:], offset + 1):
            kind = stat.S_IFDIR if place <= 2 else stat.S_IFLNK
            number = ROOT_INODE if place <= 2 else _inode(name)
            entry = _DIRENT.pack(number, place, len(name), kind >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(page) + len(entry) > size:
                break
            page += entry
        return bytes(page)

    # -- answers that wait -----------------------------------------------------------------------------------

    async def _resolve(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        scope = trio.CancelScope(deadline=trio.current_time() + self._deadline)
        self._waiting[unique] = scope
        try:
            answer = None
            with scope:
                answer = await (self._lookup(node, body) if opcode == Op.LOOKUP else self._readlink(node))
            if answer is None:
                late = trio.current_time() >= scope.deadline
                why = Unavailable(f"a name was not resolved within {self._deadline:g} s")
                self._refuse(unique, errnos.of(why) if late else errno.EINTR)
            elif not self._reply(unique, answer) and opcode == Op.LOOKUP:
                self._forget(struct.unpack_from("<Q", answer)[0], 1)  # the kernel has not had it
        except Exception as exc:
            self._refuse(unique, errnos.of(exc))
        finally:
            del self._waiting[unique]

    async def _lookup(self, parent: int, body: bytes) -> bytes:
        name = body.rstrip(b"\0")
        if parent != ROOT_INODE:
            raise NotFound("a symlink has no entries")
        if len(name) > NAME_MAX:
            raise NameTooLong(f"a name of {len(name)} bytes")
        target, until = await self._target(name)
        number = self._numbers.get(name)
        if number is None:
            self._last += 1
            number = self._numbers[name] = self._last
            self._links[number] = _Link(name)
        link = self._links[number]
        link.size, link.until = len(target), until
        link.references += 1
        seconds, nanoseconds = _left(until)
        return _ENTRY.pack(number, 0, seconds, seconds, nanoseconds, nanoseconds) + _link_attr(link)

    async def _readlink(self, node: int) -> bytes:
        link = self._links[node]
        target, link.until = await self._target(link.name)
        link.size = len(target)
        return target

    # -- replies ---------------------------------------------------------------------------------------------

    def _reply(self, unique: int, data: bytes) -> bool:
        return self._write(_OUT_HEADER.pack(_OUT_HEADER.size + len(data), 0, unique) + data)

    def _refuse(self, unique: int, number: int) -> None:
        self._write(_OUT_HEADER.pack(_OUT_HEADER.size, -number, unique))

    def _write(self, message: bytes) -> bool:
        """Returns whether the kernel accepted the reply. It does not if the caller or the mount is gone."""
        try:
            os.write(self._fd, message)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.EBADF):
                log.warning("a reply to the kernel failed: %s", exc.strerror)
            return False
        return True


def _left(until: float) -> tuple[int, int]:
    """The time from now until `until`, in seconds and nanoseconds."""
    left = max(0.0, min(until - trio.current_time(), 1e9))
    return int(left), int(left % 1 * 1e9)


def _attr(number: int, mode: int, size: int) -> bytes:
    links, block = 1, 4096
    return _ATTR.pack(number, size, 0, 0, 0, 0, 0, 0, 0, mode, links, os.getuid(), os.getgid(), 0, block, 0)


def _link_attr(link: _Link) -> bytes:
    return _attr(_inode(link.name), stat.S_IFLNK | 0o777, link.size)


def _inode(name: bytes) -> int:
    """The inode number that stat shows. It is the same after a restart."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) | 2


@contextlib.asynccontextmanager
async def open_mount(
    helper: MountHelper,
    target: Target,
    listed: Listed,
    deadline: float,
    ended: Callable[[], Awaitable[None]],
) -> AsyncIterator[None]:
    """Mounts the directory of names at the mountpoint of `helper` while the block runs. Calls `ended` if
    someone else unmounts it. Raises MountFailed."""
    mount = helper.mount()
    links = NameLinks(mount, target, listed, deadline)
    ending = False

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await links.serve(task_status=task_status)
        if not ending:
            await ended()

    try:
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(INIT_SECONDS) as scope:
                await nursery.start(serve)
            if scope.cancelled_caught:
                raise MountFailed(f"{helper.mountpoint} can't be served: the kernel did not begin with INIT")
            try:
                yield
            finally:
                ending = True
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    await helper.unmount()
                nursery.cancel_scope.cancel()
    finally:
        close_mount(mount)
