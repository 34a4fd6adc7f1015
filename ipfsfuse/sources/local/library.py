"""The library on this machine: what `ipfsfuse add` stored. It is a source, and can be listed and changed.

    <folder>/          0700
      format           the marker: one line, `ipfsfuse library 1`
      lock             shared while blocks are added, exclusive while packs are removed
      <time>-<8 hex digits>.car   a pack: the blocks of one `add`, as a CARv2 file with its index; it is
                                  never changed
      <time>-<8 hex digits>.tmp   a pack while it is written, locked (flock) by its writer
      roots/<CID>      a root: JSON of its name, size, time and the packs that its blocks lie in

A root's file is made after its packs are complete, and is removed before any of them. So a listed root can be
read at any moment, even if a process is killed. Only files with these names are read, replaced or removed.
Links are never followed.

The calls of `Library` block. Any number of threads and processes may use it at once. The next call of
`LibrarySource` notices what another process added or removed.
"""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ipfsfuse import __version__
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.car import Section
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import IpfsFuseError, Malformed, NotACid, NotFound, SourceFailed, StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.fileio.files import Closing, regular, write_all
from ipfsfuse.sources.local.car_file import (
    CarFile,
    Found,
    InPlaceSource,
    Place,
    Read,
    read_disk,
    readable,
    sections,
)
from ipfsfuse.sources.local.car_writer import CarWriter

log = logging.getLogger(__name__)

MARKER, FORMAT_VERSION = "ipfsfuse library", 1
FORMAT, LOCK, ROOTS = "format", "lock", "roots"
CAR_SUFFIX = ".car"
TEMPORARY = ".tmp"
_STEM = r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}"
_PACK_NAME = re.compile(_STEM + r"\.car")
_TEMPORARY_NAME = re.compile(_STEM + r"\.tmp")
_OLDER_NAMES = re.compile(_STEM + r"\.(car|tmp)|lock|roots|tmp[a-z0-9_]{8}")
"""All names in a library of the first versions, which had no marker."""
MAX_ROOT = 1 << 24
"""Bytes of a root's file that are read at most: some 400,000 packs."""
MAX_SIZE, MAX_TIME = 1 << 63, 253_402_300_800
"""Bounds that no file reaches: bytes, and a time after the year 9999."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One root of the library."""

    cid: Cid
    """In the spelling by which it was added first."""
    name: str
    size: int
    """Bytes of its DAG, as its nodes claim."""
    added: float
    """Seconds since 1970."""
    packs: tuple[str, ...]
    """File names of the packs that together hold all its blocks."""


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreFailed(f"{what}: {exc.strerror}") from exc
    except SourceFailed as exc:  # a pack that is damaged
        raise StoreFailed(str(exc)) from exc


