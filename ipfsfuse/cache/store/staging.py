"""Staging files: one sparse file for each file of over 64 KiB, with the file's content at its offsets.

A file is called `<cid>.part` until every byte is there. Then it is synced (fdatasync) and renamed to `<cid>`.
The present leaves are known in memory. After a restart, the data extents (SEEK_DATA) say which leaves may be
present. Each leaf is verified by its hash when it is read back. So the disk is not trusted, and nothing but
content is written.

Concurrency: `StagingEntry` and `Staging` belong to the event loop. The functions under "in a thread" are
called in worker threads, and take the entry's lock where a removal must not happen meanwhile. Files are
opened for each call (10 us), so that no file descriptor outlives a removal.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ipfsfuse.cache.store.folder import Subfolder, is_our_own, report_strays
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotACid, StoreFailed, Unsupported
from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.files import (
    ALIGNED,
    NOT_SHARED,
    Closing,
    Direct,
    Status,
    punch_hole,
    regular,
    share_extents,
)
from ipfsfuse.fileio.tags import TAG_BYTES, tags_of
from ipfsfuse.structures import Buffer

# -- times of use, by a clock that can't be set

# In memory, times are by the machine's clock: seconds since the start, sleep included (CLOCK_BOOTTIME). For
# users and on disk they are converted to the wall clock. So setting the wall clock, forwards or backwards,
# changes no order and makes no duration negative.

CLOCK_WAS_SET = 0.5
"""Seconds. If the two clocks' difference changes by more, the wall clock was set. Smaller changes come from
the time between reading the two."""

_start = float("-inf")
"""The time by the wall clock at which the machine was started."""


now = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""The time by the machine's clock, in seconds."""


def _wall_at_start() -> float:
    """The time by the wall clock at which the machine was started: the same until the wall clock is set."""
    global _start
    start = time.time() - now()
    if abs(start - _start) > CLOCK_WAS_SET:
        _start = start
    return _start


def to_wall(moment: float) -> float:
    """Converts a time by the machine's clock to seconds since 1970. The result for one moment changes only
    when the wall clock is set."""
    return max(0.0, _wall_at_start() + moment)


def from_wall(whens: Sequence[float]) -> list[float]:
    """Converts times by the wall clock, the earliest first, to times by the machine's clock. Keeps their
    order, also beside those of another call. Times in the future were written before the wall clock was set
    back: they become about now."""
    start = _wall_at_start()
    latest = now() - len(whens) * 1e-6
    return [min(when - start, latest + number * 1e-6) for number, when in enumerate(whens, 1)]


# -- staging files -------------------------------------------------------------------------------------------

PART = ".part"
PIECE = 8 << 10
"""Bytes of a piece of a verified leaf. Each piece can be verified without the rest of the leaf by its tag,
which takes 2 us. SHA-256 of a leaf of 1 MiB takes 0.6 to 1.4 ms. The same as in `fuse/pieces.c`."""
_NAME = re.compile(r"(b[a-z2-7]+)(\.part)?")
"""base32, as `cids.text` writes it."""


@dataclass(slots=True, eq=False)
class Extents:
    """The present bytes of a file: sorted half-open intervals of byte offsets, joined where they touch."""

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.starts, self.ends, strict=True))

    def covers(self, start: int, end: int) -> bool:
        at = bisect_right(self.starts, start) - 1
        return at >= 0 and self.ends[at] >= end

    def add(self, start: int, end: int) -> tuple[int, int]:
        """Adds [start, end). Returns the interval that contains it now."""
        if start >= end:
            return start, end
        low = bisect_left(self.ends, start)
        high = bisect_right(self.starts, end)
        if low < high:
            start = min(start, self.starts[low])
            end = max(end, self.ends[high - 1])
        self.starts[low:high] = [start]
        self.ends[low:high] = [end]
        return start, end

    def remove(self, start: int, end: int) -> None:
        if start >= end:
            return
        low = bisect_right(self.ends, start)
        high = bisect_left(self.starts, end)
        if low >= high:
            return
        left, right = (self.starts[low], start), (end, self.ends[high - 1])
        rest = [part for part in (left, right) if part[0] < part[1]]
        self.starts[low:high] = [part[0] for part in rest]
        self.ends[low:high] = [part[1] for part in rest]


Stamp = tuple[int, int, int, int]
"""Inode number, size, and times of the last change. They differ after anyone has written to the file."""


class Removed(Exception):
    """The entry was removed before a thread could write to it. Not raised out of the cache."""


_LOCKS = [threading.Lock() for _ in range(1024)]


