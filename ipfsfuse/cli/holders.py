"""Who uses a mount: read from /proc alone, so that a mount which does not answer holds up nothing."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Holder(NamedTuple):
    pid: int
    command: str
    uses: str
    """One path below the mountpoint that it has open, or has as its working directory."""


def of(point: Path) -> Iterator[Holder]:
    """The processes that use something at or below `point`, as far as this user may know. Only links are read: nothing
    below the mountpoint is asked for."""
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
                for path in line.rstrip("\n").split(maxsplit=5)[5:]:  # there where a file is mapped (proc_pid_maps(5))
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
