"""`ipfsfuse unmount`: ends a mount, waits until its daemon has gone, and names who stands in the way."""

import argparse
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.cli import folders
from ipfsfuse.control.live_mounts import LiveMount
from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import mountpoint as mountpoints

END_SECONDS = 10.0
"""How long an unmounted daemon may take to put its house in order."""


def run(arguments: argparse.Namespace) -> int:
    point = folders.mountpoint(arguments.mountpoint)
    _must_be_ours(point)
    served_by = folders.live_mount(point, arguments.cache_dir)
    os.chdir("/")  # we may have been called from inside
    with _opened(served_by) as daemon:
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
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode == 0:
        return
    said = done.stderr.strip().rpartition(": ")[2] or "fusermount3 gave no reason"
    if "busy" not in said:
        raise MountFailed(f"{point} can't be unmounted: {said}")
    users = [f"{user.pid} ({user.command}) uses {user.uses}" for user in holders(point)]
    who = (
        "; ".join(users[:5]) + (f"; and {len(users) - 5} more" if len(users) > 5 else "")
        or "a process that this user can't see"
    )
    raise MountFailed(f"{point} is busy: {who}. End that first, or take it away with --lazy")


@contextmanager
def _opened(served_by: LiveMount | None) -> Iterator[int | None]:
    """A pidfd of the daemon, where it is known and lives."""
    try:
        daemon = None if served_by is None else os.pidfd_open(served_by.pid)
    except OSError:
        daemon = None  # it has ended already
    try:
        yield daemon
    finally:
        if daemon is not None:
            os.close(daemon)


# -- who uses a mount: read from /proc alone, so that a mount which does not answer holds nothing up ---------


class Holder(NamedTuple):
    pid: int
    command: str
    uses: str
    """One path below the mountpoint that it has open, or has as its working directory."""


def holders(point: Path) -> Iterator[Holder]:
    """The processes that use something at or below `point`, as far as this user may know. Only links are
    read: nothing below the mountpoint is asked for."""
    for entry in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        for target in _uses(f"/proc/{entry}"):
            if target == str(point) or target.startswith(f"{point}/"):
                yield Holder(int(entry), _command(entry), target)
                break


def _uses(process: str) -> Iterator[str]:
    for name in ("cwd", "root", "exe"):
        yield from _link(f"{process}/{name}")
    try:
        for number in os.listdir(f"{process}/fd"):
            yield from _link(f"{process}/fd/{number}")
        with open(f"{process}/maps", errors="surrogateescape") as maps:
            for line in maps:
                # there where a file is mapped (proc_pid_maps(5))
                for path in line.rstrip("\n").split(maxsplit=5)[5:]:
                    yield path.replace("\\012", "\n")
    except OSError:
        return  # ended meanwhile, or another user's


def _link(path: str) -> Iterator[str]:
    try:
        yield os.readlink(path)
    except OSError:
        return


def _command(pid: str) -> str:
    try:
        said = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
        return os.fsdecode(said)[:60] or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"
