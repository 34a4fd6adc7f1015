"""Finds the daemon and the control socket of a live mount: each mount has a small file in a folder of its
user.

The kernel's table shows what is mounted where, but not the socket of a mount. To ask the mount itself could
block, if its daemon hangs. So each daemon writes a file while it serves. The file's name is the mount's
device number (`0:53`), which only one live file system has at a time. If a killed daemon leaves its file,
there is no such mount, or the next daemon with that number replaces the file.

The folder is the first of these that only this user can enter: `ipfsfuse` in $XDG_RUNTIME_DIR or in
/run/user/UID, and then /run/ipfsfuse for root, or /tmp/ipfsfuse-UID. Commands look in all of them, since a
daemon that was started at boot has other variables than a login. The calls block for a few system calls.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.cache.store.folder import read_file
from ipfsfuse.fileio.files import Closing, write_file
from ipfsfuse.fuse import mountpoint as mountpoints

log = logging.getLogger("ipfsfuse.mount")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LiveMount(NamedTuple):
    mountpoint: Path
    pid: int
    """The process that serves it."""
    control: Path
    """Its control socket."""


@contextmanager
def register(mountpoint: Path, control: Path) -> Iterator[None]:
    """Lets `find` find `mountpoint`, which this process has just mounted, during the block. If no folder can
    be used, only logs that."""
    mounted, path = mountpoints.ours_at(mountpoint), usable_folder()
    with nullcontext() if path is None else _open_folder(path) as folder:
        if mounted is None or folder is None:
            log.warning(
                "commands can't find this mount by --mount: no folder of this user's own for it "
                "(docs/CACHE.md)"
            )
            yield
            return
        entry = {"mountpoint": str(mountpoint), "pid": os.getpid(), "control": str(control)}
        with suppress(OSError):
            write_file(folder, mounted.device, json.dumps(entry).encode(), lasting=False)
        try:
            yield
        finally:
            if _read(folder, mounted.device) == LiveMount(mountpoint, os.getpid(), control):
                with suppress(OSError):
                    os.unlink(mounted.device, dir_fd=folder)


def find(mountpoint: Path) -> LiveMount | None:
    """The mount of this user at `mountpoint`, also if `mountpoint` is a bind mount of it. None if there is
    none, or it has no file."""
    mounted = mountpoints.ours_at(mountpoint)
    if mounted is None:
        return None
    for path in _folders():
        with _open_folder(path) as folder:
            found = None if folder is None else _read(folder, mounted.device)
        at = None if found is None else mountpoints.ours_at(found.mountpoint)
        if at is not None and at.device == mounted.device:
            return found
    return None


def _folders() -> Iterator[Path]:
    user = os.geteuid()
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(named):
        yield Path(named) / "ipfsfuse"
    yield Path(f"/run/user/{user}/ipfsfuse")
    yield Path("/run/ipfsfuse") if user == 0 else Path(f"/tmp/ipfsfuse-{user}")


def usable_folder() -> Path | None:
    """The first of this user's folders that can be used. It is made if it is missing."""
    for path in _folders():
        with suppress(OSError):
            os.mkdir(path, 0o700)
        with _open_folder(path) as folder:
            if folder is not None:
                return path
    return None


@contextmanager
def _open_folder(path: Path) -> Iterator[int | None]:
    """A descriptor of the folder. None if it belongs to another user or others may enter it."""
    try:
        folder = os.open(path, _DIRECTORY)
    except OSError:
        yield None
        return
    with Closing(folder):
        info = os.fstat(folder)
        yield folder if info.st_uid == os.geteuid() and not info.st_mode & 0o077 else None


def _read(folder: int, name: str) -> LiveMount | None:
    """None if there is no such file, or its content is wrong."""
    try:
        entry = json.loads(read_file(folder, name))
        return LiveMount(Path(entry["mountpoint"]), int(entry["pid"]), Path(entry["control"]))
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None
