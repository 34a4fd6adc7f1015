"""The Python side of our C code: the thread that reads /dev/fuse, and what it may answer without Python.

The library must be loaded before pyfuse3 is imported, because the dynamic linker takes a function from the
library that was loaded first: some of libfuse's calls are replaced by ours (`libfuse_calls.c`, `device.c`).

The thread answers two kinds of requests. Reads of leaves that wait in memory (`ReadWindows`, `reads.c`); and
opens and releases, for reading, of small files that were allowed here (`opens.c`). It counts those opens, and
`drain` tells Python of them afterwards. After 32 opens that were not drained, the next open goes to Python.

Concurrency: any thread may call anything here.
"""

import ctypes
import os
from collections.abc import Sequence

from ipfsfuse.cache.base import Content
from ipfsfuse.fileio.native import load

NAME_ONLY = (1 << 64) - 1
"""The generation that marks a directory entry which goes out with node id 0. As in `libfuse_calls.c`."""
_CACHE_LISTING = 1 << 62
"""As in `libfuse_calls.c`."""
_ANSWERED_HERE = 1 << 63
_UNDRAINED = 32
"""Both as in `opens.c`."""
INODE_BITS = 63
"""An inode's number must leave the highest bit free: `opens.c` makes a handle of the number and that bit."""

_Drained = ctypes.c_uint64 * _UNDRAINED

_LIBRARY = load("ipfsfuse.fuse._native", ctypes.RTLD_GLOBAL)
_LIBRARY.opens_allow.argtypes = (ctypes.c_uint64,)
_LIBRARY.opens_allow.restype = None
_LIBRARY.opens_revoke.argtypes = (ctypes.c_uint64, ctypes.c_int)
_LIBRARY.opens_revoke.restype = ctypes.c_uint32
_LIBRARY.opens_revoke_idle.restype = None
_LIBRARY.opens_drain.argtypes = (_Drained,)
_LIBRARY.opens_drain.restype = ctypes.c_uint32
_LIBRARY.device_init.argtypes = _LIBRARY.device_start.argtypes = (ctypes.c_int,)
_LIBRARY.device_init.restype = _LIBRARY.device_stop.restype = None
_WAITED = ctypes.c_int64.in_dll(_LIBRARY, "device_waited")
_WITH_LOCK = ctypes.PyDLL(_LIBRARY._name)
"""The same library, for calls that use Python objects: PyDLL keeps Python's lock during a call."""
_WITH_LOCK.reads_add.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.py_object, ctypes.c_int)
_WITH_LOCK.reads_remove.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
_WITH_LOCK.reads_add.restype = _WITH_LOCK.reads_remove.restype = _WITH_LOCK.reads_remove_all.restype = None


class DeviceReader:
    """The thread of one session. Make it before pyfuse3 is given its device."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _LIBRARY.device_init(self._wakeup_fd)

    def wake(self) -> None:
        """Makes pyfuse3 read its device once. For requests that come before `start`."""
        os.eventfd_write(self._wakeup_fd, 1)

    def start(self, device: int) -> None:
        """From now on the thread reads requests from `device`, where libfuse sends its replies. Raises
        OSError."""
        failed = _LIBRARY.device_start(device)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def stop(self) -> None:
        """Ends the thread. Requests that wait for Python are dropped."""
        _LIBRARY.device_stop()
        _WITH_LOCK.reads_remove_all()
        os.close(self._wakeup_fd)


class ReadWindows:
    """Verified bytes of one open file that the thread may give to its reader: a
    `vfs.buffers.ReadWindows`."""

    __slots__ = ("_handle",)

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def add(self, offset: int, content: Content, told: bool) -> None:
        _WITH_LOCK.reads_add(self._handle, offset, content, told)

    def remove(self, offset: int) -> None:
        _WITH_LOCK.reads_remove(self._handle, offset)


def waited() -> float:
    """How many seconds the request that is being served had waited for Python. For a handler that has not
    waited yet."""
    return _WAITED.value * 1e-9


def allow(inode: int) -> None:
    """From now on the thread opens `inode`, a regular file whose attributes the kernel has been told
    correctly."""
    _LIBRARY.opens_allow(inode)


def revoke(inode: int) -> int:
    """From now on opens of `inode` go to Python. Returns how many opens the thread had counted; their
    releases will go to Python too."""
    return int(_LIBRARY.opens_revoke(inode, 1))


def revoke_if_closed(inode: int) -> bool:
    """As `revoke`, but only if the thread has counted no open. Returns whether that was so."""
    return not _LIBRARY.opens_revoke(inode, 0)


def revoke_idle() -> None:
    """As `revoke_if_closed` of every inode."""
    _LIBRARY.opens_revoke_idle()


def drain() -> Sequence[int]:
    """The inodes that the thread has opened since the last call, in order."""
    inodes = _Drained()
    return inodes[: _LIBRARY.opens_drain(inodes)]


def inode_of(handle: int) -> int | None:
    """The inode of a file handle that the thread gave; None for any other handle."""
    return handle & ~_ANSWERED_HERE if handle & _ANSWERED_HERE else None


def with_cached_listing(handle: int) -> int:
    """A directory handle that lets the kernel keep the listing and give it without asking again: 10,000 names
    in 6 ms instead of 53. Only for a directory that never changes."""
    return handle | _CACHE_LISTING
