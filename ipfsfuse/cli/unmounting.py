"""`ipfsfuse unmount`: ends a mount, waits until its daemon has gone, and names who stands in the way."""

import argparse
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import folders, holders
from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import mountpoint as mountpoints

END_SECONDS = 10.0
"""How long an unmounted daemon may take to put its house in order."""


def run(arguments: argparse.Namespace) -> int:
    point = folders.mountpoint(arguments.mountpoint)
    _must_be_ours(point)
    cache_dir = folders.cache_dir(arguments.cache_dir)
    os.chdir("/")  # we may have been called from inside
    with _daemon_of(point, cache_dir) as daemon:
        take_away(point, arguments.lazy)
        if daemon is not None and not arguments.lazy:
            select.select([daemon], [], [], END_SECONDS)
    return 0


def _must_be_ours(point: Path) -> None:
    kinds = [mounted.type for mounted in mountpoints.table() if mounted.mountpoint == str(point)]
    if not kinds:
        raise MountFailed(f"nothing is mounted at {point}")
    if kinds[-1] != mountpoints.TYPE:
        raise MountFailed(f"{point} is not a mount of ipfsfuse but of type {kinds[-1]}: use umount")


def take_away(point: Path, lazy: bool) -> None:
    """Unmounts. Raises MountFailed that names who holds it."""
    command = [mountpoints.fusermount(), "-u", *(["-z"] if lazy else []), "--", str(point)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"})
    if done.returncode == 0:
        return
    said = done.stderr.strip().rpartition(": ")[2] or "fusermount3 gave no reason"
    if "busy" not in said:
        raise MountFailed(f"{point} can't be unmounted: {said}")
    users = [f"{user.pid} ({user.command}) uses {user.uses}" for user in holders.of(point)]
    who = "; ".join(users[:5]) + (f"; and {len(users) - 5} more" if len(users) > 5 else "") or "a process that this user can't see"
    raise MountFailed(f"{point} is busy: {who}. End that first, or take it away with --lazy")


@contextmanager
def _daemon_of(point: Path, cache_dir: Path) -> Iterator[int | None]:
    """A pidfd of the daemon that serves `point`, where the cache folder tells which that is."""
    said = cache_folder.announced(cache_dir)
    try:
        daemon = os.pidfd_open(said[0]) if said is not None and Path(said[1]) == point else None
    except OSError:
        daemon = None  # it has ended already
    try:
        yield daemon
    finally:
        if daemon is not None:
            os.close(daemon)
