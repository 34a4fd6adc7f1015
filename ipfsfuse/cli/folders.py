"""Finds the cache folder, the library, the mountpoint and the daemon for a command."""

import argparse
import os
import pwd
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipfsfuse import errors
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import settings
from ipfsfuse.config import absolute, cache_dir, library

__all__ = ["cache_dir", "control", "control_socket", "library", "live_mount", "mountpoint"]

if TYPE_CHECKING:
    from ipfsfuse.control.live_mounts import LiveMount


def mountpoint(given: str) -> Path:
    """The absolute path, with symlinks resolved. Does not ask a mount that is there, since its daemon may
    hang."""
    from ipfsfuse.fuse import mountpoint as mountpoints

    folder, name = os.path.split(given.rstrip("/"))
    if name not in ("", ".", ".."):
        point = os.path.join(os.path.realpath(folder or "."), name)
        if any(mounted.mountpoint == point for mounted in mountpoints.table()):
            return Path(point)
    return absolute(given)


def user_name(uid: int) -> str:
    """The name of a user; the number if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class InMount(NamedTuple):
    mountpoint: Path
    below: str
    """The path in the file system that is mounted there, "" for its root."""


MAX_SYMLINKS = 40
"""The most symlinks that are followed in one path, as in Linux."""


def in_mount(text: str) -> InMount | None:
    """The place of the local path `text` in a mount of ipfsfuse; None if it is in no mount. Symlinks before
    the mountpoint are followed. Does not ask the mount, since its daemon may hang."""
    from ipfsfuse.fuse import mountpoint as mountpoints

    points = {each.mountpoint: each for each in mountpoints.table() if each.type == mountpoints.TYPE}
    try:
        left = deque(Path(os.path.abspath(text)).parts[1:])
    except OSError:  # the working directory is gone
        return None
    here, links = "/", 0
    while True:
        if here in points:
            root = points[here].root.strip("/")
            return InMount(Path(here), "/".join(filter(None, [root, *left])))
        if not left:
            return None
        further = os.path.join(here, left.popleft())
        target = ""
        with suppress(OSError):  # it is not a symlink
            target = "" if further in points else os.path.abspath(os.path.join(here, os.readlink(further)))
        links += bool(target)
        if links > MAX_SYMLINKS:
            return None
        left.extendleft(reversed(Path(target).parts[1:]))
        here = "/" if target else further


def live_mount(point: Path, given_cache_dir: str | None, must: bool = True) -> "LiveMount | None":
    """The daemon that serves `point`. None if it is not known. If it `must` use the given cache folder, also
    None if another daemon uses that folder."""
    from ipfsfuse.control import live_mounts

    found = live_mounts.find(point)
    if found is not None and (
        given_cache_dir is None
        or not must
        or found.control == cache_folder.socket_path(cache_dir(given_cache_dir))
    ):
        return found
    folder = cache_dir(given_cache_dir)
    announced = cache_folder.announced(folder)
    if announced is not None and Path(announced[1]) == point:
        return live_mounts.LiveMount(point, announced[0], cache_folder.socket_path(folder))
    return None


class Daemon(NamedTuple):
    """The process that serves a mount, or served it last."""

    control: Path
    """Its control socket."""
    pid: int | None
    mountpoint: Path | None


def last_daemon(given_cache_dir: str | None, mounted_at: str | None, must: bool = True) -> Daemon:
    """The daemon of the mount that the arguments name, dead or alive. Raises DaemonFailed if the mount at
    `mounted_at` can't be asked."""
    if mounted_at is None:
        folder = cache_dir(given_cache_dir)
        daemon = cache_folder.announced(folder)
        socket = cache_folder.socket_path(folder)
        return Daemon(socket, None, None) if daemon is None else Daemon(socket, daemon[0], Path(daemon[1]))
    from ipfsfuse.fuse import mountpoint as mountpoints

    point = mountpoint(mounted_at)
    found = live_mount(point, given_cache_dir, must)
    if found is not None:
        return Daemon(found.control, found.pid, point)
    if mountpoints.ours_at(point) is None:
        raise errors.DaemonFailed(f"{point} is not a mount of ipfsfuse")
    if given_cache_dir is not None and must:
        raise errors.DaemonFailed(
            f"the mount of {cache_dir(given_cache_dir)} is not at {point}: leave out --cache-dir"
        )
    raise errors.DaemonFailed(
        f"which daemon serves {point} is not known: name its cache folder with --cache-dir"
    )


def control(daemon: Daemon) -> Path:
    """The daemon's control socket. Raises DaemonFailed if the daemon has ended and left a dead mount."""
    if daemon.pid is not None and _has_ended(daemon.pid, daemon.control.parents[1]):
        from ipfsfuse.fuse import mountpoint as mountpoints  # 0.5 s that other commands needn't wait

        point = daemon.mountpoint
        if point is not None and mountpoints.ours_at(point) is not None:
            raise errors.DaemonFailed(
                f"the daemon of the mount at {point} has ended: `ipfsfuse mount {point}` takes its place"
            )
    return daemon.control


def _has_ended(pid: int, folder: Path) -> bool:
    """Whether the daemon of a cache folder has ended. A PID namespace may hide a live daemon, so the lock of
    its folder is checked too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = "X"
    return state in ("X", "Z") and cache_folder.is_free(folder)  # dead, or a zombie (proc_pid_stat(5))


def control_socket(arguments: argparse.Namespace) -> Path:
    """The control socket of the mount that the arguments name. Raises DaemonFailed."""
    return control(last_daemon_of(arguments))


def last_daemon_of(arguments: argparse.Namespace) -> Daemon:
    """The daemon that the arguments name, or the last one that ran there. --mount may use another cache
    folder than the configuration names."""
    mount = None if arguments.mount is None else settings.mountpoint_of(arguments.mount)
    return last_daemon(arguments.cache_dir, mount, arguments.origins.get("cache-dir") == "argument")
