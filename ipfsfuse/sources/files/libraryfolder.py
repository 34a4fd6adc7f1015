"""The library's folder: what lies where, and who may use it.

    <folder>/          0700
      lock             shared by who adds, exclusive for who removes packs
      *.car            packs: the blocks that one `add` brought, a CARv2 file with its index, never changed
      *.tmp            a pack while it is written, locked (flock) by its writer
      roots/<CID>      a root: JSON of its name, size, time and the packs that its blocks lie in

A root's file is made after its packs are complete and removed before any of them goes, so that a root that is listed
can be read at any moment, whoever is killed. Blocking; several processes at once are safe.
"""

import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, SourceFailed, StoreFailed

PACK = ".car"
TEMPORARY = ".tmp"


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
    """Makes the folder where there is none. Raises StoreFailed where others own it or may write there."""
    with store_errors(f"the library {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "roots").mkdir(mode=0o700, exist_ok=True)
        check_private(folder)
        check_private(folder / "roots")


def check_private(folder: Path) -> None:
    status = os.stat(folder)
    if status.st_uid != os.geteuid():
        raise StoreFailed(f"{folder} belongs to another user: choose another folder")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise StoreFailed(f"{folder} may be written by others: chmod 700 it, or choose another folder")


@contextmanager
def lock(folder: Path, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Holds the library's lock. Gives False, holding nothing, where it is taken and `wait` is False."""
    with store_errors(f"the library {folder}"):
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


# -- packs -------------------------------------------------------------------------------------------------------


def pack_names(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(PACK)}


def new_temporary(folder: Path) -> tuple[Path, int]:
    """An empty temporary file, locked for as long as its descriptor is open."""
    while True:
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}{TEMPORARY}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # a sweep came between


def sweep(folder: Path) -> None:
    """Removes what dead writers left: temporary files that nobody locks."""
    for path in folder.glob("*" + TEMPORARY):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


# -- roots -------------------------------------------------------------------------------------------------------


def root_path(folder: Path, cid: Cid) -> Path:
    return folder / "roots" / cids.text(cids.canonical(cid))


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
    sync_folder(folder / "roots")


def read_root(path: Path) -> Entry | None:
    """None where the file is gone or none of ours."""
    try:
        fields = json.loads(path.read_text())
        return Entry(cids.parse(fields["cid"]), str(fields["name"]), int(fields["size"]), float(fields["added"]), tuple(map(str, fields["packs"])))
    except (OSError, ValueError, KeyError, TypeError, NotACid):
        return None


def read_roots(folder: Path) -> list[Entry]:
    """All roots, in the order added."""
    found = (read_root(folder / "roots" / name) for name in os.listdir(folder / "roots"))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: (entry.added, entry.cid))


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
