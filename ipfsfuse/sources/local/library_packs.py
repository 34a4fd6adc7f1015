"""The open packs of a library, with what other processes add and remove. All calls block."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.local.car_file import CarFile, CarLocation, Found, Read, read_disk
from ipfsfuse.sources.local.library_folder import pack_names

_UNSETTLED_NS = 50_000_000
"""Two changes within this time may give a folder the same modification time."""


class FolderWatch:
    """Whether a folder has changed since the last call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = -1

    def changed(self) -> bool:
        """True also if the last change is too recent to be sure. Raises OSError."""
        found = os.stat(self._folder).st_mtime_ns
        if found == self._seen:
            return False
        self._seen = found if time.time_ns() - found > _UNSETTLED_NS else -1
        return True


class OpenPacks:
    """All packs in a folder, kept open. New packs are opened, and removed packs are closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watch = FolderWatch(folder)
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], CarFile] = {}
        """By name and inode: a rewritten pack keeps its name."""
        self._order: list[CarFile] = []
        """The order in which packs are searched. The pack of the last block comes first, since it probably
        has the next block too. The list is replaced, never changed."""

    def find(self, multihash: bytes, read: Read = read_disk, *, refresh: bool = True) -> Found | None:
        """Where the block is. Without `refresh`, only packs that are open already are searched.

        Raises SourceFailed if a pack that should have the block is broken and no other has it, and
        BlockingIOError if `read` does."""
        if refresh:
            self.refresh()
        broken: SourceFailed | None = None
        order = self._order
        for pack in order:
            try:
                location: CarLocation | None = pack.find(multihash, read)
            except SourceFailed as exc:
                broken, location = exc, None
            if location is not None:
                if pack is not order[0]:
                    self._order = [pack, *(other for other in order if other is not pack)]
                return Found(pack, location)
        if broken is not None:
            raise broken
        return None

    def refresh(self) -> None:
        """Opens new packs and closes those that were removed."""
        with self._lock:
            try:
                if not self._watch.changed():
                    return
                names = pack_names(self._folder)
            except FileNotFoundError:
                names = set()
            except PermissionError as exc:
                raise SourceFailed(
                    f"the library {self._folder} can't be read: {exc.strerror}; if it was made anew since "
                    "the mount began, mount again",
                    "disk",
                ) from exc
            found: dict[tuple[str, int], Path] = {}
            for name in names:
                with suppress(FileNotFoundError):
                    found[name, os.stat(self._folder / name).st_ino] = self._folder / name
            for key in self._open.keys() - found.keys():
                del self._open[key]  # closed when its last reader is done with it
            new: list[CarFile] = []
            for key in found.keys() - self._open.keys():
                with suppress(SourceFailed):  # removed meanwhile, or damaged: then its blocks are missing
                    pack = CarFile(found[key])
                    if pack.use_own_index():
                        self._open[key] = pack
                        new.append(pack)
            self._order = new + [pack for pack in self._order if pack in self._open.values()]

    def close(self) -> None:
        with self._lock:
            for pack in self._open.values():
                pack.close()
            self._open, self._order = {}, []
