"""The packs of a library, kept up with what other processes add and remove.

Blocking, for any number of threads at once. Each look-up asks the folder's modification time, one stat (2
us), whether something has come or gone.
"""

import os
import threading
import time
from pathlib import Path

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.files.carfile import CarFile, Place, Read, read_disk
from ipfsfuse.sources.files.carstreams import Found
from ipfsfuse.sources.files.libraryfolder import pack_names

_UNSETTLED_NS = 50_000_000
"""Changes so close together may leave a folder with one and the same modification time."""


class FolderWatch:
    """Whether a folder has changed since the last time it was asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = -1

    def changed(self) -> bool:
        """True also where that can't be told: where the last change is too fresh. Raises OSError."""
        found = os.stat(self._folder).st_mtime_ns
        if found == self._seen:
            return False
        self._seen = found if time.time_ns() - found > _UNSETTLED_NS else -1
        return True


class Packs:
    """All packs in a folder, opened as they are seen, closed when they are gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watch = FolderWatch(folder)
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], CarFile] = {}
        self._order: list[CarFile] = []
        """The pack that had the last block first: its neighbour is probably there too. Replaced, never
        changed."""

    def find(self, multihash: bytes, read: Read = read_disk) -> Found | None:
        """Where the block is. Raises SourceFailed if the one pack that should have it is broken,
        BlockingIOError by `read`."""
        self.refresh()
        broken: SourceFailed | None = None
        order = self._order
        for pack in order:
            try:
                place: Place | None = pack.find(multihash, read)
            except SourceFailed as exc:
                broken, place = exc, None
            if place is not None:
                if pack is not order[0]:
                    self._order = [pack, *(other for other in order if other is not pack)]
                return Found(pack, place)
        if broken is not None:
            raise broken
        return None

    def refresh(self) -> None:
        """Looks for new packs and lets go of those that are gone."""
        with self._lock:
            try:
                if not self._watch.changed():
                    return
                names = pack_names(self._folder)
            except FileNotFoundError:
                names = set()
            found = {key: path for name in names if (key := _key(path := self._folder / name))}
            gone = [key for key in self._open if key not in found]
            new = [
                pack
                for key, path in found.items()
                if key not in self._open and (pack := self._take(key, path))
            ]
            for key in gone:
                del self._open[key]  # closed when the last reader lets go of it
            self._order = new + [
                pack for pack in self._order if any(pack is other for other in self._open.values())
            ]

    def _take(self, key: tuple[str, int], path: Path) -> CarFile | None:
        try:
            pack = CarFile(path)
        except SourceFailed:
            # gone meanwhile, or damaged: who asks for its blocks will hear that they are not there
            return None
        if not pack.use_own_index():
            pack.close()
            return None
        self._open[key] = pack
        return pack

    def close(self) -> None:
        with self._lock:
            for pack in self._open.values():
                pack.close()
            self._open, self._order = {}, []


def _key(path: Path) -> tuple[str, int] | None:
    """A pack's name and inode: a pack written anew keeps its name."""
    try:
        return path.name, os.stat(path).st_ino
    except FileNotFoundError:
        return None