def prepare(folder: Path) -> None:
    """Makes the folder if it is missing, and marks it. Raises StoreFailed if it is not a library that this
    user alone can change."""
    with store_errors(f"the library {folder}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            reason = "it is not a folder" if isinstance(exc, FileExistsError) else exc.strerror
            raise StoreFailed(
                f"the library {folder} can't be made: {reason}; give --library another folder"
            ) from exc
        if not examine(folder):
            with suppress(OSError):  # a library that can only be read needs no marker yet
                _write_text(folder, folder / FORMAT, f"{MARKER} {FORMAT_VERSION}\n")
        with suppress(FileExistsError):
            (folder / ROOTS).mkdir(mode=0o700)
        _check(folder / ROOTS, stat.S_IFDIR)


def examine(folder: Path) -> bool:
    """Whether the folder is marked as a library. False for an empty folder, and for a library of the first
    versions, which had no marker.

    Raises StoreFailed for any other folder, and for one that others can change. Raises OSError."""
    _check(folder, stat.S_IFDIR)
    for name, kind in ((FORMAT, stat.S_IFREG), (LOCK, stat.S_IFREG), (ROOTS, stat.S_IFDIR)):
        with suppress(FileNotFoundError):
            _check(folder / name, kind)
    content = _read(folder / FORMAT, 100)
    if content is None:
        others = sorted(name for name in os.listdir(folder) if not _OLDER_NAMES.fullmatch(name))
        if others:
            found = f"{folder} holds {others[0]} and is not marked as a library"
            raise StoreFailed(f"{found}: give --library a folder of its own")
        return False
    name, _space, number = content.decode("ascii", "replace").strip().rpartition(" ")
    if name != MARKER or not number.isdecimal():
        raise StoreFailed(
            f"{folder / FORMAT} is not the marker of a library: give --library a folder of its own"
        )
    if int(number) != FORMAT_VERSION:
        raise StoreFailed(
            f"the library {folder} has format {number}, and ipfsfuse {__version__} knows format "
            f"{FORMAT_VERSION}: use the ipfsfuse that wrote it, or give another --library"
        )
    return True


def _check(path: Path, kind: int) -> None:
    """Raises StoreFailed unless `path` is of that kind and only this user can change it. Raises OSError."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise StoreFailed(f"{path} is a symbolic link: remove it, or give another --library")
    if stat.S_IFMT(status.st_mode) != kind:
        expected = "folder" if kind == stat.S_IFDIR else "regular file"
        raise StoreFailed(f"{path} is not a {expected}: give another --library")
    if status.st_uid != os.geteuid():
        raise StoreFailed(f"{path} belongs to another user: give another --library")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise StoreFailed(
            f"{path} may be written by others: run chmod go-w {path}, or give another --library"
        )


@contextmanager
def _new_file(folder: Path, path: Path | None = None) -> Iterator[tuple[int, Path]]:
    """Gives a descriptor of a temporary file in the library `folder`, and the path that the file gets at the
    end: `path`, or that of a new pack. Raises OSError."""
    temporary, fd = new_temporary(folder)
    path = path or temporary.with_suffix(CAR_SUFFIX)
    with Closing(fd):
        try:
            yield fd, path
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _write_text(folder: Path, path: Path, text: str) -> None:
    """Writes or replaces the file `path`. It is on the disk when this returns. Raises OSError."""
    with _new_file(folder, path) as (fd, _path):
        write_all(fd, text.encode(), 0)
        os.fsync(fd)


def _read(path: Path, most: int) -> bytes | None:
    """The content of a regular file; None if there is none. A link counts as none. Raises OSError."""
    try:
        with regular(str(path), most) as (fd, size):
            return os.pread(fd, size, 0)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):
            return None
        raise


@contextmanager
def lock(folder: Path, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Holds the library's lock. Gives False, without the lock, if another process has it and `wait` is
    False."""
    with store_errors(f"the library {folder}"):
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with Closing(fd):
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# -- packs ---------------------------------------------------------------------------------------------------


def pack_names(folder: Path) -> set[str]:
    """The names of all packs. A CAR file with another name is not a pack."""
    with os.scandir(folder) as items:
        named = [item for item in items if _PACK_NAME.fullmatch(item.name)]
        return {item.name for item in named if item.is_file(follow_symlinks=False)}


def new_temporary(folder: Path) -> tuple[Path, int]:
    """An empty temporary file, locked for as long as its descriptor is open."""
    while True:
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}{TEMPORARY}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # a sweep removed it before it was locked


def sweep(folder: Path) -> None:
    """Removes the temporary files of dead writers: those that are not locked."""
    for name in os.listdir(folder):
        path = folder / name
        with suppress(OSError):
            if not _TEMPORARY_NAME.fullmatch(name) or not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            with Closing(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


# -- roots ---------------------------------------------------------------------------------------------------


def root_path(folder: Path, cid: Cid) -> Path:
    return folder / ROOTS / cids.text(cids.canonical(cid))


def write_root(folder: Path, entry: Entry) -> None:
    """Writes or replaces the root's file. Raises OSError."""
    text = json.dumps({**asdict(entry), "cid": cids.text(entry.cid)})
    _write_text(folder, root_path(folder, entry.cid), text)


def read_root(path: Path) -> Entry | None:
    """None if the file is gone or is not a root's file."""
    try:
        fields = json.loads(_read(path, MAX_ROOT) or b"")
        size, added = int(fields["size"]), float(fields["added"])
        if not (0 <= size < MAX_SIZE and 0 <= added < MAX_TIME):
            return None
        return Entry(
            cids.parse(fields["cid"]), str(fields["name"]), size, added, tuple(map(str, fields["packs"]))
        )
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError, NotACid):
        return None


