"""How long the kernel waits for an answer before it ends the whole mount, where an administrator has bounded
that.

Linux, Documentation/admin-guide/sysctl/fs.rst: `default_request_timeout` holds for servers that ask for none
in INIT, as we don't; `max_request_timeout` bounds every server's; 0 is none. Both are in seconds, and read by
the kernel when a mount begins. The kernel looks every 15 s (FUSE_TIMEOUT_TIMER_FREQ), and takes smaller
numbers for 15. That is no part of what it documents, so nothing here rests on it."""

from pathlib import Path
from typing import NamedTuple

from ipfsfuse.errors import MountFailed

SYSCTLS = Path("/proc/sys/fs/fuse")
MARGIN = 2.0
"""Seconds before the kernel's limit by which a call must have failed: it is answered up to a second after its
deadline."""


class RequestTimeout(NamedTuple):
    seconds: int
    set_by: Path


def request_timeout(folder: Path = SYSCTLS) -> RequestTimeout | None:
    """What a mount that begins now will be held to; None for no limit, and where the kernel knows none."""
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
    """`deadline` in seconds, or a shorter one, with which the kernel does not end the mount; and why it is
    shorter, in a line, else "". Raises MountFailed where none would do."""
    timeout = request_timeout(folder)
    if timeout is None or deadline <= timeout.seconds - MARGIN:
        return deadline, ""
    reason = f"{timeout.set_by} has the kernel end a mount that does not answer within {timeout.seconds} s"
    if timeout.seconds <= MARGIN:
        raise MountFailed(f"{reason}: set it to 0 or to {int(deadline + MARGIN) + 1}")
    return (
        timeout.seconds - MARGIN,
        f"the deadline is {timeout.seconds - MARGIN:g} s, not {deadline:g} s: {reason}",
    )
