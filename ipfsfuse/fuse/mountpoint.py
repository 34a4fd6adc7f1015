"""Mountpoints: reads the kernel's table of mounts, and checks whether a folder can be mounted on. Never
touches a live mount: a child process, which may be left behind, tries whether a mount's daemon answers."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.errors import MountFailed

TYPE = "fuse.ipfsfuse"
DAEMON_ANSWER_SECONDS = 5


class Mounted(NamedTuple):
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    number: int
    """The kernel's number, unique among existing mounts."""
    device: str
    """major:minor"""
    mountpoint: str
    type: str
    owner: int | None = None
    """The user who mounted it, if it is a FUSE mount."""
    root: str = "/"
    """The directory of the file system that is mounted there; not / for some bind mounts."""


def table() -> list[Mounted]:
    """All mounts that this process sees, the uppermost last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            kind = fields[fields.index("-") + 1]
            owner = next(
                (each[8:] for each in fields[-1].strip().split(",") if each.startswith("user_id=")), None
            )
            uid = None if owner is None else int(owner)
            found.append(
                Mounted(int(fields[0]), fields[2], _unescaped(fields[4]), kind, uid, _unescaped(fields[3]))
            )
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
    """Checks that `mountpoint` can be mounted on. Unmounts a dead mount of ipfsfuse there.

    Raises MountFailed, which names it, if it is missing, not a folder, not empty, or a live mount."""
    if ours_at(mountpoint) is not None:
        if answers(mountpoint):
            raise MountFailed(f"{mountpoint} is mounted already: ipfsfuse unmount {mountpoint} first")
        command = [*fusermount(), "-u", "-z", "-q", "--", str(mountpoint)]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
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


class MountTarget:
    """Ensures that a mount is made at the folder that was meant, even if its path is changed meanwhile.

    For an ordinary user fusermount3 changes into the folder, checks it there, and mounts at ".". For root it
    resolves the path again, so anyone who may rename a folder above it can redirect the mount. So the mount
    is checked before it is served. Use it as a context manager."""

    def __init__(self, mountpoint: Path) -> None:
        """Raises MountFailed if anyone may replace a folder in the path, or if one of them is a symlink."""
        self._path = mountpoint
        self._fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in mountpoint.parts[1:]:
                mode = os.fstat(self._fd).st_mode
                if os.geteuid() == 0 and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                    why = f"anyone may replace {part} in its path: choose another folder"
                    raise MountFailed(f"{mountpoint} can't be mounted by root: {why}")
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                below = os.open(part, flags, dir_fd=self._fd)
                os.close(self._fd)
                self._fd = below
        except OSError as exc:
            os.close(self._fd)
            raise MountFailed(f"{mountpoint} can't be mounted: {exc.strerror}") from exc
        except MountFailed:
            os.close(self._fd)
            raise
        self._before = {(mounted.number, mounted.mountpoint) for mounted in table()}

    def __enter__(self) -> "MountTarget":
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)

    def check(self) -> None:
        """Raises MountFailed unless a new mount of ours is at the folder."""
        new = [mounted.mountpoint for mounted in self._new()]
        if str(self._path) not in new or os.readlink(f"/proc/self/fd/{self._fd}") != str(self._path):
            todo = "choose a folder whose path only you can change"
            raise MountFailed(f"{self._path} was replaced while it was being mounted: {todo}")

    def made(self) -> list[str]:
        """The mountpoints of new mounts of ours."""
        return [mounted.mountpoint for mounted in self._new()]

    def _new(self) -> list[Mounted]:
        """New mounts of ours. They are compared by number and mountpoint, because the kernel uses the number
        of a mount again after its end."""
        ours = [mounted for mounted in table() if mounted.type == TYPE]
        return [mounted for mounted in ours if (mounted.number, mounted.mountpoint) not in self._before]


HELPER = (sys.executable, "-I", str(Path(__file__).with_name("mount_helper.py")))
"""Our own fusermount3, for root."""


def fusermount() -> Sequence[str]:
    """The command fusermount3, or for root HELPER if it is missing. Raises MountFailed."""
    found = shutil.which("fusermount3") or shutil.which("fusermount3", path="/usr/bin:/bin:/usr/local/bin")
    if found:
        return [found]
    if os.geteuid() != 0:
        raise MountFailed("fusermount3 is missing: install the package fuse3")
    return HELPER


def answers(mountpoint: Path) -> bool:
    """Whether the mount's daemon lives. A daemon that does not answer in time counts as alive."""
    # opens the directory, because its attributes may be cached
    script = "import os, sys; os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)"
    command = [sys.executable, "-I", "-S", "-c", script, str(mountpoint)]
    try:
        done = subprocess.run(
            command, env={"LC_ALL": "C"}, capture_output=True, timeout=DAEMON_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return True
    return not any(gone in done.stderr for gone in (b"not connected", b"connection abort"))


def raise_readahead(mountpoint: Path, kib: int) -> None:
    """Lets the kernel read ahead further than its default of 128 KiB. Works only for root."""
    mounted = ours_at(mountpoint)
    if mounted is not None:
        with (
            suppress(OSError),
            open(f"/sys/class/bdi/{mounted.device}/read_ahead_kb", "w", encoding="ascii") as setting,
        ):
            setting.write(str(kib))


# -- how long the kernel waits for an answer -----------------------------------------------------------------
#
# An administrator can make the kernel end a mount that does not answer in time. Linux,
# Documentation/admin-guide/sysctl/fs.rst: `default_request_timeout` is for servers that set none in INIT, as
# we don't. `max_request_timeout` bounds that of every server. 0 means no limit. Both are in seconds, and read
# by the kernel when a mount begins. The kernel checks every 15 s (FUSE_TIMEOUT_TIMER_FREQ), and treats
# smaller numbers as 15. That is not documented, so nothing here depends on it.

SYSCTLS = Path("/proc/sys/fs/fuse")
DEADLINE_MARGIN = 2.0
"""Seconds by which our deadline must be shorter than the kernel's limit: a call is answered up to a second
after its deadline."""


class RequestTimeout(NamedTuple):
    seconds: int
    set_by: Path


def request_timeout(folder: Path = SYSCTLS) -> RequestTimeout | None:
    """The kernel's limit for a mount that begins now; None if there is none, or the kernel has no such
    limit."""
    default, most = (
        RequestTimeout(_number(path), path)
        for path in (folder / "default_request_timeout", folder / "max_request_timeout")
    )
    return min((each for each in (default, most) if each.seconds), default=None)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def fitting_deadline(deadline: float, folder: Path = SYSCTLS) -> tuple[float, str]:
    """`deadline` in seconds, or a shorter one with which the kernel does not end the mount; and one line that
    says why it is shorter, else "". Raises MountFailed if none is short enough."""
    timeout = request_timeout(folder)
    if timeout is None or deadline <= timeout.seconds - DEADLINE_MARGIN:
        return deadline, ""
    reason = f"{timeout.set_by} has the kernel end a mount that does not answer within {timeout.seconds} s"
    if timeout.seconds <= DEADLINE_MARGIN:
        raise MountFailed(f"{reason}: set it to 0 or to {int(deadline + DEADLINE_MARGIN) + 1}")
    return (
        timeout.seconds - DEADLINE_MARGIN,
        f"the deadline is {timeout.seconds - DEADLINE_MARGIN:g} s, not {deadline:g} s: {reason}",
    )