def read_roots(folder: Path) -> list[Entry]:
    """All roots, in the order added. Ignores a file whose name does not match its root."""
    found = [(path, read_root(path)) for path in (folder / ROOTS).iterdir()]
    entries = [entry for path, entry in found if entry is not None and root_path(folder, entry.cid) == path]
    return sorted(entries, key=lambda entry: (entry.added, entry.cid))


def damaged_roots(folder: Path, entries: Iterable[Entry]) -> list[Path]:
    """Files with the name of a root that can't be read: which packs they need is not known. `entries` are the
    roots that could be read before. They are not read again."""
    known = {root_path(folder, entry.cid) for entry in entries}
    found = []
    for path in (folder / ROOTS).iterdir():
        with suppress(NotACid, FileNotFoundError):
            if (
                path not in known
                and root_path(folder, cids.parse(path.name)) == path
                and ((entry := read_root(path)) is None or root_path(folder, entry.cid) != path)
                and stat.S_ISREG(path.lstat().st_mode)  # after it was read: it may be removed meanwhile
            ):
                found.append(path)
    return found


def lost_packs(folder: Path, entries: Iterable[Entry]) -> list[tuple[Path, str]]:
    """(file of a root, name of a pack that it needs) for each missing pack. Either the pack is lost, or the
    name is damaged and the root needs another pack."""
    there = pack_names(folder)
    return [
        (root_path(folder, entry.cid), pack) for entry in entries for pack in entry.packs if pack not in there
    ]


def sync_folder(folder: Path) -> None:
    with Closing(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        os.fsync(fd)


# -- the packs, kept up with what other processes add and remove ---------------------------------------------

_UNSETTLED_NS = 50_000_000
"""Two changes within this time may give a folder the same modification time."""


class FolderWatch:
    """Whether a folder has changed since the last call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = -1

    def changed(self) -> bool:
        """True also if the last change is too recent to be sure. Raises OSError."""
        found = os.stat(self._folder).st_mtime_ns
        if found == self._seen:
            return False
        self._seen = found if time.time_ns() - found > _UNSETTLED_NS else -1
        return True


class Packs:
    """All packs in a folder, kept open. New packs are opened, and removed packs are closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watch = FolderWatch(folder)
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], CarFile] = {}
        """By name and inode: a rewritten pack keeps its name."""
        self._order: list[CarFile] = []
        """The order in which packs are searched. The pack of the last block comes first, since it probably
        has the next block too. The list is replaced, never changed."""

    def find(self, multihash: bytes, read: Read = read_disk, *, refresh: bool = True) -> Found | None:
        """Where the block is. Without `refresh`, only packs that are open already are searched.

        Raises SourceFailed if a pack that should have the block is broken and no other has it, and
        BlockingIOError if `read` does."""
        if refresh:
            self.refresh()
        broken: SourceFailed | None = None
        order = self._order
        for pack in order:
            try:
                place: Place | None = pack.find(multihash, read)
            except SourceFailed as exc:
                broken, place = exc, None
            if place is not None:
                if pack is not order[0]:
                    self._order = [pack, *(other for other in order if other is not pack)]
                return Found(pack, place)
        if broken is not None:
            raise broken
        return None

    def refresh(self) -> None:
        """Opens new packs and closes those that were removed."""
        with self._lock:
            try:
                if not self._watch.changed():
                    return
                names = pack_names(self._folder)
            except FileNotFoundError:
                names = set()
            except PermissionError as exc:
                raise SourceFailed(
                    f"the library {self._folder} can't be read: {exc.strerror}; if it was made anew since "
                    "the mount began, mount again",
                    "disk",
                ) from exc
            found: dict[tuple[str, int], Path] = {}
            for name in names:
                with suppress(FileNotFoundError):
                    found[name, os.stat(self._folder / name).st_ino] = self._folder / name
            for key in self._open.keys() - found.keys():
                del self._open[key]  # closed when its last reader is done with it
            new: list[CarFile] = []
            for key in found.keys() - self._open.keys():
                with suppress(SourceFailed):  # removed meanwhile, or damaged: then its blocks are missing
                    pack = CarFile(found[key])
                    if pack.use_own_index():
                        self._open[key] = pack
                        new.append(pack)
            self._order = new + [pack for pack in self._order if pack in self._open.values()]

    def close(self) -> None:
        with self._lock:
            for pack in self._open.values():
                pack.close()
            self._open, self._order = {}, []


