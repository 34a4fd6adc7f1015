"""The newest IPNS record that was seen of each name: `names/<name>`, one file each.

A name's record outlives a restart, so that nobody can pass off an older one afterwards. What lies here is
verified by who reads it.

Concurrency: calls block for a few system calls; make them in a thread. One process uses the folder.
"""

import contextlib
import logging
import os
import re
from pathlib import Path

from ipfsfuse.cache.store.folder import NAMES, Subfolder, as_store_failed, read_file, write_file
from ipfsfuse.errors import StoreFailed

log = logging.getLogger(__name__)

MAX_RECORDS = 1024
"""Files kept: 4 to 12 MiB. Beyond them the one that was used longest ago goes."""
_NAME = re.compile(r"[a-z0-9]{1,200}")


class NameRecords:
    def __init__(self, folder: Path) -> None:
        """`folder` is our cache folder. Raises StoreFailed."""
        with as_store_failed(f"{folder / NAMES} can't be used"):
            self._folder = Subfolder(folder / NAMES)

    def get(self, name: str) -> bytes | None:
        with contextlib.suppress(OSError, StoreFailed):
            fd = self._folder.fd
            data = read_file(fd, name)
            with contextlib.suppress(OSError):
                os.utime(name, dir_fd=fd, follow_symlinks=False)
            return data
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keeps `data`; on the disk when this returns. Raises StoreFailed."""
        with as_store_failed(f"the record of {name} can't be kept"):
            write_file(self._folder.fd, name, data)
            self._make_room()

    def names(self) -> list[str]:
        """Of which names a record is kept."""
        return [name for name in self._folder.names() if _NAME.fullmatch(name)]

    def close(self) -> None:
        self._folder.close()

    def _make_room(self) -> None:
        names = self.names()
        if len(names) > MAX_RECORDS:
            used = sorted((self._folder.stat(name).st_mtime_ns, name) for name in names)
            for _time, name in used[: len(names) - MAX_RECORDS]:
                self._folder.unlink(name)
