"""What a guest can tell others by what it reads: a mount asks its sources for the CIDs that its readers
name."""

import os
import stat
from typing import TYPE_CHECKING

from ipfsfuse.errors import IpfsFuseError
from ipfsfuse_run import messages
from ipfsfuse_run.options import Options

if TYPE_CHECKING:
    from ipfsfuse_run.mounts import Mount


def warn(options: Options, mount: "Mount") -> None:
    """Says in one line which sources can learn what this guest was given, where it was given anything and
    nothing prevents it."""
    given = _given(options)
    if not given or options.allow or "--offline" in options.mount_options:
        return
    sources = _network_sources(mount)
    if sources:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        messages.say(
            f"this guest can tell {sources[0]}{more} what it reads in {given}, by the CIDs that it "
            "asks /ipfs for: "
            "--allow CID or --offline prevents that"
        )


def _given(options: Options) -> str:
    """What of this run may hold secrets, in words."""
    parts = (
        ["--dir"] * bool(options.dirs)
        + ["--env"] * bool(options.env)
        + ["standard input"] * (options.guest != "-" and _has_input())
    )
    return ", ".join(parts)


def _has_input() -> bool:
    """Whether standard input is a pipe, a socket or a file with anything in it: a terminal is its user's own
    doing."""
    try:
        info = os.fstat(0)
    except OSError:
        return False
    return (
        stat.S_ISFIFO(info.st_mode)
        or stat.S_ISSOCK(info.st_mode)
        or (stat.S_ISREG(info.st_mode) and info.st_size > 0)
    )


def _network_sources(mount: "Mount") -> list[str]:
    """The sources of the mount that lead beyond this machine's disks. A mount that does not tell is taken to
    have some."""
    try:
        told = mount.control.ask("status")
        if told["offline"] or told.get("allow"):
            return []
        return [str(each["name"]) for each in told["sources"] if not _is_local(str(each["name"]))]
    except (IpfsFuseError, KeyError, TypeError):
        return ["its mount's sources"]


def _is_local(source: str) -> bool:
    """The library, and CAR files, are read in place."""
    return source == "library" or os.path.isabs(source)