# -- adding --------------------------------------------------------------------------------------------------

_MAX_REMEMBERED = 200_000
"""Blocks of this add that are remembered, in 20 MB: they are not written twice. If one is forgotten, a second
copy may take space."""


class NewRoot(NamedTuple):
    cid: Cid
    name: str
    size: int
    """Bytes of its DAG."""


PACK_CHECK_SECONDS = 0.02
"""How late an add notices blocks that another process added."""


class LibraryWriter:
    """A context manager. Blocks that are not committed at its end are dropped."""

    def __init__(self, folder: Path, packs: Packs) -> None:
        self._folder = folder
        self._packs = packs
        self._held = ExitStack()
        self._held.enter_context(lock(folder, exclusive=False))
        packs.refresh()  # under the lock: from here on no pack is removed
        self._pack: CarWriter | None = None
        self._path = folder
        self._looked = time.monotonic()
        self._seen: dict[bytes, None] = {}
        self._used: set[str] = set()

    def __enter__(self) -> "LibraryWriter":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.abort()

    def put(self, cid: Cid, block: bytes) -> bool:
        """Adds a block. False if the library has it already. A damaged copy in the library is repaired.

        Raises StoreFailed."""
        multihash = cids.multihash(cid)
        if multihash in self._seen or cids.inline_block(cid) is not None:
            return False
        # no pack is removed meanwhile; a block that another process has just added may be stored twice
        look = time.monotonic() - self._looked >= PACK_CHECK_SECONDS
        if look:
            self._looked = time.monotonic()
        found = self._found(multihash, block, look)
        if found is not None:
            self._used.add(found.file.name)
        else:
            with store_errors(f"the library {self._folder}"):
                if self._pack is None:
                    self._path, fd = new_temporary(self._folder)
                    self._pack = CarWriter(self._held.enter_context(Closing(fd)), self._folder)
                self._pack.add(cid, block)
        self._seen[multihash] = None
        if len(self._seen) > _MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return found is None

    def _found(self, multihash: bytes, block: bytes, refresh: bool) -> Found | None:
        """Where the block is in a pack. Repairs wrong bytes there. None if no pack has the block, or the copy
        can't be used."""
        try:
            found = self._packs.find(multihash, refresh=refresh)
            if found is None or found.file.read(found.place) == block:
                return found
        except SourceFailed:
            return None
        if found.place.size != len(block):
            return None
        path, at = found.file.path, found.place.offset
        with (
            store_errors(f"the library {self._folder}"),
            # no process replaces a pack meanwhile: this one holds the lock
            Closing(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd,
        ):
            write_all(fd, block, at)
            os.fsync(fd)
        log.warning("%s had wrong bytes at %d, and has the right ones now", path, at)
        return found

    def commit(self, roots: Sequence[NewRoot]) -> None:
        """Adds the pack, then the roots, to the library. Raises StoreFailed; then the library has no new
        root."""
        with store_errors(f"the library {self._folder}"):
            if self._pack is not None:
                self._pack.finish()
                self._pack = None
                final = self._path.with_suffix(CAR_SUFFIX)
                os.rename(self._path, final)
                sync_folder(self._folder)
                self._used.add(final.name)
            self._write_roots(roots)
        self.abort()

    def _write_roots(self, roots: Sequence[NewRoot]) -> None:
        """Writes all roots. On an error, removes those that are new."""
        there = pack_names(self._folder)  # missing packs are not needed: all blocks of the roots were put
        new: list[Path] = []
        try:
            for root in roots:
                path = root_path(self._folder, root.cid)
                known = read_root(path)
                packs = tuple(sorted(self._used.union(there.intersection(known.packs) if known else ())))
                if known is None:
                    if not os.path.lexists(path):  # a damaged file stays: while it exists, no pack is removed
                        new.append(path)
                    write_root(self._folder, Entry(*root, time.time(), packs))
                elif known.packs != packs:
                    write_root(self._folder, replace(known, packs=packs))
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            raise

    def abort(self) -> None:
        """Leaves the library as it was. Does nothing after a commit."""
        with self._held:
            if self._pack is not None:
                self._pack.abandon()
                self._pack = None
                self._path.unlink(missing_ok=True)


# -- compaction ----------------------------------------------------------------------------------------------

WORTHWHILE = 4
"""A pack is rewritten if that frees at least a quarter of it."""

MIN_PACK = 32 << 20
"""Packs of fewer bytes are small."""
MANY = 64
"""So many small packs are merged."""


def _rewrite(
    folder: Path,
    entries: Iterable[Entry],
    packs: Packs,
    names: Iterable[str],
    damaged: list[IpfsFuseError],
) -> None:
    """Rewrites those of the packs `names` for which it is worthwhile, without the blocks that no root
    reaches. Each keeps its name. Adds the error of each damaged pack to `damaged`, and leaves that pack as
    it is.

    Changes nothing if a block below a root is missing. Raises StoreFailed.
    """
    live = _reachable(entries, packs)
    for path in (folder / name for name in names):
        try:
            pack = CarFile(path)
            keep = [found for found in _sections(pack) if cids.multihash(found.cid) in live]
        except (SourceFailed, StoreFailed) as exc:
            damaged.append(exc)
            continue
        kept = sum(found.end - found.start for found in keep)
        total = pack.data_end - pack.sections_offset
        if (total - kept) * WORTHWHILE >= total:
            _write(folder, [(pack, keep)], path)


def _sections(pack: CarFile) -> Iterator[Section]:
    """What lies in a pack. Raises StoreFailed if it is damaged."""
    try:
        yield from sections(pack)
    except Malformed as exc:
        raise StoreFailed(f"{pack.path} is damaged, and was not compacted: {exc}") from exc


def _merge_small(folder: Path, entries: Iterable[Entry], damaged: list[IpfsFuseError]) -> None:
    """Merges the small packs if there are MANY, but no damaged one: its error is added to `damaged`. The
    library is complete at any moment.

    Raises OSError, SourceFailed."""
    paths = [path for name in pack_names(folder) if (path := folder / name).stat().st_size < MIN_PACK]
    if len(paths) < MANY:
        return
    packs = []
    for path in paths:
        try:
            pack = CarFile(path)
            for _section in _sections(pack):
                pass
            packs.append(pack)
        except (SourceFailed, StoreFailed) as exc:
            damaged.append(exc)
    if len(packs) < MANY:
        return
    merged = _write(folder, [(pack, _sections(pack)) for pack in packs])
    old = {pack.name for pack in packs}
    for entry in entries:
        if not old.isdisjoint(entry.packs):
            write_root(folder, replace(entry, packs=tuple(sorted({*entry.packs, merged} - old))))
    for pack in packs:
        pack.path.unlink()


def _write(
    folder: Path, contents: Iterable[tuple[CarFile, Iterable[Section]]], path: Path | None = None
) -> str:
    """Writes a pack of those sections, which replaces `path` or gets a new name. Returns its name."""
    with _new_file(folder, path) as (fd, path):
        writer = CarWriter(fd, folder)
        try:
            for pack, keep in contents:
                for found in keep:
                    writer.add(found.cid, pack.read(Place(found.block, found.end - found.block)))
            writer.finish()
        except BaseException:
            writer.abandon()  # else it would flush when it is freed, to a descriptor that is another file's
            raise
    return path.name


def _reachable(entries: Iterable[Entry], packs: Packs) -> set[bytes]:
    """The multihashes of all blocks below the roots. Raises StoreFailed if one is missing or can't be
    read."""
    walk = BlockWalk((entry.cid for entry in entries), None)
    for cid, _state in walk:
        walk.add(_links(cid, packs), None)
    return {cids.multihash(cid) for cid in walk.seen}


def _links(cid: Cid, packs: Packs) -> list[Cid]:
    if cids.codec(cid) == cids.RAW:
        return []
    try:
        block = cids.inline_or_empty_block(cid)
        if block is None:
            found = packs.find(cids.multihash(cid))
            if found is None:
                raise StoreFailed(f"the library lacks {cids.text(cid)}: add it again; nothing was compacted")
            block = found.file.read(found.place)
            cids.verify(cid, block)
        return nodes.links(cid, block)
    except StoreFailed:
        raise
    except IpfsFuseError as exc:
        raise StoreFailed(f"the library can't be compacted: {exc}") from exc


# -- the library ---------------------------------------------------------------------------------------------


class Library:
    """A folder of packs and roots. Makes it if it is missing. Raises StoreFailed if others can change it."""

    def __init__(self, folder: Path) -> None:
        prepare(folder)
        self.folder = folder
        self.packs = Packs(folder)
        self._watch = FolderWatch(folder / "roots")
        self._entries: tuple[Entry, ...] = ()

    def entries(self) -> Sequence[Entry]:
        """All roots, in the order added. Costs one stat if nothing has changed. Raises StoreFailed."""
        with store_errors(f"the library {self.folder}"):
            if self._watch.changed():
                self._entries = tuple(read_roots(self.folder))
        return self._entries

    def roots(self) -> Sequence[Cid]:
        return [entry.cid for entry in self.entries()]

    def block(self, cid: Cid) -> bytes:
        """The unverified block. Raises NotHere, BlockTooLarge, SourceFailed."""
        found = readable("library", cid, self.packs.find(cids.multihash(cid)))
        return found.file.read(found.place)

    def open_writer(self) -> LibraryWriter:
        """A writer for one `add`. Waits while a compaction runs. Raises StoreFailed."""
        with store_errors(f"the library {self.folder}"):
            sweep(self.folder)
        return LibraryWriter(self.folder, self.packs)

    def remove(self, cid: Cid) -> Entry:
        """Removes a root, and frees the space that no other root needs. While something is being added, that
        is left to the next removal. Raises NotFound, StoreFailed."""
        path = root_path(self.folder, cid)
        entry = read_root(path)
        if entry is None:
            raise NotFound(f"{cids.text(cid)} is not a root of the library: `ipfsfuse library` lists them")
        with store_errors(f"the library {self.folder}"):
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        self.tidy(entry.packs)
        return entry

    def compact(self, wait: bool = True, only: Sequence[str] | None = None) -> bool:
        """Frees the space of blocks that no root reaches, in the packs `only` or in all, and merges small
        packs. False if the library was busy and `wait` is False. Raises StoreFailed."""
        with (
            store_errors(f"the library {self.folder}"),
            lock(self.folder, exclusive=True, wait=wait) as held,
        ):
            if not held:
                return False
            sweep(self.folder)
            entries = read_roots(self.folder)
            if damaged := damaged_roots(self.folder, entries):
                raise StoreFailed(
                    f"the root {damaged[0]} can't be read, and nothing is removed that it may need: add its "
                    "content again, or remove this file"
                )
            if lost := lost_packs(self.folder, entries):
                raise StoreFailed(
                    f"the root {lost[0][0]} names the pack {lost[0][1]}, which is not there, and nothing is "
                    "removed that it may need: add its content again, or remove this root"
                )
            needed = {pack for entry in entries for pack in entry.packs}
            names = pack_names(self.folder)
            for name in names - needed:
                (self.folder / name).unlink(missing_ok=True)
            staying = names & needed
            shrinking = sorted(staying if only is None else staying.intersection(only))
            damaged_packs: list[IpfsFuseError] = []
            if shrinking:
                _rewrite(self.folder, entries, self.packs, shrinking, damaged_packs)
            _merge_small(self.folder, entries, damaged_packs)
            if damaged_packs:
                raise damaged_packs[0]
        return True

    def tidy(self, packs: Sequence[str] = ()) -> None:
        """Frees the space that no root needs, in the `packs` and in packs that no root names, unless the
        library is busy. Called after an add or a removal: a failure is only logged."""
        try:
            self.compact(wait=False, only=packs)
        except StoreFailed as exc:
            log.warning("the library's space was not given back: %s", exc)

    def close(self) -> None:
        self.packs.close()


class LibrarySource(InPlaceSource):
    """The library as a source."""

    name = "library"

    def __init__(self, library: Library) -> None:
        """Takes `library` over."""
        self.library = library

    def find(self, cid: Cid, read: Read = read_disk) -> Found | None:
        return self.library.packs.find(cids.multihash(cid), read)

    def roots(self) -> Sequence[Cid]:
        try:
            return self.library.roots()
        except StoreFailed:  # the folder is gone
            return ()

    async def aclose(self) -> None:
        await threads.run_sync(self.library.close)
