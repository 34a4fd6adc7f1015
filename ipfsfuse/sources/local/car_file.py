"""One CAR file on disk: its roots, and its blocks by multihash.

The calls of `CarFile` block. Any number of threads may call them at once: every read is a pread. `CarFile`
checks only that the section at a block's place has the CID that was asked for. The caller verifies the bytes.
All errors are SourceFailed.

Blocks are found through the file's own index, or through one that is built here. An index is built once by
walking the sections, and is kept in a folder under the file's identity. Several processes may build the same
index at once: each writes its own temporary file and renames it. Where blocks are large, only the heads of
the sections are read. Memory is bounded for a file of any size.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.car import Section
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid, NotHere, SourceFailed, Unsupported
from ipfsfuse.sources.local.car_writer import RecordSorter

Read = Callable[[int, int, int], bytes]
"""(file descriptor, offset, length) -> that many bytes, or fewer at the end of the file."""

MAX_COPY_ON_LOOP = 128 << 10
"""Larger blocks take long enough to copy (20 us) that a worker thread should do it."""


class Identity(NamedTuple):
    """Identifies one state of a file: a change to the file changes it."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class CarLocation(NamedTuple):
    """A block in the file: `size` bytes at `offset`."""

    offset: int
    size: int


def read_disk(fd: int, offset: int, length: int) -> bytes:
    """A `Read` that waits for the disk."""
    return os.pread(fd, length, offset)


