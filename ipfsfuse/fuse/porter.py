"""The porter at the device: a thread in C that reads the kernel's requests, and answers those that need nobody.

What it answers are reads of leaves that wait in memory (`reads.c`, `Counter`), and opens and releases of small files whose
bytes are in the page cache, or will be asked for (`opens.c`): of the inodes made known here, and it keeps count. Python hears
of them afterwards (`heard`); at the latest the 33rd open in a row comes to it as any other. Writing never gets past: such an
open is passed on. Where the C part is not compiled nothing is known, and pyfuse3 reads the device itself. Concurrency: any
thread's.
"""

import ctypes
import os
from collections.abc import Sequence

from ipfsfuse.cache.base import Content
from ipfsfuse.fuse.native import LIBRARY

_OURS = 1 << 63
_PACE = 32
"""As in `opens.c`."""

_Heard = ctypes.c_uint64 * _PACE

if LIBRARY is not None:
    LIBRARY.opens_know.argtypes = (ctypes.c_uint64,)
    LIBRARY.opens_know.restype = None
    LIBRARY.opens_dismiss.argtypes = (ctypes.c_uint64, ctypes.c_int)
    LIBRARY.opens_dismiss.restype = ctypes.c_uint32
    LIBRARY.opens_dismiss_idle.restype = None
    LIBRARY.opens_heard.argtypes = (_Heard,)
    LIBRARY.opens_heard.restype = ctypes.c_uint32
    LIBRARY.porter_hire.argtypes = LIBRARY.porter_begin.argtypes = (ctypes.c_int,)
    LIBRARY.porter_hire.restype = LIBRARY.porter_end.restype = None
    _WITH_LOCK = ctypes.PyDLL(LIBRARY._name)
    """The same library: for calls that use Python's objects."""
    _WITH_LOCK.reads_offer.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.py_object, ctypes.c_int)
    _WITH_LOCK.reads_withdraw.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
    _WITH_LOCK.reads_offer.restype = _WITH_LOCK.reads_withdraw.restype = _WITH_LOCK.reads_withdraw_all.restype = None


class Porter:
    """One session's. It must be there before pyfuse3 is given its device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Raises OSError."""
        self._library = library
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        library.porter_hire(self._bell)

    def ring(self) -> None:
        """Has pyfuse3 look at its device: for what comes before `begin`."""
        os.eventfd_write(self._bell, 1)

    def begin(self, device: int) -> None:
        """From now on requests are read from `device`, where libfuse sends the replies. Raises OSError."""
        failed = self._library.porter_begin(device)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def end(self) -> None:
        """No requests are read any more; what waits is dropped."""
        self._library.porter_end()
        _WITH_LOCK.reads_withdraw_all()
        os.close(self._bell)


def hired() -> Porter | None:
    """None where the C part is not compiled."""
    return Porter(LIBRARY) if LIBRARY is not None else None


class Counter:
    """Where the reader of one open file gets, from the porter, what waits for him: a `vfs.landing.Counter`."""

    __slots__ = ("_handle",)

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def offer(self, offset: int, content: Content, told: bool) -> None:
        _WITH_LOCK.reads_offer(self._handle, offset, content, told)

    def withdraw(self, offset: int) -> None:
        _WITH_LOCK.reads_withdraw(self._handle, offset)


def counter(handle: int) -> Counter | None:
    """For the file that was opened by `handle`; None where the C part is not compiled."""
    return Counter(handle) if LIBRARY is not None else None


def know(inode: int) -> None:
    """`inode`, a file of which the kernel was told nothing but the truth, is opened for whoever asks."""
    if LIBRARY is not None:
        LIBRARY.opens_know(inode)


def dismiss(inode: int) -> int:
    """From now on opens of `inode` come to Python; returns how many stand open, whose releases do as well."""
    return int(LIBRARY.opens_dismiss(inode, 1)) if LIBRARY is not None else 0


def closed(inode: int) -> bool:
    """Whether `inode` does not stand open here; then its opens come to Python from now on."""
    return LIBRARY is None or not LIBRARY.opens_dismiss(inode, 0)


def dismiss_idle() -> None:
    """From now on opens come to Python, of everything that does not stand open."""
    if LIBRARY is not None:
        LIBRARY.opens_dismiss_idle()


def heard() -> Sequence[int]:
    """The inodes that were opened since this was asked last, in order."""
    if LIBRARY is None:
        return ()
    inodes = _Heard()
    return inodes[: LIBRARY.opens_heard(inodes)]


def inode_of(handle: int) -> int:
    """Whose handle that is, of those given here."""
    return handle & ~_OURS
