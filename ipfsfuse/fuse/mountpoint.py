"""Mountpoints: what is mounted where, and whether a folder can take a mount. Touches no live mount: the kernel's own
table tells, and a mount whose daemon may be gone is tried by a child process that can be left behind."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.errors import MountFailed

TYPE = "fuse.ipfsfuse"
TRY_SECONDS = 5


class Mounted(NamedTuple):
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    device: str
    """major:minor"""
    mountpoint: str
    type: str


def table() -> list[Mounted]:
    """All mounts that this process sees, the uppermost last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            found.append(Mounted(fields[2], _unescaped(fields[4]), fields[fields.index("-") + 1]))
    return found


def _unescaped(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def ours_at(mountpoint: Path) -> Mounted | None:
    """The uppermost mount at `mountpoint`, if it is one of ipfsfuse's."""
    at = [mounted for mounted in table() if mounted.mountpoint == str(mountpoint)]
    return at[-1] if at and at[-1].type == TYPE else None


def prepare(mountpoint: Path) -> None:
    """Makes sure that `mountpoint` can take a mount: frees it of a mount whose daemon is dead.

    Raises MountFailed, naming it, where it is missing, no folder, not empty, or a live mount."""
    if ours_at(mountpoint) is not None:
        if _answers(mountpoint):
            raise MountFailed(f"{mountpoint} is mounted already: ipfsfuse unmount {mountpoint} first")
        subprocess.run([fusermount(), "-u", "-z", "-q", "--", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
    try:
        names = os.listdir(mountpoint)
    except FileNotFoundError as exc:
        raise MountFailed(f"{mountpoint} does not exist: mkdir it first") from exc
    except NotADirectoryError as exc:
        raise MountFailed(f"{mountpoint} is not a directory") from exc
    except OSError as exc:
        raise MountFailed(f"{mountpoint} can't be used: {exc.strerror}") from exc
    if names:
        raise MountFailed(f"{mountpoint} is not empty: mount on an empty directory")


def fusermount() -> str:
    """The path of fusermount3. Raises MountFailed."""
    found = shutil.which("fusermount3") or shutil.which("fusermount3", path="/usr/bin:/bin:/usr/local/bin")
    if not found:
        raise MountFailed("fusermount3 is missing: install the package fuse3")
    return found


def _answers(mountpoint: Path) -> bool:
    """True unless the mount's daemon is gone; one that does not answer in time counts as alive."""
    try:
        done = subprocess.run(["stat", "--", str(mountpoint)], env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}, capture_output=True, timeout=TRY_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return not any(gone in done.stderr for gone in (b"not connected", b"connection abort"))


def raise_readahead(mountpoint: Path, kib: int) -> None:
    """Lets the kernel read ahead further than its 128 KiB, where we may: as root."""
    mounted = ours_at(mountpoint)
    if mounted is not None:
        with suppress(OSError), open(f"/sys/class/bdi/{mounted.device}/read_ahead_kb", "w", encoding="ascii") as setting:
            setting.write(str(kib))