def read_cached(fd: int, offset: int, length: int) -> bytes:
    """A `Read` from the page cache alone. Raises BlockingIOError if the page cache lacks some of the bytes,
    or the file system can't tell."""
    buffer = bytearray(length)
    try:
        got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as exc:
        raise BlockingIOError from exc
    if got < length:
        raise BlockingIOError
    return bytes(buffer)


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """Raises errors of the operating system and of the format as SourceFailed, which names the file."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as exc:
        raise SourceFailed(
            f"{name}: {exc.strerror}", kind="missing" if isinstance(exc, FileNotFoundError) else "disk"
        ) from exc
    except (Malformed, NotACid) as exc:
        raise SourceFailed(f"{name}: {exc}", kind="malformed") from exc


class CarFile:
    """An open file. It can be asked for blocks once it has an index: its own, or one that was built."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header. Raises SourceFailed: no such file, empty, not a CAR, a wrong
        header."""
        self.path = path
        self.name = path.name
        with disk_errors(str(path)):
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait
            try:
                self._read_headers()
            except BaseException:
                os.close(self.fd)
                raise
        self._buckets: tuple[car.IndexBucket, ...] = ()
        self._index_fd = self.fd

    def _read_headers(self) -> None:
        status = os.fstat(self.fd)
        self.identity = Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise Malformed("not a file that can be read at any place: write the CAR into one")
        if not status.st_size:
            raise Malformed("not a CAR: the file is empty")
        self.data_offset, self.data_end, self._index_offset = 0, status.st_size, 0
        frame = read_disk(self.fd, 0, car.V2_BYTES)
        if car.is_v2(frame):
            header = car.decode_v2(frame)
            self.data_offset, self.data_end = header.data_offset, header.data_offset + header.data_size
            self._index_offset = header.index_offset
            if self.data_offset >= status.st_size:
                raise Malformed(
                    "the CAR is cut short, or its header lies: its data would begin behind the file's end"
                )
        length = car.header_length(read_disk(self.fd, self.data_offset, 9))
        self.roots = car.decode_header(read_disk(self.fd, self.data_offset, length))
        self.sections_offset = self.data_offset + length
        if self.sections_offset > self.data_end:
            raise Malformed("the CAR's header crosses the end of its data")

    # -- the index -------------------------------------------------------------------------------------------

    def use_own_index(self) -> bool:
        """Uses the index in the file itself. False if the file has none, or a broken one."""
        if not 0 < self._index_offset < self.identity.size:
            return False
        try:
            self._buckets = car.index_buckets(
                lambda at, length: read_disk(self.fd, self._index_offset + at, length)
            )
        except Malformed:
            return False
        last = max((bucket.start + bucket.width * bucket.records for bucket in self._buckets), default=0)
        return self._index_offset + last <= self.identity.size

    def use_index(self, fd: int, offset: int) -> None:
        """Uses the index at `offset` of the file `fd`. Takes `fd` over. Raises SourceFailed."""
        self._index_fd, self._index_offset = fd, offset
        with disk_errors(f"the index of {self.path}"):
            self._buckets = car.index_buckets(lambda at, length: read_disk(fd, offset + at, length))

    # -- blocks ----------------------------------------------------------------------------------------------

    def find(self, multihash: bytes, read: Read = read_disk) -> CarLocation | None:
        """The place of the block of `multihash`. The index names it, and the section there confirms it.

        Raises SourceFailed."""
        with disk_errors(str(self.path)):
            offsets = car.index_find(
                self._buckets,
                multihash,
                lambda at, length: read(self._index_fd, self._index_offset + at, length),
            )
            for offset in offsets:
                location = self._section_of(multihash, self.data_offset + offset, read)
                if location is not None:
                    return location
        if offsets:
            raise SourceFailed(self._wrong_index_message(), kind="malformed")
        return None

    def _section_of(self, multihash: bytes, offset: int, read: Read) -> CarLocation | None:
        """The block of the section at `offset`; None if the section has another multihash or is cut short."""
        if not self.sections_offset <= offset < min(self.data_end, self.identity.size):
            return None
        head = read(self.fd, offset, min(car.HEAD_BYTES, self.data_end - offset))
        try:
            found = car.section(head, 0, offset)
        except Malformed:
            return None
        if found.end > min(self.data_end, self.identity.size) or cids.multihash(found.cid) != multihash:
            return None
        return CarLocation(found.block, found.end - found.block)

    def _wrong_index_message(self) -> str:
        if self.changed():
            return f"{self.path} has changed since it was opened: mount again"
        return f"{self.path}: its index names a place for a block where that block is not, or not whole"

    def changed(self) -> bool:
        """Whether the file has changed since it was opened."""
        status = os.fstat(self.fd)
        return (status.st_size, status.st_mtime_ns) != (self.identity.size, self.identity.mtime_ns)

    def read_small(self, location: CarLocation) -> bytes:
        """The bytes at `place`, from the page cache alone. Raises BlockingIOError, for large blocks too."""
        if location.size > MAX_COPY_ON_LOOP:
            raise BlockingIOError
        return read_cached(self.fd, location.offset, location.size)

    def read(self, location: CarLocation) -> bytes:
        """The bytes at `place`. Raises SourceFailed."""
        with disk_errors(str(self.path)):
            block = read_disk(self.fd, location.offset, location.size)
        if len(block) != location.size:
            raise SourceFailed(f"{self.path} is cut short at {location.offset + len(block)}", kind="short")
        return block

    def close(self) -> None:
        """No other thread may be reading: the number of a closed descriptor can be given to another file."""
        for fd in {self.fd, self._index_fd} - {-1}:
            os.close(fd)
        self.fd = self._index_fd = -1

    def __del__(self) -> None:
        if getattr(self, "_index_fd", -1) >= 0:
            self.close()


class Found(NamedTuple):
    """Where a block lies."""

    file: CarFile
    location: CarLocation


def readable(name: str, cid: Cid, found: Found | None) -> Found:
    """`found` itself, if it can be read as the block of `cid`. Raises NotHere, BlockTooLarge."""
    if found is None or cids.inline_block(cid) is not None:
        raise NotHere(f"{name} does not have {cids.text(cid)}")
    if found.location.size > cids.MAX_BLOCK:
        raise cids.too_large(name, cid, found.location.size)
    return found


# -- building an index ---------------------------------------------------------------------------------------

IndexProgress = Callable[[int, int], None]
"""Called now and then while an index is built, with the bytes read so far and the file's size."""

