"""The Python side of our C code: a thread that reads /dev/fuse and answers some requests without Python.

The library must be loaded before pyfuse3 is imported, because the dynamic linker takes a function from the
library that was loaded first: pyfuse3 then calls our `fuse_session_mount` (`device.c`).

The thread answers four kinds of requests: reads of leaves that are in memory, or will be in a moment
(`ReadWindows`, `reads.c`); small reads of staged leaves that were verified before (`pieces.c`); opens for
reading, and releases, of small files and directories that Python allowed, or whose content it offered; and
the end and the release of a listing that Python has given completely (`opens.c`). It counts those opens, and
`drain` returns them later. It wakes Python after 64 opens that were not drained. After 256, the next open
goes to Python.

Concurrency: any thread may call the functions and `ReadWindows`. `Device` belongs to the event loop.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import MountFailed
from ipfsfuse.fileio import tags
from ipfsfuse.fileio.files import load_library
from ipfsfuse.structures import Buffer

NAME_ONLY = (1 << 64) - 1
"""The generation of a directory entry that is sent with node id 0. As in `replies.c`."""
_CACHE_LISTING = 1 << 62
_PASSTHROUGH = 1 << 61
_INIT_PARALLEL, _INIT_PASSTHROUGH = 2, 4
"""All as in `replies.c`."""
_ANSWERED_HERE = 1 << 63
_UNDRAINED = 256
"""Both as in `opens.c`."""

_Numbers, _Users = ctypes.c_uint64 * _UNDRAINED, ctypes.c_uint32 * _UNDRAINED

_LIBRARY = load_library("ipfsfuse.fuse._native", ctypes.RTLD_GLOBAL)
_WITH_LOCK = ctypes.PyDLL(_LIBRARY._name)
"""The same library, for calls that use Python objects and for short calls: PyDLL keeps Python's lock during a
call, so that we need not wait for it again afterwards."""
_INT, _NUMBER, _TEXT, _OBJECT = ctypes.c_int, ctypes.c_uint64, ctypes.c_char_p, ctypes.py_object
_SIGNATURES: dict[str, Sequence[Any]] = {
    "device_prepare": (None, _INT, _INT, _INT),
    "device_stop": (None,),
    "device_interrupted": (_NUMBER,),
    "device_listen": (None, ctypes.c_void_p, ctypes.c_void_p),
    "device_backing_open": (_INT, _INT),
    "device_backing_close": (None, _INT),
    "pieces_key": (None, _TEXT),
}
"""The result and argument types of each function."""
_SIGNATURES_WITH_LOCK: dict[str, Sequence[Any]] = {
    "opens_allow": (None, _NUMBER),
    "opens_revoke": (ctypes.c_uint32, _NUMBER),
    "opens_offer": (None, _NUMBER, _TEXT, ctypes.c_uint32),
    "opens_withdraw": (None, _NUMBER),
    "opens_revoke_idle": (None,),
    "opens_drain": (ctypes.c_uint32, _Numbers, _Users),
    "opens_end": (None, _NUMBER, _NUMBER),
    "opens_released": (ctypes.c_uint32, _Numbers, _Users),
    "opens_release": (None, _NUMBER),
    "reads_expect": (None, _NUMBER, _NUMBER, _NUMBER),
    "reads_add": (None, _NUMBER, _NUMBER, _OBJECT, _INT),
    "reads_remove": (None, _NUMBER, _NUMBER),
    "reads_remove_all": (None,),
    "pieces_allow": (None, _NUMBER, _INT, _TEXT, _NUMBER, _NUMBER, _OBJECT),
    "pieces_open": (None, _NUMBER, _TEXT),
    "pieces_clear": (None,),
}
for _library, _signatures in ((_LIBRARY, _SIGNATURES), (_WITH_LOCK, _SIGNATURES_WITH_LOCK)):
    for _name, (_result, *_arguments) in _signatures.items():
        _function = getattr(_library, _name)
        _function.restype, _function.argtypes = _result, _arguments
REQUEST_NUMBER = ctypes.c_uint64.in_dll(_LIBRARY, "device_current")
"""The kernel's number of the request whose handler runs. Valid only in a handler that has not awaited yet."""
NANOSECONDS_WAITED = ctypes.c_int64.in_dll(_LIBRARY, "device_waited")
"""How long that request has waited for Python. Valid only in a handler that has not awaited yet."""


class Device:
    """The thread of one session. Make it before pyfuse3.init, which starts it."""

    def __init__(self, readahead: bool, passthrough: bool = False) -> None:
        """Without `readahead` the kernel requests only what programs read. With `passthrough` it is asked to
        read backing files itself. Raises OSError."""
        self._notify_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _LIBRARY.device_prepare(self._notify_fd, readahead, passthrough)
        _LIBRARY.pieces_key(tags.KEY)

    @property
    def started(self) -> bool:
        """Whether the thread runs. After pyfuse3.init it does, unless pyfuse3 was imported before this
        module."""
        return bool(_LIBRARY.device_started())

    @property
    def passes_through(self) -> bool:
        """Whether the kernel agreed to read backing files itself. Known when `initialized` has returned."""
        return bool(_LIBRARY.reply_init_result() & _INIT_PASSTHROUGH)

    @property
    def start_error(self) -> int:
        """The errno of what prevented the thread's start, 0 if nothing did."""
        return int(_LIBRARY.device_start_error())

    async def initialized(self) -> bool:
        """Waits until INIT is answered. Returns whether the kernel offered parallel directory operations.
        Raises MountFailed if libfuse refused. If the mount ends before that, INIT is never answered, and this
        waits until it is cancelled."""
        while (result := _LIBRARY.reply_init_result()) in (0, -errno.ENOENT):
            await self.notified()
        if result < 0:
            raise MountFailed(f"libfuse refused INIT: {os.strerror(-result)}")
        return bool(result & _INIT_PARALLEL)

    async def notified(self) -> None:
        """Waits until INIT is answered, a request was interrupted, or there are many opens to drain."""
        await trio.lowlevel.wait_readable(self._notify_fd)
        os.eventfd_read(self._notify_fd)

    def interrupted(self) -> Iterator[int]:
        """The numbers of requests whose callers got a signal while they waited, or before. Each comes
        once."""
        while number := _LIBRARY.device_interrupted():
            yield number

    def stop(self) -> None:
        """Ends the thread. Requests that wait for Python are dropped."""
        _LIBRARY.device_stop()
        _WITH_LOCK.reads_remove_all()
        _WITH_LOCK.pieces_clear()
        os.close(self._notify_fd)