@dataclass(slots=True, eq=False)
class StagingEntry:
    """One staging file."""

    cid: Cid
    size: int
    """Bytes of the whole file's content."""
    complete: bool = False
    """Whether all bytes were present once, so that it has its final name."""
    extents: Extents | None = None
    """Bytes that are present, or after a restart may be present; None until they are needed."""
    proved: Extents | None = None
    """For a file without its final name: the bytes that this run has written or verified."""
    fresh: bool = True
    """Whether it was written in this run only, so that wrong bytes in it do not come from a crash."""
    disk: int = 0
    """Bytes on disk, in file-system blocks, according to the writes that were reported."""
    seen: int = 0
    """The same, as a thread saw it last. So the growth by each write is reported once, with that write."""
    reserved: int = 0
    """Bytes on disk that writes under way may still take."""
    charged: int = 0
    """The bytes that the budget counts for it, with the reservations of writes under way."""
    dead: bool = False
    """Whether it was removed."""
    source: str = ""
    last_used: float = field(default_factory=now)
    """By `now`."""
    noted: float = field(default_factory=now)
    """When its last use was written to the disk."""
    stamp: Stamp | None = None
    """The stamp of the file when it was last verified as a whole, or since that began."""
    verified: bool = False
    """Whether all of it was verified in this run, and nothing was written since."""
    read_by_kernel: bool = False
    """Whether the kernel reads the file itself, so that nothing in it may be removed."""

    @property
    def lock(self) -> threading.Lock:
        """A lock that a few entries share: one for each of a million files would take 40 MB. A thread takes
        only one at a time."""
        return _LOCKS[hash(self.cid) % len(_LOCKS)]

    def gone(self) -> bool:
        """`dead`, read again: it may have been set since the lock was last released."""
        return self.dead

    def all_proved(self) -> bool:
        """Whether it may get its final name: every byte was verified or written in this run. That bytes are
        there after a crash proves nothing."""
        return not self.complete and self.proved is not None and self.proved.covers(0, self.size)

    def whole(self) -> bool:
        return self.extents.covers(0, self.size) if self.extents is not None else self.complete