_SMALL_WINDOW, _LARGE_WINDOW = 4 << 10, 256 << 10
_REPORT_EVERY = 64 << 20
_WHOLE = b"ipfsfuse-index-1\n"
_DAMAGED = b"ipfsfuse-index-1-damaged\n"


def sections(file: CarFile) -> Iterator[Section]:
    """Every whole section, in the order of the file. Raises Malformed after the last whole one if the file is
    damaged."""
    end = min(file.data_end, file.identity.size)
    at = file.sections_offset
    window, start = b"", at
    while at < end:
        if at + car.HEAD_BYTES > start + len(window) and start + len(window) < end:
            size = _SMALL_WINDOW if at >= start + len(window) + _SMALL_WINDOW else _LARGE_WINDOW
            window, start = read_disk(file.fd, at, min(size, end - at)), at
        # a section of no bytes ends a CAR. Source: go-car's ZeroLengthSectionAsEOF
        if window[at - start] == 0:
            if not _only_zeros(file.fd, at, end):
                raise Malformed(f"the CAR has no section at {at}, and something behind that")
            break
        found = car.section(window, at - start, start)
        if found.end > end:
            raise Malformed(f"the CAR is cut short in the section at {at}")
        yield found
        at = found.end
    if end < file.data_end:
        raise Malformed(f"the CAR is cut short: {file.data_end - end} bytes are missing")


def _only_zeros(fd: int, start: int, end: int) -> bool:
    """Whether a file has nothing but zeros from `start` to `end`. Holes are not read."""
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole from here on
                return True
            raise
        piece = read_disk(fd, at, min(_LARGE_WINDOW, end - at)) if at < end else b""
        if piece.count(0) != len(piece):
            return False
        at += len(piece) or end
    return True


def ensure_index(file: CarFile, folder: Path, progress: IndexProgress | None) -> bool:
    """Gives `file` an index: its own, or the one kept in `folder`, which is built if it is missing.

    False if the file is damaged: the blocks before the damage can be read. Raises SourceFailed.
    """
    if file.use_own_index():
        return True
    path = folder / "{:x}-{:x}-{}-{}.index".format(*file.identity)
    with disk_errors(f"the index of {file.path} in {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _build(file, path, progress)
            _sweep(folder, path, file.identity)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    head = read_disk(fd, 0, len(_DAMAGED))
    whole = head.startswith(_WHOLE)
    try:
        file.use_index(fd, len(_WHOLE if whole else _DAMAGED))
    except SourceFailed:
        path.unlink(missing_ok=True)  # it is built anew next time
        raise
    return whole


def _build(file: CarFile, path: Path, progress: IndexProgress | None) -> None:
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as out, RecordSorter(path.parent) as sorter:
            whole = _collect(file, sorter, progress)
            out.write(_WHOLE if whole else _DAMAGED)
            sorter.write(out)
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _collect(file: CarFile, sorter: RecordSorter, progress: IndexProgress | None) -> bool:
    """Adds every block that a caller can ask for. False if the file is damaged."""
    total = min(file.data_end, file.identity.size)
    reported = 0
    try:
        for found in sections(file):
            multihash = cids.multihash(found.cid)
            with suppress(Unsupported):  # nobody will ask for it
                multihashes.check_allowed(multihash)
                if multihash[0] != multihashes.IDENTITY:
                    sorter.add(multihash, found.start - file.data_offset)
            if progress is not None and (found.end - reported >= _REPORT_EVERY or found.end == total):
                reported = found.end
                progress(found.end, total)
    except Malformed:
        return False
    return True


def _sweep(folder: Path, keep: Path, identity: Identity) -> None:
    """Removes the indexes of earlier states of the same file."""
    name = re.compile("{:x}-{:x}-[0-9]+-[0-9]+\\.index".format(*identity))
    for old in folder.iterdir():
        if old != keep and name.fullmatch(old.name) and stat.S_ISREG(old.lstat().st_mode):
            old.unlink(missing_ok=True)
