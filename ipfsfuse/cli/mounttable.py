"""What is mounted where, and who uses it: read from /proc alone, so that a mount which does not answer holds up nothing."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.errors import MountFailed

OURS = "fuse.ipfsfuse"


class Mount(NamedTuple):
    point: Path
    kind: str
    """The file system's type: `fuse.ipfsfuse` is ours."""
    number: str
    """The device as `major:minor`."""


def mounts() -> Iterator[Mount]:
    """Every mount of this mount namespace, the last made last (proc_pid_mountinfo(5))."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split()
        kind = fields[fields.index(b"-") + 1]
        yield Mount(Path(os.fsdecode(_unescape(fields[4]))), kind.decode(), fields[2].decode())


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def mounted_at(point: Path) -> Mount | None:
    """The topmost mount at exactly `point`, None where there is none."""
    return next((mount for mount in reversed(list(mounts())) if mount.point == point), None)


def our_mount_at(point: Path) -> Mount:
    """Raises MountFailed where something else, or nothing, is mounted at `point`."""
    found = mounted_at(point)
    if found is None:
        raise MountFailed(f"nothing is mounted at {point}")
    if found.kind != OURS:
        raise MountFailed(f"{point} is not a mount of ipfsfuse but of type {found.kind}: use umount")
    return found


class Holder(NamedTuple):
    pid: int
    command: str
    uses: str
    """One path below the mountpoint that it has open, or has as its working directory."""


def holders(point: Path) -> Iterator[Holder]:
    """The processes that use something at or below `point`, as far as this user may know. Only links are read: nothing
    below the mountpoint is asked for."""
    for entry in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        if int(entry) == os.getpid():
            continue
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
                yield line.rstrip("\n")[73:]  # the path's column (proc_pid_maps(5))
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
