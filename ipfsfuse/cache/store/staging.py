"""Staging files: one sparse file per file of over 64 KiB, holding file content at file offsets.

`<cid>.part` until every byte is there, then fdatasync and rename to `<cid>`. Which leaves are present is
known in memory; after a restart the data extents (SEEK_DATA) say which may be, and each leaf is proved by its
hash whenever it is read back. So nothing on disk is trusted, and nothing but content is written.

Concurrency: `Entry` and `Staging` live on the event loop; the functions under "in a thread" are called in
worker threads, and take the entry's lock for what must not cross a removal. Files are opened for each call
(10 us), so that no file descriptor outlives a removal.
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
from ipfsfuse.fileio.tags import TAG, tags_of

# -- when things were used last, by a clock that nobody sets

# In memory a time is the machine's: seconds since it was started, sleep included (CLOCK_BOOTTIME). People and
# disks get the wall clock's time of it, as that clock stands then. So a wall clock that is set, forwards or
# backwards, changes no order and makes no duration negative.

CLOCK_WAS_SET = 0.5
"""Seconds by which the wall clock must differ from the machine's to be taken for set. Less is how long we
took to look."""

_start = float("-inf")
"""The wall clock's time at the start of the machine."""


now = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""The machine's time, in seconds."""


def to_wall(moment: float) -> float:
    """Seconds since 1970 of a moment of the machine's time: of one moment the same, until the wall clock is
    set."""
    global _start
    start = time.time() - now()
    if abs(start - _start) > CLOCK_WAS_SET:
        _start = start
    return max(0.0, _start + moment)


def from_wall(whens: Sequence[float]) -> list[float]:
    """The machine's times of what was written with the wall clock's, the earliest first; their order is kept.
    What lies in the future was written before the wall clock was set back: that is taken for now."""
    machine, wall = now(), time.time()
    latest = machine - len(whens) * 1e-6
    return [min(machine - (wall - when), latest + number * 1e-6) for number, when in enumerate(whens, 1)]


# -- staging files -------------------------------------------------------------------------------------------

PART = ".part"
PIECE = 8 << 10
"""Bytes of a verified leaf that can be proved again without the rest of it, by their tag, which takes 2 us.
SHA-256 of a leaf of 1 MiB takes 0.6 to 1.4 ms. As in `fuse/pieces.c`."""
_NAME = re.compile(r"(b[a-z2-7]+)(\.part)?")
"""base32, as `cids.text` spells."""


@dataclass(slots=True, eq=False)
class Extents:
    """Which bytes of a file are present: sorted half-open intervals of byte offsets, joined where they
    touch."""

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.starts, self.ends, strict=True))

    def covers(self, start: int, end: int) -> bool:
        at = bisect_right(self.starts, start) - 1
        return at >= 0 and self.ends[at] >= end

    def add(self, start: int, end: int) -> tuple[int, int]:
        """Returns the interval of which [start, end) is a part now."""
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
"""Inode number, size, and times of the last change: what differs once anybody has written to a file."""


class Removed(Exception):
    """The entry was removed while a thread was about to write to it. Never leaves the cache."""


_LOCKS = [threading.Lock() for _ in range(1024)]


@dataclass(slots=True, eq=False)
class Entry:
    """One staging file."""

    cid: Cid
    size: int
    """Content bytes of the whole file."""
    complete: bool = False
    """It has been whole, and has its final name."""
    extents: Extents | None = None
    """Bytes that are (after a restart: may be) present; None until they were asked for."""
    proved: Extents | None = None
    """Of a file without its final name, the bytes that this run wrote or proved."""
    fresh: bool = True
    """Written in this run alone: what is wrong in it was not left so by a crash."""
    disk: int = 0
    """Bytes on disk, in file-system blocks, by the writes that were reported."""
    seen: int = 0
    """The same, as a thread saw it last: what grew since is reported once, with the write that it belongs
    to."""
    reserved: int = 0
    """Bytes on disk that writes under way may still take."""
    charged: int = 0
    """What the budget counts for it, reservations that its writers hold included."""
    dead: bool = False
    source: str = ""
    last_used: float = field(default_factory=now)
    """By `now`."""
    noted: float = field(default_factory=now)
    """When its last use was written to the disk."""
    stamp: Stamp | None = None
    """Of a file that is being verified whole, or was: as it was then."""
    verified: bool = False
    """All of it was read back and found right in this run, and nothing was written since."""
    read_by_kernel: bool = False
    """The kernel reads it itself: nothing may be taken away from it."""

    @property
    def lock(self) -> threading.Lock:
        """Shared with few others: a lock for each of a million files would take 40 MB. A thread takes one at
        a time."""
        return _LOCKS[hash(self.cid) % len(_LOCKS)]

    def gone(self) -> bool:
        """`dead` once more: it may have been set since the lock was last released."""
        return self.dead

    def all_proved(self) -> bool:
        """Whether it may be named as whole: what a crash left proves nothing by being there."""
        return not self.complete and self.proved is not None and self.proved.covers(0, self.size)

    def whole(self) -> bool:
        return self.extents.covers(0, self.size) if self.extents is not None else self.complete


