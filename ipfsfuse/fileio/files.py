"""File operations that the standard library lacks: direct I/O, holes, shared extents, safe replacement, and
the status of many files at once.

Concurrency: any thread. Every call blocks.
"""

import ctypes
import errno
import fcntl
import importlib.util
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.structures import Buffer


def load_library(name: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    """Loads the library of the extension module `name`. With RTLD_GLOBAL, its functions replace those of the
    same names in libraries that are loaded later. Raises IpfsFuseError if it is missing or can't be
    loaded."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise IpfsFuseError(
            f"the compiled part {name} is missing: install ipfsfuse again (in a checkout: scripts/setup)"
        )
    try:
        return ctypes.CDLL(found.origin, mode=mode)
    except OSError as exc:
        raise IpfsFuseError(
            f"the compiled part {name} can't be loaded ({exc}): install ipfsfuse again"
        ) from exc


_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_LIBRARY = load_library("ipfsfuse.fileio._native")
_LIBRARY.stat_files.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
_LIBRARY.stat_files.restype = None


class Closing:
    """Closes a descriptor at the end of a block, as `contextlib.closing` closes an object."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __enter__(self) -> int:
        return self._file

    def __exit__(self, *_error: object) -> None:
        os.close(self._file)


def write_all(file: int, data: Buffer, offset: int) -> None:
    """Writes all of `data` at `offset`, with as many calls as needed. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def write_file(folder: int, name: str, data: bytes, lasting: bool = True, mode: int = 0o600) -> None:
    """Makes or replaces a file in the open `folder` by a rename: other processes see either the old or the
    new content. A link of that name is replaced. If `lasting`, the file is on the disk when this returns.

    Raises OSError. Then nothing has changed."""
    temporary = f".{name[:200]}.{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with Closing(os.open(temporary, flags, mode, dir_fd=folder)) as file:
            write_all(file, data, 0)
            if lasting:
                os.fsync(file)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    if lasting:
        os.fsync(folder)


def replace_text(path: Path, text: str) -> None:
    """Makes or replaces a file that all users may read, like `write_file`. Raises OSError. Then nothing has
    changed."""
    with Closing(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
        write_file(folder, path.name, text.encode(), lasting=False, mode=0o666)


def punch_hole(file: int, start: int, size: int) -> None:
    """Frees the disk space of `size` bytes by fallocate(2). Writes zeros if the file system has no holes.

    Raises OSError."""
    if _libc.fallocate(file, _KEEP_SIZE_PUNCH_HOLE, start, size) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EOPNOTSUPP:
        raise OSError(number, os.strerror(number))
    for at in range(start, start + size, 1 << 20):
        write_all(file, bytes(min(1 << 20, start + size - at)), at)


_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
NOT_SHARED = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.EPERM})
"""The errnos of two files that can't share extents."""


def share_extents(source: int, to: int, size: int, offset: int) -> None:
    """Puts the first `size` bytes of the open file `source` at `offset` of the open file `to`, without
    copying them: ioctl_ficlonerange(2), on XFS, btrfs and some others. `offset` and `size` must be multiples
    of the file system's block size, except for a `size` that ends both files. Raises OSError."""
    fcntl.ioctl(to, _FICLONERANGE, _CLONE_RANGE.pack(source, 0, size, offset))


# -- direct I/O ----------------------------------------------------------------------------------------------

ALIGNED = 4096
"""Bytes of which addresses, offsets and sizes must be multiples: enough for any disk."""
SLOW = 5e-9
"""Average seconds for a byte above which direct writes are slow: 200 MB/s. A single call says little, since
it may have waited for a processor."""
THREAD_SWITCH = 0.005
"""Seconds of each call that are not counted: a thread may wait so long for Python's lock after a call."""
WEIGHT = 1 / 8
"""The weight of the last call in the average."""
BUFFERED_WRITES = 64
"""After slow direct writes, so many writes go through the page cache before a direct one is tried again."""


class Direct:
    """Writes and reads staged files with O_DIRECT, or through the page cache if that is faster.

    Through the page cache, 1 MiB costs 0.2 ms of CPU, and up to 2 ms if a virtual machine must get the pages
    first. The data go to the disk later. With O_DIRECT it costs 0.08 ms, and the mount's own page cache has
    the bytes anyway. But then a write waits for the disk, and a slow disk would delay every reader. So on a
    slow disk, writes go through the page cache. A read waits for the disk in any case.

    Threads are not synchronised: a wrong count of calls costs only speed.
    """

    def __init__(self) -> None:
        self._buffered_writes = 0
        self._pace = 0.0
        self._supported = True
        """False after the file system refused O_DIRECT."""

    def read(self, file: int, parts: Sequence[memoryview], offset: int) -> None:
        """Fills `parts`, one after the other, up to the file's end. Raises OSError."""
        if self._call(os.preadv, file, parts, offset) is None:
            os.preadv(file, parts, offset)

    def write(self, file: int, parts: Sequence[Buffer], offset: int) -> None:
        """Writes `parts`, at most 1,024, one after the other from `offset` on. Raises OSError."""
        done: int | None = None
        if self._buffered_writes:
            self._buffered_writes -= 1
        else:
            start = time.monotonic()
            done = self._call(os.pwritev, file, parts, offset)
            if done is not None:
                pace = (time.monotonic() - start - THREAD_SWITCH) / sum(map(len, parts))
                self._pace += WEIGHT * (max(pace, 0.0) - self._pace)
            if self._pace > SLOW:
                self._buffered_writes, self._pace = BUFFERED_WRITES, SLOW  # the next direct write decides
        if done is None:
            done = os.pwritev(file, parts, offset)
        for part in parts:  # a short write is rare: what it left out is written part by part
            if done < len(part):
                write_all(file, memoryview(part)[done:], offset + done)
            done, offset = max(0, done - len(part)), offset + len(part)

    def _call(
        self,
        call: Callable[[int, Any, int], int],
        file: int,
        parts: Sequence[Buffer],
        offset: int,
    ) -> int | None:
        """The result of `call(file, parts, offset)` with O_DIRECT. None if that can't be done."""
        if not self._supported or offset % ALIGNED:
            return None
        for part in parts:
            if not isinstance(part, memoryview) or part.readonly or not part.contiguous or not part:
                return None  # its address can't be known
            if len(part) % ALIGNED or ctypes.addressof(ctypes.c_char.from_buffer(part)) % ALIGNED:
                return None
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            return call(file, parts, offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self._supported = False
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
        return None


# -- whole files ---------------------------------------------------------------------------------------------


class Status(NamedTuple):
    """As in os.stat_result."""

    st_mode: int
    st_nlink: int
    st_uid: int
    st_size: int
    st_blocks: int
    st_mtime: float


def stat_files(folder: int, names: Sequence[str]) -> Iterator[Status | None]:
    """The status of each of `names` in the open folder `folder`; None for a missing file. Links are not
    followed. Needs one call in C. Raises OSError."""
    numbers = (ctypes.c_int64 * (7 * len(names)))()
    _LIBRARY.stat_files(folder, b"\0".join(map(os.fsencode, names)) + b"\0", len(names), numbers)
    for at, name in enumerate(names):
        error, mode, links, user, size, blocks, changed = numbers[7 * at : 7 * at + 7]
        if error not in (0, errno.ENOENT):
            raise OSError(error, os.strerror(error), name)
        yield None if error else Status(mode, links, user, size, blocks, changed * 1e-9)


def read_file(path: str, most: int) -> bytes | None:
    """The content of a regular file of at most `most` bytes; None for anything else, and if it can't be read.
    Links are not followed."""
    try:
        with regular(path, most) as (file, size):
            content = os.pread(file, size, 0)
    except OSError:
        return None
    return content if len(content) == size else None


@contextmanager
def regular(path: str, most: int) -> Iterator[tuple[int, int]]:
    """Opens a regular file of at most `most` bytes for reading. Gives its descriptor and its size. Raises
    FileNotFoundError for anything else, without waiting for a pipe, and OSError."""
    with Closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_size > most:
            raise FileNotFoundError(errno.ENOENT, "no regular file of that size", path)
        yield file, info.st_size


def size_of(path: str) -> int | None:
    """The size of a regular file, in bytes; None for anything else."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None
