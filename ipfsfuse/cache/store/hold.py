"""Who holds a cache folder: one daemon at a time, by a lock that its end lets go of, kill -9 included.

The folder is created 0700, and refused if others own it or may write to it: what lies there is trusted to be ours
(its bytes are not; they are proved by hash). Concurrency: calls block for a few system calls; call them at start-up.
"""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ipfsfuse.errors import StoreFailed

LOCK = "lock"
DAEMON = "daemon.json"


@contextlib.contextmanager
def as_store_failed(doing: str) -> Iterator[None]:
    """OSError becomes StoreFailed, "`doing`: reason"."""
    try:
        yield
    except OSError as exc:
        raise StoreFailed(f"{doing}: {exc.strerror or exc}") from exc


class Lock:
    """A held folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def announce(self, pid: int, mountpoint: str) -> None:
        """Says for whom the folder is held: what a second daemon is refused with."""
        path = self.folder / DAEMON
        fresh = path.with_suffix(".new")
        with as_store_failed(f"{path} can't be written"):
            fresh.write_text(json.dumps({"pid": pid, "mountpoint": mountpoint}) + "\n")
            fresh.replace(path)


def announced(folder: Path) -> tuple[int, str] | None:
    """(pid, mountpoint) as the folder's holder announced them, dead or alive; None where nobody has."""
    try:
        said = json.loads((folder / DAEMON).read_text())
        return int(said["pid"]), str(said["mountpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_free(folder: Path) -> bool:
    """Whether it is certain that no living process holds `folder`."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # that we can't look proves nothing, and what is free may be deleted
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Lock]:
    """Holds `folder`, made if it is missing. Raises StoreFailed, naming the holder, where another process does."""
    prepare(folder)
    with as_store_failed(f"{folder / LOCK} can't be opened"):
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StoreFailed(_refusal(folder)) from exc
        (folder / DAEMON).unlink(missing_ok=True)
        yield Lock(folder)
        with contextlib.suppress(OSError):
            (folder / DAEMON).unlink(missing_ok=True)
    finally:
        os.close(file)


def _refusal(folder: Path) -> str:
    holder = announced(folder)
    if holder is None:
        return f"{folder} is in use by another daemon: give this one its own --cache-dir"
    return f"{folder} is in use by process {holder[0]}, mounted at {holder[1]}: use that mount, or give this one its own --cache-dir"


def prepare(folder: Path) -> None:
    """Makes `folder` with mode 0700 where it is missing. Raises StoreFailed where others own it or may write to it."""
    with as_store_failed(f"the cache folder {folder} can't be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    with as_store_failed(f"the cache folder {folder} can't be used"):
        info = folder.lstat()  # a link, which others may set in /tmp, could lead to a folder of ours that is no cache
    if not stat.S_ISDIR(info.st_mode):
        raise StoreFailed(f"the cache folder {folder} is no folder")
    if info.st_uid != os.geteuid():
        raise StoreFailed(f"the cache folder {folder} belongs to another user: give --cache-dir a folder of your own")
    if info.st_mode & 0o022:
        raise StoreFailed(f"the cache folder {folder} may be written by others: run chmod 700 {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreFailed(f"the cache folder {folder} is not writable")