class Staging:
    """The folder of staging files."""

    def __init__(self, path: Path) -> None:
        """Raises StoreFailed, OSError."""
        self.path = path
        self.entries: dict[Cid, Entry] = {}
        """Those that are known: until `inventoried`, not all of what an earlier run left."""
        self.inventoried = False
        self.found_early: dict[Cid, float] = {}
        """When what was asked for, before the scan came to it, was used last in an earlier run."""
        self._removed_early: set[Cid] = set()
        self.folder = Subfolder(path)
        self._direct = Direct()
        self.shares: bool | None = None
        """Whether the file system shares extents with a node's repository; None before that was tried."""
        self.unit = 4096
        """Bytes of a file-system block."""
        self.too_large = 1 << 64
        """Bytes of the smallest file that this file system was seen to refuse for its size."""
        with contextlib.suppress(OSError):
            self.unit = os.statvfs(self.folder.fd).f_frsize or 4096

    # -- on the event loop -----------------------------------------------------------------------------------

    def find(self, cid: Cid) -> Entry | None:
        """The entry of `cid`. Until all entries are known, one that is not is looked for on the disk: two
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

    def _recognised(self, name: str) -> Entry | None:
        """The entry of a file of this name that an earlier run left and that may be used."""
        try:
            info = self.folder.stat(name)
        except (OSError, StoreFailed):
            return None
        entry = _recognise(name, info)
        return entry if entry is not None and entry.size and is_our_own(info) else None

    def take(self, entry: Entry) -> bool:
        """Takes in what `scan` found. False where it is known already, or was removed meanwhile."""
        if entry.cid in self.entries or entry.cid in self._removed_early:
            return False
        self.entries[entry.cid] = entry
        entry.charged = self.charge(entry)
        return True

    def charge(self, entry: Entry) -> int:
        """Bytes to count for `entry` now: what it takes, may soon take, and a block or more for the extent
        tree that the file system writes later, until the file is whole and on disk."""
        if entry.complete:  # mostly the same number, and not one more in memory
            return entry.disk + entry.reserved if entry.reserved else entry.disk
        pieces = len(entry.extents.starts) if entry.extents is not None else 1
        return entry.disk + entry.reserved + self.unit * (1 + pieces // 100 + entry.disk // (64 << 20))

    def forget(self, entry: Entry) -> None:
        if self.entries.get(entry.cid) is entry:
            del self.entries[entry.cid]
        if not self.inventoried:
            self._removed_early.add(entry.cid)

    # -- in a thread -----------------------------------------------------------------------------------------

    def scan(self) -> Iterator[Entry]:
        """What an earlier run left. Links, an empty part, and a part beside its whole file are removed;
        strays are left alone."""
        strays = []
        for name, info in self.folder.each_status():
            try:
                entry = _recognise(name, info)
                if entry is None or stat.S_ISDIR(info.st_mode):
                    strays.append(name)
                    continue
                # A file of size 0 is left by a kill between its making and its first write.
                # Through a link, what lies elsewhere would be written.
                usable = entry.size and is_our_own(info)
                if usable and (entry.complete or self._recognised(cids.text(entry.cid)) is None):
                    yield entry
                else:
                    self.folder.unlink(name)
            except FileNotFoundError:  # evicted or renamed meanwhile
                continue
        report_strays(self.path, strays)

    def look(self, entry: Entry) -> Extents:
        """Which bytes of `entry` may be present, by what the file system says."""
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
                if exc.errno != errno.ENXIO:  # no data behind `at`
                    raise
        return found

    def read(self, entry: Entry, leaf: Leaf) -> tuple[bytes, bool, bytes]:
        """What is stored for `leaf`, whether that is its content, and then the tags of its pieces."""
        with Closing(self._open_to_read(entry)) as file:
            data = os.pread(file, leaf.size, leaf.offset)
        right = len(data) == leaf.size and _proves(leaf, data)
        return data, right, tags_of(data, PIECE) if right else b""

    def read_pieces(
        self, entry: Entry, leaf: Leaf, start: int, stop: int, tags: bytes, flags: int
    ) -> memoryview | None:
        """The bytes [start, stop) of `leaf`, proved by the `tags` of its pieces; None where they are not
        right, and with the flag RWF_NOWAIT where the disk would have to be read. Raises OSError."""
        start_piece, end_piece = start // PIECE, -(-stop // PIECE)
        data = bytearray(min(end_piece * PIECE, leaf.size) - start_piece * PIECE)
        with Closing(self._open_to_read(entry)) as file:
            try:
                count = os.preadv(file, [data], leaf.offset + start_piece * PIECE, flags)
            except OSError as exc:
                if flags and exc.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    return None
                raise
        if count != len(data) or tags_of(data, PIECE) != tags[start_piece * TAG : end_piece * TAG]:
            return None
        return memoryview(data)[start - start_piece * PIECE : stop - start_piece * PIECE]

    def place(self, entry: Entry) -> tuple[int, bytes]:
        """Where its file lies: the folder's descriptor, and the name."""
        return self.folder.fd, _name(entry).encode()

    def read_each(self, entry: Entry, wanted: Sequence[Leaf]) -> Sequence[tuple[memoryview, bool]]:
        """Reads leaves that follow each other without a gap, at least one. Gives for each its bytes,
        and whether they are right."""
        with Closing(self._open_to_read(entry)) as file:
            found = self._read_into_buffers(file, wanted, wanted[0].offset)
        return [(data, _proves(leaf, data)) for leaf, data in zip(wanted, found, strict=True)]

    def _read_into_buffers(self, file: int, wanted: Sequence[Leaf], offset: int) -> list[memoryview]:
        buffers = [lend(leaf.size) for leaf in wanted[:-1]]
        buffers.append(lend(-(-wanted[-1].size // ALIGNED) * ALIGNED))  # a file's end may lie anywhere
        self._direct.read(file, buffers, offset)
        return [buffer[: leaf.size] for leaf, buffer in zip(wanted, buffers, strict=True)]

    def clone(
        self, entry: Entry, leaves: Sequence[Leaf], files: Sequence[str]
    ) -> tuple[int, Sequence[memoryview]]:
        """Makes `entry` share the extents of `files`, which may hold the blocks of raw `leaves` that lie one
        behind the other. By how many bytes it grew on disk, and what it holds now of the first leaves, as
        many as could be shared: unproved. Raises Removed, OSError.

        A file without a name shares them first, and is what is read: nobody else can write to it. To share
        with a file that others read waits for all their reads, and they for it."""
        with Closing(self._open_unnamed()) as copy:
            shared = self._share_each(copy, leaves, files)
            if not shared:
                return 0, []
            start, end = leaves[0].offset, leaves[shared - 1].offset + leaves[shared - 1].size
            with entry.lock:
                if entry.dead:
                    raise Removed
                flags = os.O_RDWR | (0 if entry.complete else os.O_CREAT)
                with Closing(self.folder.open(_name(entry), flags)) as file:
                    if not entry.seen:
                        os.ftruncate(file, entry.size)
                    share_extents(copy, file, end - start, start)
                    grown = _grown(entry, file)
            return grown, self._read_into_buffers(copy, leaves[:shared], 0)

    def _share_each(self, to: int, leaves: Sequence[Leaf], files: Sequence[str]) -> int:
        """Makes `to` share the extents of `files`, one behind the other from its beginning on, as far as that
        can be done. Of how many leaves."""
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
        place = f"/proc/self/fd/{self.folder.fd}"
        return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def can_share(self, path: str, size: int) -> bool:
        """Whether staging files can share extents with files such as `path`, of `size` bytes: tried once, on
        a file without a name."""
        if self.shares is None:
            try:
                with regular(path, size) as (source, found), Closing(self._open_unnamed()) as to:
                    share_extents(source, to, found, 0)
                    self.shares = True
            except OSError as exc:
                if exc.errno not in NOT_SHARED:  # the file is gone, the disk is full: the next one tells
                    return False
                self.shares = False
        return self.shares

    def write(
        self, entry: Entry, offset: int, parts: Sequence[bytes | memoryview]
    ) -> tuple[int, OSError | None]:
        """By how many bytes it grew on disk, and why no more of `parts` could be written from `offset` on.
        Raises Removed."""
        with entry.lock:
            if entry.dead:
                raise Removed
            try:
                file = self.folder.open(_name(entry), os.O_RDWR | (0 if entry.complete else os.O_CREAT))
            except OSError as exc:
                return 0, exc
            try:
                if not entry.seen:
                    os.ftruncate(file, entry.size)
                self._direct.write(file, parts, offset)
            except OSError as exc:
                if exc.errno == errno.EFBIG and not entry.seen:
                    self.too_large = min(self.too_large, entry.size)
                    self.folder.unlink(_name(entry))
                return _grown(entry, file), exc
            else:
                return _grown(entry, file), None
            finally:
                os.close(file)

    def finish(self, entry: Entry) -> int:
        """Onto the disk, then to its final name; returns by how many bytes it grew there."""
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

    def remove(self, entry: Entry) -> int | None:
        """Gives its space back at once, though threads may be reading it: they find it short.

        The name goes first: a crash never leaves an empty file under a name that says it is whole. Where the
        kernel may still read it for others, nothing but the name goes. Then this returns the open file: its
        space is free once `is_free` and it is closed."""
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

    def _is_ours_alone(self, entry: Entry, file: int) -> bool:
        """Whether nobody but us reads `entry`, which is open as `file`. Readers of a mount that has died may
        still read what an earlier run left."""
        if not entry.read_by_kernel and (entry.fresh or not entry.complete):
            return True
        try:
            return not entry.read_by_kernel and is_free(file)
        except OSError:  # no leases here, and so no passthrough
            return True

    def punch(self, entry: Entry, start: int, end: int) -> int:
        """Gives back the space of [start, end); returns by how many bytes it grew on disk, which is not
        positive."""
        with entry.lock:
            if entry.dead:
                return 0
            with Closing(self.folder.open(_name(entry), os.O_RDWR)) as file:
                if self._is_ours_alone(entry, file):  # else what is fetched again is written over it
                    punch_hole(file, start, end - start)
                return _grown(entry, file)

    def note_use(self, entry: Entry) -> None:
        """What was used last is known after a restart by the files' times."""
        when = to_wall(entry.last_used)
        with entry.lock:
            name, folder = _name(entry), self.folder.fd
            before = _stamp(os.stat(name, dir_fd=folder, follow_symlinks=False))
            os.utime(name, (when, when), dir_fd=folder, follow_symlinks=False)
            if entry.stamp == before:
                entry.stamp = _stamp(os.stat(name, dir_fd=folder, follow_symlinks=False))

    def stamp(self, entry: Entry) -> Stamp:
        """Identity, size and times of the file as it is now. Raises OSError."""
        with Closing(self._open_to_read(entry)) as file:
            return _stamp(os.fstat(file))

    def open_verified(self, entry: Entry) -> int | None:
        """The file, open for reading, if it is as it was when it was verified whole, and nobody else has it
        open for writing. Raises OSError."""
        file = self._open_to_read(entry)
        if entry.verified and entry.stamp == _stamp(os.fstat(file)) and not _has_writer(file):
            return file
        os.close(file)
        return None

    def _open_to_read(self, entry: Entry) -> int:
        try:
            return self.folder.open(_name(entry), os.O_RDONLY)
        except FileNotFoundError:  # under the lock: between its renaming and `complete` neither name is right
            with entry.lock:
                return self.folder.open(_name(entry), os.O_RDONLY)


def _name(entry: Entry) -> str:
    return cids.text(entry.cid) + ("" if entry.complete else PART)


def _recognise(name: str, info: os.stat_result | Status) -> Entry | None:
    """The entry of what has the name of a staging file; None for any other name."""
    matched = _NAME.fullmatch(name)
    if matched is None:
        return None
    try:
        cid = cids.parse(matched[1])  # which takes no two spellings in base32 for one CID
    except NotACid:
        return None
    disk = info.st_blocks * 512
    return Entry(
        cid, info.st_size, matched[2] is None, None, None, False, disk, disk, 0, disk, False, "",
        (when := info.st_mtime), when,
    )  # fmt: skip


def _proves(leaf: Leaf, data: bytes | memoryview) -> bool:
    try:
        return file_layout.proves(leaf.cid, data)
    except Unsupported:
        return False


def _stamp(info: os.stat_result) -> Stamp:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _has_writer(file: int) -> bool:
    """Whether anybody has the file open for writing, or mapped so: what is stored through a mapping may
    change no time. `file` is open for reading; the kernel grants a read lease only if there is no writer."""
    return not _is_granted(file, fcntl.F_RDLCK)


def is_free(file: int) -> bool:
    """Whether nobody but the owner of the open file `file` has that file open or mapped. The kernel grants a
    write lease only then (fcntl(2)). Raises OSError where the file system has no leases."""
    return _is_granted(file, fcntl.F_WRLCK)


def _is_granted(file: int, lease: int) -> bool:
    """Whether the kernel grants a lease, which is given back at once. Raises OSError where the file system
    has none."""
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, lease)
    except BlockingIOError:
        return False
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True


def _grown(entry: Entry, file: int) -> int:
    before, entry.seen = entry.seen, os.fstat(file).st_blocks * 512
    return entry.seen - before