class Staging:
    """The folder of staging files."""

    def __init__(self, path: Path) -> None:
        """Raises StoreFailed, OSError."""
        self.path = path
        self.entries: dict[Cid, StagingEntry] = {}
        """The known entries. Until `inventoried`, some of an earlier run are missing."""
        self.inventoried = False
        self.found_early: dict[Cid, float] = {}
        """Entries that were asked for before the scan found them, with their last use in an earlier run."""
        self._removed_early: set[Cid] = set()
        self.folder = Subfolder(path)
        self._direct = Direct()
        self.shares: bool | None = None
        """Whether files can share extents with a node's repository (reflinks); None until it was tried."""
        self.unit = 4096
        """Bytes of a file-system block."""
        self.too_large = 1 << 64
        """Bytes of the smallest file that the file system has refused as too large."""
        with contextlib.suppress(OSError):
            self.unit = os.statvfs(self.folder.fd).f_frsize or 4096

    # -- on the event loop -----------------------------------------------------------------------------------

    def find(self, cid: Cid) -> StagingEntry | None:
        """The entry of `cid`. Until all entries are known, looks for an unknown one on the disk, by two
        system calls."""
        entry = self.entries.get(cid)
        if entry is None and not self.inventoried and cid not in self._removed_early:
            entry = next(filter(None, (self._recognised(cids.text(cid) + end) for end in ("", PART))), None)
            if entry is not None:
                (entry.last_used,) = from_wall([entry.last_used])
                entry.noted = entry.last_used
                entry.charged = self.charge(entry)
                self.entries[cid] = entry
                self.found_early[cid] = entry.last_used
        return entry

    def _recognised(self, name: str) -> StagingEntry | None:
        """The entry of a usable file with this name from an earlier run."""
        try:
            info = self.folder.stat(name)
        except (OSError, StoreFailed):
            return None
        entry = _recognise(name, info)
        return entry if entry is not None and entry.size and is_our_own(info) else None

    def take(self, entry: StagingEntry) -> bool:
        """Adds an entry that `scan` found. Returns False if it is known already, or was removed meanwhile."""
        if entry.cid in self.entries or entry.cid in self._removed_early:
            return False
        self.entries[entry.cid] = entry
        entry.charged = self.charge(entry)
        return True

    def charge(self, entry: StagingEntry) -> int:
        """Bytes to count for `entry` now: what it takes, what writes under way may take, and, until the file
        is complete, a block or more for the extent tree that the file system writes later."""
        if entry.complete:  # returns the same int object if possible, which saves memory
            return entry.disk + entry.reserved if entry.reserved else entry.disk
        pieces = len(entry.extents.starts) if entry.extents is not None else 1
        return entry.disk + entry.reserved + self.unit * (1 + pieces // 100 + entry.disk // (64 << 20))

    def forget(self, entry: StagingEntry) -> None:
        if self.entries.get(entry.cid) is entry:
            del self.entries[entry.cid]
        if not self.inventoried:
            self._removed_early.add(entry.cid)

    # -- in a thread -----------------------------------------------------------------------------------------

    def scan(self) -> Iterator[StagingEntry]:
        """The entries of an earlier run. Removes files that are not our own, empty ones, and parts of files
        that are complete; leaves other names alone."""
        strays = []
        for name, info in self.folder.each_status():
            try:
                entry = _recognise(name, info)
                if entry is None or stat.S_ISDIR(info.st_mode):
                    strays.append(name)
                    continue
                # A file of size 0 remains if the daemon is killed between creating it and the first write.
                # Writing through a link would change a file elsewhere.
                usable = entry.size and is_our_own(info)
                if usable and (entry.complete or self._recognised(cids.text(entry.cid)) is None):
                    yield entry
                else:
                    self.folder.unlink(name)
            except FileNotFoundError:  # evicted or renamed meanwhile
                continue
        report_strays(self.path, strays)

    def look(self, entry: StagingEntry) -> Extents:
        """The bytes of `entry` that may be present, according to the file system."""
        if entry.complete:
            return Extents([0], [entry.size])
        found = Extents()
        with Closing(self._open_to_read(entry)) as file:
            try:
                at = 0
                while at < entry.size:
                    start = os.lseek(file, at, os.SEEK_DATA)
                    at = os.lseek(file, start, os.SEEK_HOLE)
                    found.add(start, at)
            except OSError as exc:
                if exc.errno != errno.ENXIO:  # ENXIO: no data after `at`
                    raise
        return found

    def read(self, entry: StagingEntry, leaf: Leaf) -> tuple[bytes, bool, bytes]:
        """The bytes stored for `leaf`, whether they are correct, and if so the tags of their pieces."""
        with Closing(self._open_to_read(entry)) as file:
            data = os.pread(file, leaf.size, leaf.offset)
        right = len(data) == leaf.size and _proves(leaf, data)
        return data, right, tags_of(data, PIECE) if right else b""

    def read_pieces(
        self, entry: StagingEntry, leaf: Leaf, start: int, stop: int, tags: bytes, flags: int
    ) -> memoryview | None:
        """The bytes [start, stop) of `leaf`, verified by the `tags` of its pieces. None if they are wrong;
        with the flag RWF_NOWAIT also if the disk would have to be read. Raises OSError."""
        start_piece, end_piece = start // PIECE, -(-stop // PIECE)
        data = bytearray(min(end_piece * PIECE, leaf.size) - start_piece * PIECE)
        with Closing(self._open_to_read(entry)) as file:
            try:
                count = os.preadv(file, [data], leaf.offset + start_piece * PIECE, flags)
            except OSError as exc:
                if flags and exc.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    return None
                raise
        if (
            count != len(data)
            or tags_of(data, PIECE) != tags[start_piece * TAG_BYTES : end_piece * TAG_BYTES]
        ):
            return None
        return memoryview(data)[start - start_piece * PIECE : stop - start_piece * PIECE]

    def dir_and_name(self, entry: StagingEntry) -> tuple[int, bytes]:
        """The folder's descriptor and the file's name."""
        return self.folder.fd, _name(entry).encode()

    def read_each(self, entry: StagingEntry, wanted: Sequence[Leaf]) -> Sequence[tuple[memoryview, bool]]:
        """Reads leaves that follow each other without a gap, at least one. Returns for each its bytes, and
        whether they are correct."""
        with Closing(self._open_to_read(entry)) as file:
            found = self._read_into_buffers(file, wanted, wanted[0].offset)
        return [(data, _proves(leaf, data)) for leaf, data in zip(wanted, found, strict=True)]

    def _read_into_buffers(self, file: int, wanted: Sequence[Leaf], offset: int) -> list[memoryview]:
        buffers = [lend(leaf.size) for leaf in wanted[:-1]]
        buffers.append(lend(-(-wanted[-1].size // ALIGNED) * ALIGNED))  # a file may end anywhere
        self._direct.read(file, buffers, offset)
        return [buffer[: leaf.size] for leaf, buffer in zip(wanted, buffers, strict=True)]

    def clone(
        self, entry: StagingEntry, leaves: Sequence[Leaf], files: Sequence[str]
    ) -> tuple[int, Sequence[memoryview]]:
        """Makes `entry` share the extents of `files`, which may hold the blocks of adjacent raw `leaves`.
        Returns by how many bytes it grew on disk, and the unverified bytes of the first leaves, as many as
        could be shared. Raises Removed, OSError.

        First a file without a name shares them, and that file is read: no other process can write to it.
        Sharing extents with a file waits for all reads of that file, and delays new ones."""
        with Closing(self._open_unnamed()) as copy:
            shared = self._share_each(copy, leaves, files)
            if not shared:
                return 0, []
            start, end = leaves[0].offset, leaves[shared - 1].offset + leaves[shared - 1].size
            found = self._read_into_buffers(copy, leaves[:shared], 0)
            with entry.lock:
                if entry.dead:
                    raise Removed
                before = entry.seen
                try:
                    with self._open_to_write(entry) as file:
                        share_extents(copy, file, end - start, start)
                except OSError:
                    entry.seen = before  # if the file has grown, the next write reports it
                    raise
                return entry.seen - before, found

    def _share_each(self, to: int, leaves: Sequence[Leaf], files: Sequence[str]) -> int:
        """Makes `to` share the extents of `files`, one after the other from its beginning, as far as
        possible. Returns for how many leaves that was done."""
        shared = 0
        with contextlib.suppress(OSError):
            for leaf, path in zip(leaves, files, strict=True):
                with regular(path, leaf.size) as (source, size):
                    if size != leaf.size:
                        break
                    share_extents(source, to, size, leaf.offset - leaves[0].offset)
                shared += 1
        return shared

    def _open_unnamed(self) -> int:
        path = f"/proc/self/fd/{self.folder.fd}"
        return os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def can_share(self, path: str, size: int) -> bool:
        """Whether staging files can share extents with files such as `path`, of `size` bytes. Tries it once,
        with a file without a name."""
        if self.shares is None:
            try:
                with regular(path, size) as (source, found), Closing(self._open_unnamed()) as to:
                    share_extents(source, to, found, 0)
                    self.shares = True
            except OSError as exc:
                if exc.errno not in NOT_SHARED:  # the file is gone, or the disk is full: try the next file
                    return False
                self.shares = False
        return self.shares

    def write(self, entry: StagingEntry, offset: int, parts: Sequence[Buffer]) -> tuple[int, OSError | None]:
        """Writes `parts` from `offset` on. Returns by how many bytes the file grew on disk, and the error if
        not everything could be written. Raises Removed."""
        with entry.lock:
            if entry.dead:
                raise Removed
            before = entry.seen
            try:
                with self._open_to_write(entry) as file:
                    self._direct.write(file, parts, offset)
            except OSError as exc:
                return entry.seen - before, exc
            return entry.seen - before, None

    @contextlib.contextmanager
    def _open_to_write(self, entry: StagingEntry) -> Iterator[int]:
        """The open file of `entry`, under its lock; `entry.seen` is set at the end. A file that is made for
        this is removed again if the block raises OSError. Raises OSError."""
        name = _name(entry)
        file = self.folder.open(name, os.O_RDWR | (0 if entry.complete else os.O_CREAT))
        try:
            is_new = not entry.seen and not os.fstat(file).st_size
            try:
                if not entry.seen:
                    os.ftruncate(file, entry.size)
                yield file
            except OSError as exc:
                if is_new:
                    if exc.errno == errno.EFBIG:
                        self.too_large = min(self.too_large, entry.size)
                    self.folder.unlink(name)
                raise
            finally:
                status = os.fstat(file)
                entry.seen = status.st_blocks * 512 if status.st_nlink else 0
        finally:
            os.close(file)

    def finish(self, entry: StagingEntry) -> int:
        """Syncs the file, then gives it its final name. Returns by how many bytes it grew on disk."""
        with entry.lock:
            if entry.gone() or entry.complete:
                return 0
            file = self.folder.open(_name(entry), os.O_RDWR)
        with Closing(file):
            os.fdatasync(file)
            with entry.lock:
                if entry.gone():
                    return 0
                folder = self.folder.fd
                os.rename(_name(entry), cids.text(entry.cid), src_dir_fd=folder, dst_dir_fd=folder)
                entry.complete = True
                return _grown(entry, file)

    def remove(self, entry: StagingEntry) -> int | None:
        """Removes the file and frees its space at once. Threads that are reading it get short reads.

        The name is removed first, so that a crash never leaves an empty file with a final name. If the kernel
        may still read the file for others, only the name is removed. Then this returns the open file: its
        space is freed when it `is_free` and closed."""
        with entry.lock:
            entry.dead = True
            try:
                file = self.folder.open(_name(entry), os.O_RDWR)
            except FileNotFoundError:
                return None
            still_read = False
            try:
                self.folder.unlink(_name(entry))
                still_read = not self._is_ours_alone(entry, file)
                if not still_read:
                    os.ftruncate(file, 0)
            finally:
                if not still_read:
                    os.close(file)
            return file if still_read else None

    def _is_ours_alone(self, entry: StagingEntry, file: int) -> bool:
        """Whether only we read `entry`, which is open as `file`. The kernel may still read a file of an
        earlier run for readers of a mount that was killed."""
        if not entry.read_by_kernel and (entry.fresh or not entry.complete):
            return True
        try:
            return not entry.read_by_kernel and is_free(file)
        except OSError:  # no leases here, and so no passthrough
            return True

    def punch(self, entry: StagingEntry, start: int, end: int) -> int:
        """Frees the space of [start, end). Returns by how many bytes the file grew on disk: 0 or less."""
        with entry.lock:
            if entry.dead:
                return 0
            with Closing(self.folder.open(_name(entry), os.O_RDWR)) as file:
                if self._is_ours_alone(entry, file):  # otherwise it is overwritten when it is fetched again
                    punch_hole(file, start, end - start)
                return _grown(entry, file)

    def note_use(self, entry: StagingEntry) -> None:
        """Writes the time of last use as the file's times, for the next start."""
        when = to_wall(entry.last_used)
        with entry.lock:
            name, folder = _name(entry), self.folder.fd
            before = _stamp(os.stat(name, dir_fd=folder, follow_symlinks=False))
            os.utime(name, (when, when), dir_fd=folder, follow_symlinks=False)
            if entry.stamp == before:
                entry.stamp = _stamp(os.stat(name, dir_fd=folder, follow_symlinks=False))

    def stamp(self, entry: StagingEntry) -> Stamp:
        """Identity, size and times of the file as it is now. Raises OSError."""
        with Closing(self._open_to_read(entry)) as file:
            return _stamp(os.fstat(file))

    def open_verified(self, entry: StagingEntry) -> int | None:
        """The file, opened for reading, if it is unchanged since it was verified as a whole, and no one has
        it open for writing. Otherwise None. Raises OSError."""
        file = self._open_to_read(entry)
        if entry.verified and entry.stamp == _stamp(os.fstat(file)) and not _has_writer(file):
            return file
        os.close(file)
        return None

    def _open_to_read(self, entry: StagingEntry) -> int:
        try:
            return self.folder.open(_name(entry), os.O_RDONLY)
        except FileNotFoundError:  # `finish` has just renamed it, and sets `complete` before it unlocks
            with entry.lock:
                return self.folder.open(_name(entry), os.O_RDONLY)


def _name(entry: StagingEntry) -> str:
    return cids.text(entry.cid) + ("" if entry.complete else PART)


def _recognise(name: str, info: os.stat_result | Status) -> StagingEntry | None:
    """The entry of a file with the name of a staging file; None for any other name."""
    matched = _NAME.fullmatch(name)
    if matched is None:
        return None
    try:
        cid = cids.parse(matched[1])  # accepts only one base32 spelling of a CID
    except NotACid:
        return None
    disk = info.st_blocks * 512
    return StagingEntry(
        cid, info.st_size, matched[2] is None, None, None, False, disk, disk, 0, disk, False, "",
        (when := info.st_mtime), when,
    )  # fmt: skip


def _proves(leaf: Leaf, data: Buffer) -> bool:
    try:
        return file_layout.proves(leaf.cid, data)
    except Unsupported:
        return False


def _stamp(info: os.stat_result) -> Stamp:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _has_writer(file: int) -> bool:
    """Whether anyone has the file open for writing, or mapped for writing: stores through a mapping may not
    change the file's times. `file` is open for reading. The kernel grants a read lease only if there is no
    writer."""
    return not _is_granted(file, fcntl.F_RDLCK)


def is_free(file: int) -> bool:
    """Whether no one else has the file open or mapped that is open as `file`. The kernel grants a write lease
    only then (fcntl(2)). Raises OSError if the file system has no leases."""
    return _is_granted(file, fcntl.F_WRLCK)


def _is_granted(file: int, lease: int) -> bool:
    """Whether the kernel grants a lease, which is released at once. Raises OSError if the file system has
    none."""
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, lease)
    except BlockingIOError:
        return False
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _grown(entry: StagingEntry, file: int) -> int:
    before, entry.seen = entry.seen, os.fstat(file).st_blocks * 512
    return entry.seen - before
