"""Calls on open files that the standard library leaves to us. Concurrency: they block, and belong in a
thread."""

import ctypes
import errno
import os
from collections.abc import Sequence


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`, in as many writes as it takes. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def write_parts(file: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    """`parts`, at most 1,024, one behind the other from `offset` on. Raises OSError."""
    done = os.pwritev(file, parts, offset)
    for part in parts:  # a short write is rare: what it left out is written part by part
        if done < len(part):
            write_all(file, memoryview(part)[done:], offset + done)
        done, offset = max(0, done - len(part)), offset + len(part)


_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(file: int, start: int, size: int) -> None:
    """fallocate(2), which the standard library does not offer with a mode. Where the file system can't, zeros
    are written."""
    if _libc.fallocate(file, _KEEP_SIZE_PUNCH_HOLE, start, size) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EOPNOTSUPP:
        raise OSError(number, os.strerror(number))
    for at in range(start, start + size, 1 << 20):
        write_all(file, bytes(min(1 << 20, start + size - at)), at)
