"""Which daemon serves which live mount, and where it is asked: one small file for each mount, in a folder of
its user.

The kernel's table tells what is mounted where. It tells no program which socket belongs to a mount, and to
ask the mount itself would wait for a daemon that hangs. So each daemon writes a file while it serves, named
by the mount's device number (`0:53`), which only one living file system has at a time: what a killed daemon
left is either found to be without a mount, or replaced by the next daemon whose mount gets that number.

The folder is `ipfsfuse` in $XDG_RUNTIME_DIR, else in /run/user/UID, else /run/ipfsfuse for root, else
/tmp/ipfsfuse-UID; the first that is this user's alone. Commands look in all of them, because a daemon that
was started at boot has other variables than a login. Blocking, a few system calls.
"""

import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.fuse import mountpoint as mountpoints

log = logging.getLogger("ipfsfuse.mount")

MAX_BYTES = 1 << 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class LiveMount(NamedTuple):
    mountpoint: Path
    pid: int
    """The process that serves it."""
    control: Path
    """Its control socket."""


@contextmanager
def registered(mountpoint: Path, control: Path) -> Iterator[None]:
    """`mountpoint`, which this process has just mounted, can be found while the block lasts. Where no folder
    can be used, the log says so, and all else goes on."""
    mounted = mountpoints.ours_at(mountpoint)
    folder = None if mounted is None else _open_folder()
    if mounted is None or folder is None:
        log.warning(
            "commands can't find this mount by --mount: no folder of this user's own for it (docs/CACHE.md)"
        )
        yield
        return
    try:
        entry = {"mountpoint": str(mountpoint), "pid": os.getpid(), "control": str(control)}
        with suppress(OSError):
            _write(folder, mounted.device, json.dumps(entry).encode())
        yield
        if _read(folder, mounted.device) == LiveMount(mountpoint, os.getpid(), control):
            with suppress(OSError):
                os.unlink(mounted.device, dir_fd=folder)
    finally:
        os.close(folder)


def find(mountpoint: Path) -> LiveMount | None:
    """The mount of this user's at `mountpoint`, or of which something is bind-mounted there. None where there
    is none, or it is not known."""
    mounted = mountpoints.ours_at(mountpoint)
    if mounted is None:
        return None
    for path in _folders():
        folder = _opened(path)
        if folder is not None:
            try:
                found = _read(folder, mounted.device)
            finally:
                os.close(folder)
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


def _open_folder() -> int | None:
    """The first folder that can be used, made where it is missing."""
    found = usable_folder()
    return None if found is None else _opened(found)


def usable_folder() -> Path | None:
    """The first of this user's folders that can be used, made where it is missing."""
    for path in _folders():
        with suppress(OSError):
            os.mkdir(path, 0o700)
        opened = _opened(path)
        if opened is not None:
            os.close(opened)
            return path
    return None


def _opened(path: Path) -> int | None:
    """A descriptor of the folder, unless it is another user's, or others may enter it."""
    try:
        folder = os.open(path, _DIRECTORY)
    except OSError:
        return None
    info = os.fstat(folder)
    if info.st_uid == os.geteuid() and not info.st_mode & 0o077:
        return folder
    os.close(folder)
    return None


def _write(folder: int, name: str, data: bytes) -> None:
    fresh = f"{name}.{os.getpid()}.new"
    file = os.open(
        fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
    )
    try:
        os.write(file, data)
    finally:
        os.close(file)
    os.replace(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)


def _read(folder: int, name: str) -> LiveMount | None:
    """None where there is no such file, or it is not one of ours."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return None
        entry = json.loads(os.read(file, MAX_BYTES))
        return LiveMount(Path(entry["mountpoint"]), int(entry["pid"]), Path(entry["control"]))
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None
    finally:
        os.close(file)
