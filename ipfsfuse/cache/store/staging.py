"""Staging files: one sparse file per file of over 64 KiB, holding file content at file offsets.

`<cid>.part` until every byte is there, then fdatasync and rename to `<cid>`. Which leaves are present is held in
memory; after a restart the data extents (SEEK_DATA) say which may be, and each leaf is proved by its hash whenever it
is read back. So nothing on disk is trusted, and nothing but content is written.

Concurrency: `Entry` and `Staging` live on the event loop; the functions under "in a thread" are called in worker
threads, and take the entry's lock for what must not cross a removal. Files are opened for each call (10 us), so that
no file descriptor outlives a removal.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ipfsfuse.cache.store.entry import Entry, Removed
from ipfsfuse.cache.store.extents import Extents
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import leaves
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotACid, Unsupported
from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.calls import punch_hole
from ipfsfuse.fileio.direct import ALIGNED, Direct

PART = ".part"


class Staging:
    """The folder of staging files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[Cid, Entry] = {}
        self._direct = Direct()
        folder.mkdir(mode=0o700, exist_ok=True)
        self.unit = os.statvfs(folder).f_frsize or 4096
        """Bytes of a file-system block."""

    # -- on the event loop -------------------------------------------------------------------------------------------

    def entry(self, cid: Cid, size: int) -> Entry:
        """The entry of `cid`, new and empty where there is none: a CID fixes its size."""
        known = self.entries.get(cid)
        if known is None:
            known = self.entries[cid] = Entry(cid, size, extents=(there := Extents()), proved=there)
        return known

    def cost(self, start: int, end: int) -> int:
        """Bytes on disk that writing [start, end) can take at most, what the file system needs to find it included."""
        return (-(-end // self.unit) - start // self.unit + 1) * self.unit

    def charge(self, entry: Entry) -> int:
        """Bytes to count for `entry` now: what it takes, may soon take, and a block or more for the extent tree that
        the file system writes later, until the file is whole and on disk."""
        if entry.complete:
            return entry.disk + entry.reserved
        pieces = len(entry.extents) if entry.extents is not None else 1
        return entry.disk + entry.reserved + self.unit * (1 + pieces // 100 + entry.disk // (64 << 20))

    def forget(self, entry: Entry) -> None:
        if self.entries.get(entry.cid) is entry:
            del self.entries[entry.cid]

    # -- in a thread -------------------------------------------------------------------------------------------------

    def scan(self) -> Iterator[Entry]:
        """What an earlier run left; what is no staging file is deleted."""
        found: dict[Cid, Entry] = {}
        with os.scandir(self.folder) as items:
            for item in items:
                entry = self._recognise(item)
                if entry is not None:
                    known = found.get(entry.cid)
                    if known is None:
                        found[entry.cid] = entry
                        continue
                    if entry.complete:  # a whole file, and before it the part of the same
                        found[entry.cid], entry = entry, known
                os.unlink(item.path if entry is None else self._path(entry))
        return iter(found.values())

    def _recognise(self, item: "os.DirEntry[str]") -> Entry | None:
        name, complete = item.name.removesuffix(PART), not item.name.endswith(PART)
        if not name.startswith("b") or not item.is_file(follow_symlinks=False):  # base32, as `text` spells: no other is ours
            return None
        try:
            cid = cids.parse(name)
        except NotACid:
            return None
        info = item.stat(follow_symlinks=False)
        if not info.st_size:  # killed between its making and its first write: it does not know how large its file is
            return None
        disk = info.st_blocks * 512
        return Entry(cid, info.st_size, complete, None, None, False, disk, disk, 0, 0, False, "", info.st_mtime)

    def look(self, entry: Entry) -> Extents:
        """Which bytes of `entry` may be present, by what the file system says."""
        if entry.complete:
            return Extents([(0, entry.size)])
        found = Extents()
        file = self._open_to_read(entry)
        try:
            at = 0
            while at < entry.size:
                start = os.lseek(file, at, os.SEEK_DATA)
                at = os.lseek(file, start, os.SEEK_HOLE)
                found.add(start, at)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # no data behind `at`
                raise
        finally:
            os.close(file)
        return found

    def read(self, entry: Entry, leaf: Leaf) -> tuple[bytes, bool]:
        """What is stored for `leaf`, and whether that is its content."""
        file = self._open_to_read(entry)
        try:
            data = os.pread(file, leaf.size, leaf.offset)
        finally:
            os.close(file)
        return data, len(data) == leaf.size and _proves(leaf, data)

    def read_each(self, entry: Entry, wanted: Sequence[Leaf]) -> Sequence[tuple[memoryview, bool]]:
        """As `read`, of leaves that lie one behind the other, at least one."""
        buffers = [lend(leaf.size) for leaf in wanted[:-1]]
        buffers.append(lend(-(-wanted[-1].size // ALIGNED) * ALIGNED))  # a file's end may lie anywhere
        file = self._open_to_read(entry)
        try:
            self._direct.read(file, buffers, wanted[0].offset)
        finally:
            os.close(file)
        found = [buffer[: leaf.size] for leaf, buffer in zip(wanted, buffers, strict=True)]
        return [(data, _proves(leaf, data)) for leaf, data in zip(wanted, found, strict=True)]

    def write(self, entry: Entry, offset: int, parts: Sequence[bytes | memoryview]) -> tuple[int, OSError | None]:
        """By how many bytes it grew on disk, and why no more of `parts` could be written from `offset` on. Raises Removed."""
        with entry.lock:
            if entry.dead:
                raise Removed
            try:
                file = self._open(entry, os.O_RDWR | (0 if entry.complete else os.O_CREAT))
            except OSError as exc:
                return 0, exc
            try:
                if not entry.seen:
                    os.ftruncate(file, entry.size)
                self._direct.write(file, parts, offset)
            except OSError as exc:
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
            file = self._open(entry, os.O_RDWR)
        try:
            os.fdatasync(file)
            with entry.lock:
                if entry.gone():
                    return 0
                os.rename(self._path(entry), self.folder / cids.text(entry.cid))
                entry.complete = True
                return _grown(entry, file)
        finally:
            os.close(file)

    def remove(self, entry: Entry) -> None:
        """Gives its space back at once, though threads may be reading it: they find it short.

        The name goes first: a crash never leaves an empty file under a name that says it is whole."""
        with entry.lock:
            entry.dead = True
            try:
                file = self._open(entry, os.O_RDWR)
            except FileNotFoundError:
                return
            try:
                os.unlink(self._path(entry))
                os.ftruncate(file, 0)
            finally:
                os.close(file)

    def punch(self, entry: Entry, start: int, end: int) -> int:
        """Gives back the space of [start, end); returns by how many bytes it grew on disk, which is not positive."""
        with entry.lock:
            if entry.dead:
                return 0
            file = self._open(entry, os.O_RDWR)
            try:
                punch_hole(file, start, end - start)
                return _grown(entry, file)
            finally:
                os.close(file)

    def note_use(self, entry: Entry) -> None:
        """What was used last is known after a restart by the files' times."""
        os.utime(self._path(entry), (entry.last_used, entry.last_used))

    def _open_to_read(self, entry: Entry) -> int:
        try:
            return self._open(entry, os.O_RDONLY)
        except FileNotFoundError:  # under the lock: between its renaming and `complete` neither name is right
            with entry.lock:
                return self._open(entry, os.O_RDONLY)

    def _open(self, entry: Entry, flags: int) -> int:
        return os.open(self._path(entry), flags | os.O_CLOEXEC, 0o600)

    def _path(self, entry: Entry) -> Path:
        name = cids.text(entry.cid)
        return self.folder / (name if entry.complete else name + PART)


def _proves(leaf: Leaf, data: bytes | memoryview) -> bool:
    try:
        return leaves.proves(leaf.cid, data)
    except Unsupported:
        return False


def _grown(entry: Entry, file: int) -> int:
    before, entry.seen = entry.seen, os.fstat(file).st_blocks * 512
    return entry.seen - before
