"""The library's folder: what lies where, and who may use it.

    <folder>/          0700
      format           the marker: one line, `ipfsfuse library 1`
      lock             shared by who adds, exclusive for who removes packs
      <time>-<8 hex digits>.car   a pack: the blocks that one `add` brought, a CARv2 file with its index
                                  that is never changed
      <time>-<8 hex digits>.tmp   a pack while it is written, locked (flock) by its writer
      roots/<CID>      a root: JSON of its name, size, time and the packs that its blocks lie in

A root's file is made after its packs are complete and removed before any of them goes, so that a root that is
listed can be read at any moment, whoever is killed. Only what has one of these names is ever read, replaced
or removed; links are never followed. Blocking; several processes at once are safe.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ipfsfuse import __version__
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, SourceFailed, StoreFailed
from ipfsfuse.fileio.files import regular

MARKER, VERSION = "ipfsfuse library", 1
FORMAT, LOCK, ROOTS = "format", "lock", "roots"
PACK = ".car"
TEMPORARY = ".tmp"
_STEM = r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}"
_PACK_NAME = re.compile(_STEM + r"\.car")
_TEMPORARY_NAME = re.compile(_STEM + r"\.tmp")
_OLDER_NAMES = re.compile(_STEM + r"\.(car|tmp)|lock|roots|tmp[a-z0-9_]{8}")
"""All that a library held before it had a marker."""
MAX_ROOT = 1 << 24
"""Bytes of a root's file that are read at most: some 400,000 packs."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One root of the library."""

    cid: Cid
    """As it was first spelled."""
    name: str
    size: int
    """Bytes of its DAG, by its own nodes' word."""
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
    """Makes the folder where there is none, and marks it. Raises StoreFailed where it is not a library of
    ours alone."""
    with store_errors(f"the library {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not examine(folder):
            with suppress(OSError):  # a library that can only be read needs no marker yet
                _mark(folder)
        with suppress(FileExistsError):
            (folder / ROOTS).mkdir(mode=0o700)
        _check(folder / ROOTS, stat.S_IFDIR)


def examine(folder: Path) -> bool:
    """Whether the folder is marked as a library; False for an empty one, and for one from before there was a
    marker.

    Raises StoreFailed for a folder of anything else, or not ours alone. Raises OSError."""
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
    if int(number) != VERSION:
        raise StoreFailed(
            f"the library {folder} has format {number}, and ipfsfuse {__version__} knows format {VERSION}: "
            "use the ipfsfuse that wrote it, or give another --library"
        )
    return True


def _check(path: Path, kind: int) -> None:
    """Raises StoreFailed unless it is of that kind, and ours alone. Raises OSError."""
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


def _mark(folder: Path) -> None:
    path, fd = new_temporary(folder)
    try:
        with open(fd, "w") as out:
            out.write(f"{MARKER} {VERSION}\n")
            out.flush()
            os.fsync(fd)
            os.rename(path, folder / FORMAT)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def _read(path: Path, most: int) -> bytes | None:
    """What a regular file holds; None where there is none, a link included. Raises OSError."""
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
    """Holds the library's lock. Gives False, holding nothing, where it is taken and `wait` is False."""
    with store_errors(f"the library {folder}"):
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


# -- packs ---------------------------------------------------------------------------------------------------


def pack_names(folder: Path) -> set[str]:
    """Of files that an add wrote: a CAR file of another name is not ours."""
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
        os.close(fd)  # a sweep came between


def sweep(folder: Path) -> None:
    """Removes what dead writers left: temporary files that nobody locks."""
    for name in os.listdir(folder):
        path = folder / name
        with suppress(OSError):
            if not _TEMPORARY_NAME.fullmatch(name) or not stat.S_ISREG(os.lstat(path).st_mode):
                continue
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


# -- roots ---------------------------------------------------------------------------------------------------


def root_path(folder: Path, cid: Cid) -> Path:
    return folder / ROOTS / cids.text(cids.canonical(cid))


def write_root(folder: Path, entry: Entry) -> None:
    """Makes the root known, or known anew. Raises OSError."""
    path, fd = new_temporary(folder)
    try:
        with open(fd, "w") as out:
            json.dump({**asdict(entry), "cid": cids.text(entry.cid)}, out)
            out.flush()
            os.fsync(fd)
            os.rename(path, root_path(folder, entry.cid))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(folder / ROOTS)


def read_root(path: Path) -> Entry | None:
    """None where the file is gone or none of ours."""
    try:
        fields = json.loads(_read(path, MAX_ROOT) or b"")
        return Entry(
            cids.parse(fields["cid"]),
            str(fields["name"]),
            int(fields["size"]),
            float(fields["added"]),
            tuple(map(str, fields["packs"])),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, NotACid):
        return None


def read_roots(folder: Path) -> list[Entry]:
    """All roots, in the order added. A file that does not have its root's name is not ours."""
    found = [(path, read_root(path)) for path in (folder / ROOTS).iterdir()]
    entries = [entry for path, entry in found if entry is not None and root_path(folder, entry.cid) == path]
    return sorted(entries, key=lambda entry: (entry.added, entry.cid))


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
