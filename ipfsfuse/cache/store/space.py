"""What a cache folder takes of its file system, and how much more it may take.

Concurrency: any thread; each call takes some microseconds for each thing that it looks at.
"""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

RESERVE_PART, MAX_RESERVE = 20, 2 << 30
"""By default a twentieth of the file system stays free, at most 2 GiB."""


class FreeSpace:
    """How much more of its file system a cache folder may take, so that a reserve stays free for everybody
    else."""

    def __init__(self, folder: Path, reserve: int | None) -> None:
        """`reserve` in bytes; None for the default."""
        self._folder = folder
        self._wanted = reserve
        self.total = self.free = self.reserve = 0
        """Bytes, as of the last look. `free` is what an ordinary user may take. All are 0 where the file
        system, as some on the network, does not tell its size."""
        with contextlib.suppress(OSError):  # the folder can't be made yet: it is looked at again later
            self._look()

    def _look(self) -> None:
        info = os.statvfs(self._folder)
        self.total, self.free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
        self.reserve = min(self.total // RESERVE_PART, MAX_RESERVE) if self._wanted is None else self._wanted

    def spare(self) -> int | None:
        """As `Budget` asks for it."""
        try:
            self._look()
        except OSError:  # the folder is gone, or its disk: writing says so
            return None
        return self.free - self.reserve if self.total else None


def disk_usage(folder: Path, but_in: Collection[Path] = ()) -> int:
    """Bytes on disk of `folder` and all below it, but for what lies in `but_in`. What vanishes meanwhile, or
    can't be looked at, counts nothing. No symlink is followed."""
    total = 0
    with contextlib.suppress(OSError):
        total += folder.lstat().st_blocks * 512
        if folder not in but_in:
            with os.scandir(folder) as items:
                for item in items:
                    with contextlib.suppress(OSError):
                        if item.is_dir(follow_symlinks=False):
                            total += disk_usage(Path(item.path), but_in)
                        else:
                            total += item.stat(follow_symlinks=False).st_blocks * 512
    return total