class ReadWindows:
    """The verified bytes of one open file from which the thread may answer reads. Implements
    `vfs.open_file.ReadWindows`."""

    __slots__ = ("add", "allow", "expect", "remove")

    def __init__(self, handle: int, inode: int, cid: Cid) -> None:
        """`inode` is that of the file `cid` while it is open."""
        _WITH_LOCK.pieces_open(inode, cids.text(cids.canonical(cid)).encode())
        self.expect: Callable[[int, int], None] = partial(_WITH_LOCK.reads_expect, handle)
        self.add: Callable[[int, Buffer, bool], None] = partial(_WITH_LOCK.reads_add, handle)
        self.remove: Callable[[int], None] = partial(_WITH_LOCK.reads_remove, handle)
        self.allow: Callable[[int, bytes, int, int, bytes], None] = partial(_WITH_LOCK.pieces_allow, inode)


@contextmanager
def listening(listener: tuple[int, int] | None) -> Iterator[None]:
    """Within this block, a session calls `listener` with each name that is looked up in its root, before
    Python gets the request. `listener` is a C function and its first argument
    (`fileio.flatfs.BlockFiles.name_listener`)."""
    _LIBRARY.device_listen(*(listener or (None, None)))
    try:
        yield
    finally:
        _LIBRARY.device_listen(None, None)


def allow(inode: int) -> None:
    """Lets the thread answer opens of `inode`, which must be a regular file whose attributes the kernel has
    correctly, or a directory that never changes."""
    _WITH_LOCK.opens_allow(inode)


def revoke(inode: int) -> int:
    """Makes opens of `inode` go to Python again, and withdraws its offer. Returns how many files the thread
    has open of it; their releases will go to Python too."""
    return int(_WITH_LOCK.opens_revoke(inode))


def offer(inode: int, content: bytes) -> None:
    """Offers the content of `inode`, or its beginning, to the thread. The next open stores it into the
    kernel's page cache, and is answered by the thread. Must be called only for a regular file that is not
    open in Python, and whose attributes the kernel has correctly. The last 256 offers are kept."""
    _WITH_LOCK.opens_offer(inode, content, len(content))


def withdraw(inode: int) -> None:
    """Ensures that nothing is stored into `inode`. Call it before an open of it is answered by Python."""
    _WITH_LOCK.opens_withdraw(inode)


def revoke_idle() -> None:
    """Makes opens go to Python again for every inode that the thread does not have open, and withdraws all
    offers."""
    _WITH_LOCK.opens_revoke_idle()


def drain() -> Sequence[tuple[int, int]]:
    """The inodes that the thread has opened since the last call, in order, and the user who opened each."""
    return _drained(_WITH_LOCK.opens_drain)


def release(handle: int) -> None:
    """Counts the release of a handle that the thread gave and could not answer. Not for a file that Python
    has taken over."""
    _WITH_LOCK.opens_release(handle & ~_ANSWERED_HERE)


def listing_ends(handle: int, offset: int) -> None:
    """Python has given the last entry of an open directory, at this offset. From now on the thread answers
    reads after it, and the release. `released_listings` returns the release later."""
    _WITH_LOCK.opens_end(handle, offset)


def released_listings() -> Sequence[int]:
    """The handles of directories whose release the thread has answered since the last call."""
    return [handle for handle, _user in _drained(_WITH_LOCK.opens_released)]


def _drained(write: Callable[..., int]) -> Sequence[tuple[int, int]]:
    numbers, users = _Numbers(), _Users()
    count = write(numbers, users)
    return list(zip(numbers[:count], users[:count], strict=True))


def inode_of(handle: int) -> int | None:
    """The inode of a handle that the thread gave; None for any other handle."""
    return handle & ~_ANSWERED_HERE if handle & _ANSWERED_HERE else None


def open_backing(file: int) -> int:
    """Lets the kernel read the open file `file` itself. It stays open in the kernel until `close_backing` and
    the last release. Returns its backing id. Raises OSError; EPERM without CAP_SYS_ADMIN."""
    backing = int(_LIBRARY.device_backing_open(file))
    if backing < 0:
        raise OSError(-backing, os.strerror(-backing))
    return backing


def close_backing(backing: int) -> None:
    """No more files will be opened with this id."""
    _LIBRARY.device_backing_close(backing)


def passthrough_handle(backing: int) -> int:
    """The file handle that makes the kernel read the backing file. All opens of a file have the same."""
    return _PASSTHROUGH | backing


def with_cached_listing(handle: int) -> int:
    """A directory handle that lets the kernel cache the listing: 10,000 names take 6 ms instead of 53. Only
    for a directory that never changes."""
    return handle | _CACHE_LISTING
