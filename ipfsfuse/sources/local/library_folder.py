"""The files of a library on disk: their names, formats and locks.

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

All calls block.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ipfsfuse import __version__
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, SourceFailed, StoreFailed
from ipfsfuse.fileio.files import Closing, regular, write_all

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
class LibraryEntry:
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
def new_file(folder: Path, path: Path | None = None) -> Iterator[tuple[int, Path]]:
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
    with new_file(folder, path) as (fd, _path):
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


def write_root(folder: Path, entry: LibraryEntry) -> None:
    """Writes or replaces the root's file. Raises OSError."""
    text = json.dumps({**asdict(entry), "cid": cids.text(entry.cid)})
    _write_text(folder, root_path(folder, entry.cid), text)


def read_root(path: Path) -> LibraryEntry | None:
    """None if the file is gone or is not a root's file."""
    try:
        fields = json.loads(_read(path, MAX_ROOT) or b"")
        size, added = int(fields["size"]), float(fields["added"])
        if not (0 <= size < MAX_SIZE and 0 <= added < MAX_TIME):
            return None
        return LibraryEntry(
            cids.parse(fields["cid"]), str(fields["name"]), size, added, tuple(map(str, fields["packs"]))
        )
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError, NotACid):
        return None


def read_roots(folder: Path) -> list[LibraryEntry]:
    """All roots, in the order added. Ignores a file whose name does not match its root."""
    found = [(path, read_root(path)) for path in (folder / ROOTS).iterdir()]
    entries = [entry for path, entry in found if entry is not None and root_path(folder, entry.cid) == path]
    return sorted(entries, key=lambda entry: (entry.added, entry.cid))


def damaged_roots(folder: Path, entries: Iterable[LibraryEntry]) -> list[Path]:
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


def lost_packs(folder: Path, entries: Iterable[LibraryEntry]) -> list[tuple[Path, str]]:
    """(file of a root, name of a pack that it needs) for each missing pack. Either the pack is lost, or the
    name is damaged and the root needs another pack."""
    there = pack_names(folder)
    return [
        (root_path(folder, entry.cid), pack) for entry in entries for pack in entry.packs if pack not in there
    ]


def sync_folder(folder: Path) -> None:
    with Closing(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        os.fsync(fd)
