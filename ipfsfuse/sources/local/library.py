"""The library on this machine: what `ipfsfuse add` stored. It can be read, listed and changed.

All calls block. Any number of threads and processes may use a library at once. The next call notices what
another process added or removed.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotFound, SourceFailed, StoreFailed
from ipfsfuse.fileio.files import Closing, write_all
from ipfsfuse.sources.local.car_file import CarFile, CarLocation, Found, Read, read_disk, readable
from ipfsfuse.sources.local.car_writer import CarWriter, SequentialWriter
from ipfsfuse.sources.local.library_compaction import compact
from ipfsfuse.sources.local.library_folder import (
    CAR_SUFFIX,
    LibraryEntry,
    lock,
    new_temporary,
    pack_names,
    prepare,
    read_root,
    read_roots,
    root_path,
    store_errors,
    sweep,
    sync_folder,
    write_root,
)
from ipfsfuse.structures import Buffer

log = logging.getLogger(__name__)

# -- packs, and what other processes add and remove ---------------------------------------------------------

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


# -- adding --------------------------------------------------------------------------------------------------

_MAX_REMEMBERED = 200_000
"""Blocks of this add that are remembered, in 20 MB: they are not written twice. If one is forgotten, a second
copy may take space."""


class NewRoot(NamedTuple):
    cid: Cid
    name: str
    size: int
    """Bytes of its DAG."""


PACK_CHECK_SECONDS = 0.02
"""How late an add notices blocks that another process added."""


class LibraryWriter:
    """A context manager. Blocks that are not committed at its end are dropped."""

    def __init__(self, folder: Path, packs: OpenPacks) -> None:
        self._folder = folder
        self._packs = packs
        self._held = ExitStack()
        self._held.enter_context(lock(folder, exclusive=False))
        packs.refresh()  # under the lock: from here on no pack is removed
        self._pack: CarWriter | None = None
        self._path = folder
        self._looked = time.monotonic()
        self._seen: dict[bytes, None] = {}
        self._used: set[str] = set()

    def __enter__(self) -> "LibraryWriter":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.abort()

    def put(self, cid: Cid, block: Buffer) -> bool:
        """Adds a block. False if the library has it already. A damaged copy in the library is repaired.

        Raises StoreFailed."""
        multihash = cids.multihash(cid)
        if multihash in self._seen or cids.inline_block(cid) is not None:
            return False
        # no pack is removed meanwhile; a block that another process has just added may be stored twice
        look = time.monotonic() - self._looked >= PACK_CHECK_SECONDS
        if look:
            self._looked = time.monotonic()
        found = self._found(multihash, block, look)
        if found is not None:
            self._used.add(found.file.name)
        else:
            with store_errors(f"the library {self._folder}"):
                if self._pack is None:
                    self._path, fd = new_temporary(self._folder)
                    out = SequentialWriter(self._held.enter_context(Closing(fd)))
                    self._pack = CarWriter(out, self._folder)
                self._pack.add(cid, block)
        self._seen[multihash] = None
        if len(self._seen) > _MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return found is None

    def _found(self, multihash: bytes, block: Buffer, refresh: bool) -> Found | None:
        """Where the block is in a pack. Repairs wrong bytes there. None if no pack has the block, or the copy
        can't be used."""
        try:
            found = self._packs.find(multihash, refresh=refresh)
            if found is None or found.file.read(found.location) == block:
                return found
        except SourceFailed:
            return None
        if found.location.size != len(block):
            return None
        path, at = found.file.path, found.location.offset
        with (
            store_errors(f"the library {self._folder}"),
            # no process replaces a pack meanwhile: this one holds the lock
            Closing(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd,
        ):
            write_all(fd, block, at)
            os.fsync(fd)
        log.warning("%s had wrong bytes at %d, and has the right ones now", path, at)
        return found

    def commit(self, roots: Sequence[NewRoot]) -> None:
        """Adds the pack, then the roots, to the library. Raises StoreFailed; then the library has no new
        root."""
        with store_errors(f"the library {self._folder}"):
            if self._pack is not None:
                self._pack.finish()
                self._pack = None
                final = self._path.with_suffix(CAR_SUFFIX)
                os.rename(self._path, final)
                sync_folder(self._folder)
                self._used.add(final.name)
            self._write_roots(roots)
        self.abort()

    def _write_roots(self, roots: Sequence[NewRoot]) -> None:
        """Writes all roots. On an error, removes those that are new."""
        there = pack_names(self._folder)  # missing packs are not needed: all blocks of the roots were put
        new: list[Path] = []
        try:
            for root in roots:
                path = root_path(self._folder, root.cid)
                known = read_root(path)
                packs = tuple(sorted(self._used.union(there.intersection(known.packs) if known else ())))
                if known is None:
                    if not os.path.lexists(path):  # a damaged file stays: while it exists, no pack is removed
                        new.append(path)
                    write_root(self._folder, LibraryEntry(*root, time.time(), packs))
                elif known.packs != packs:
                    write_root(self._folder, replace(known, packs=packs))
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            raise

    def abort(self) -> None:
        """Leaves the library as it was. Does nothing after a commit."""
        with self._held:
            if self._pack is not None:
                self._pack.abandon()
                self._pack = None
                self._path.unlink(missing_ok=True)


# -- the library ---------------------------------------------------------------------------------------------


class Library:
    """A folder of packs and roots. Makes it if it is missing. Raises StoreFailed if others can change it."""

    def __init__(self, folder: Path) -> None:
        prepare(folder)
        self.folder = folder
        self.packs = OpenPacks(folder)
        self._watch = FolderWatch(folder / "roots")
        self._entries: tuple[LibraryEntry, ...] = ()

    def entries(self) -> Sequence[LibraryEntry]:
        """All roots, in the order added. Costs one stat if nothing has changed. Raises StoreFailed."""
        with store_errors(f"the library {self.folder}"):
            if self._watch.changed():
                self._entries = tuple(read_roots(self.folder))
        return self._entries

    def roots(self) -> Sequence[Cid]:
        return [entry.cid for entry in self.entries()]

    def block(self, cid: Cid) -> bytes:
        """The unverified block. Raises NotHere, BlockTooLarge, SourceFailed."""
        found = readable("library", cid, self.packs.find(cids.multihash(cid)))
        return found.file.read(found.location)

    def open_writer(self) -> LibraryWriter:
        """A writer for one `add`. Waits while a compaction runs. Raises StoreFailed."""
        with store_errors(f"the library {self.folder}"):
            sweep(self.folder)
        return LibraryWriter(self.folder, self.packs)

    def remove(self, cid: Cid) -> LibraryEntry:
        """Removes a root, and frees the space that no other root needs. While something is being added, that
        is left to the next removal. Raises NotFound, StoreFailed."""
        path = root_path(self.folder, cid)
        entry = read_root(path)
        if entry is None:
            raise NotFound(f"{cids.text(cid)} is not a root of the library: `ipfsfuse library` lists them")
        with store_errors(f"the library {self.folder}"):
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        self.tidy(entry.packs)
        return entry

    def compact(self, wait: bool = True, only: Sequence[str] | None = None) -> bool:
        """Frees the space of blocks that no root reaches, in the packs `only` or in all, and merges small
        packs. False if the library was busy and `wait` is False. Raises StoreFailed."""
        with (
            store_errors(f"the library {self.folder}"),
            lock(self.folder, exclusive=True, wait=wait) as held,
        ):
            if held:
                sweep(self.folder)
                compact(self.folder, self.packs.find, only)
            return held

    def tidy(self, packs: Sequence[str] = ()) -> None:
        """Frees the space that no root needs, in the `packs` and in packs that no root names, unless the
        library is busy. Called after an add or a removal: a failure is only logged."""
        try:
            self.compact(wait=False, only=packs)
        except StoreFailed as exc:
            log.warning("the library's space was not given back: %s", exc)

    def close(self) -> None:
        self.packs.close()
