"""Whole small files, many at once.

Each by itself would take and give back Python's lock four times: where another thread wants it, that costs
more than the reading. `whole.c` takes it once. Concurrency: any thread's; it blocks.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.native import load

_LIBRARY = load("ipfsfuse.fileio._native")
_LIBRARY.whole_files.argtypes = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_void_p,
)
_LIBRARY.whole_files.restype = ctypes.c_int


def read_whole(paths: Sequence[str], most: int) -> list[bytes | None]:
    """What regular files hold, of the first of `paths` and as many behind it as together have `most` bytes;
    None of those that are not there, can't be read, or are larger than that alone. Links are not followed."""
    names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
    lengths = (ctypes.c_int64 * len(paths))()
    room = lend(most)
    seen = _LIBRARY.whole_files(
        names, len(paths), ctypes.addressof(ctypes.c_char.from_buffer(room)), most, lengths
    )
    found: list[bytes | None] = []
    at = 0
    for length in lengths[:seen]:
        found.append(bytes(room[at : at + length]) if length >= 0 else None)
        at += max(length, 0)
    return found


def read_file(path: str, most: int) -> bytes | None:
    """As `read_whole` of one: without a buffer between."""
    try:
        with regular(path, most) as (file, size):
            content = os.pread(file, size, 0)
    except OSError:
        return None
    return content if len(content) == size else None


@contextmanager
def regular(path: str, most: int) -> Iterator[tuple[int, int]]:
    """A regular file of at most `most` bytes, open for reading, and its size. Raises FileNotFoundError for
    anything else, without waiting for a pipe, and OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_size > most:
            raise FileNotFoundError(errno.ENOENT, "no regular file of that size", path)
        yield file, info.st_size
    finally:
        os.close(file)


def size_of(path: str) -> int | None:
    """The size of a regular file, in bytes; None of anything else."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None
