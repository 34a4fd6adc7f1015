"""Measures how much the folders that a guest may write to have grown, and watches that in a process of its
own.

Measuring looks at every file below the folders, and their file system may answer slowly or not at all. So the
runner's process never measures. The guest's process measures before the run, the watching process during the
run.
"""

import errno
import os
import select
import stat
import time
from collections.abc import Sequence
from typing import NamedTuple

from ipfsfuse_run import processes

INTERVAL = 0.1
"""Seconds between two measurements; or twice what the last one took, if that is longer."""
NAME_BYTES = 4096
"""Bytes that each name counts besides its content: about what a file system needs for it."""


class Usage(NamedTuple):
    """The size of all that is below some folders."""

    size: int
    """Bytes of all files, and NAME_BYTES for each name. A file with several names counts once."""
    largest: int
    """Bytes of the largest file."""


class Watched(NamedTuple):
    """Folders that may grow together by `bound` bytes. `what` is the field of Limits, or TMP."""

    what: str
    folders: Sequence[str]
    before: Usage
    bound: int

    @property
    def file_limit(self) -> int:
        """RLIMIT_FSIZE of the guest's process. Files that exist before the run are not larger."""
        return min(self.before.largest + self.bound, (1 << 63) - 1)

    @property
    def text(self) -> str:
        """The bound, for messages."""
        return f"{'--tmp ' if self.what == TMP else 'max-out='}{self.bound} bytes"


TMP = "tmp"
Growth = Sequence[Watched]
"""What to watch, decided before the run. The first item also bounds the size of a single file."""


class TooDeep(Exception):
    """A folder is nested so deeply that its path is too long to open. A guest can make one step by step."""


def measure(folders: Sequence[str]) -> Usage:
    """Follows no symlink. Folders that this user can't read count as nothing: the guest can't write there
    either. Raises TooDeep."""
    total = largest = 0
    linked: set[tuple[int, int]] = set()
    seen: set[tuple[int, int]] = set()
    stack = [os.path.join(each, ".") for each in folders]  # a folder may be given by a symlink
    while stack:
        path = stack.pop()
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno == errno.ENAMETOOLONG:
                raise TooDeep from exc
            continue
        try:
            info = os.fstat(folder)
            if (info.st_dev, info.st_ino) in seen:  # a folder that was given twice, or inside another
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(folder) as entries:
                for each in entries:
                    total += NAME_BYTES
                    if each.is_dir(follow_symlinks=False):
                        stack.append(f"{path}/{each.name}")
                        continue
                    try:
                        found = each.stat(follow_symlinks=False)
                    except OSError:  # removed meanwhile: go on with the next name
                        continue
                    if found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in linked:
                            continue
                        linked.add((found.st_dev, found.st_ino))
                    if stat.S_ISREG(found.st_mode):
                        total += max(found.st_size, 512 * found.st_blocks)
                        largest = max(largest, found.st_size)
        except OSError:
            pass  # removed meanwhile
        finally:
            os.close(folder)
    return Usage(total, largest)


def watch(growth: Growth, guest: int) -> tuple[int, int]:
    """Forks the watching process, which measures again and again. When the guest's process (the pidfd
    `guest`) has ended, it measures once more and ends.

    Returns its pid and a pipe. If the run must end, the pipe says what grew and why."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = processes.fork(lambda: _look(growth, guest, write_end))
    os.close(write_end)
    return pid, read_end


def _look(growth: Growth, guest: int, write_end: int) -> None:
    processes.ignore_signals()
    processes.detach(guest, write_end)
    ended, pause = select.poll(), INTERVAL
    ended.register(guest, select.POLLIN)
    while True:
        over = bool(ended.poll(1000 * pause))
        begun = time.monotonic()
        for each in growth:
            try:
                grown = measure(each.folders).size - each.before.size
            except TooDeep:
                why = "made folders nested so deeply that they can't be measured for"
            else:
                if grown <= each.bound:
                    continue
                why = (
                    "made /tmp grow by more than"
                    if each.what == TMP
                    else ("made its writable folders grow by more than")
                )
            os.write(write_end, f"{each.what} {why} {each.text}".encode())
            return
        if over:
            return
        pause = max(INTERVAL, 2 * (time.monotonic() - begun))
