"""The embedded library: what `ipfsfuse add` put on this machine, as a source and as a thing to list, add to
and clear.

`Library` blocks and may be used by any number of threads and processes at once. `LibrarySource` is a source
as every other: it sees what another process adds or removes with the next call. Layout: `libraryfolder`.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotFound, NotHere, StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Deliver, DeliverBlocks, LeafRange, Subtree, too_large
from ipfsfuse.sources.files import librarycompact, libraryfolder
from ipfsfuse.sources.files.carfile import read_cached, read_disk
from ipfsfuse.sources.files.carstreams import Found, stream_places
from ipfsfuse.sources.files.libraryfolder import Entry, store_errors
from ipfsfuse.sources.files.librarywriter import LibraryWriter
from ipfsfuse.sources.files.packs import FolderWatch, Packs

log = logging.getLogger(__name__)


class Library:
    """A folder of packs and roots, made where there is none. Raises StoreFailed if it isn't ours alone."""

    def __init__(self, folder: Path) -> None:
        libraryfolder.prepare(folder)
        self.folder = folder
        self.packs = Packs(folder)
        self._watch = FolderWatch(folder / "roots")
        self._entries: tuple[Entry, ...] = ()

    def entries(self) -> Sequence[Entry]:
        """All roots, in the order added. One stat where nothing has changed. Raises StoreFailed."""
        with store_errors(f"the library {self.folder}"):
            if self._watch.changed():
                self._entries = tuple(libraryfolder.read_roots(self.folder))
        return self._entries

    def roots(self) -> Sequence[Cid]:
        return [entry.cid for entry in self.entries()]

    def contains(self, multihash: bytes) -> bool:
        return self.packs.find(multihash) is not None

    def block(self, cid: Cid) -> bytes:
        """The unverified block. Raises NotHere, BlockTooLarge, SourceFailed."""
        found = _readable(cid, self.packs.find(cids.multihash(cid)))
        return found.file.read(found.place)

    def open_writer(self) -> LibraryWriter:
        """For one `add`. Raises StoreFailed. Waits while a compaction runs."""
        with store_errors(f"the library {self.folder}"):
            libraryfolder.sweep(self.folder)
        return LibraryWriter(self.folder, self.packs)

    def remove(self, cid: Cid) -> Entry:
        """Removes a root, then gives back what no other root needs, unless something is just being added: the
        next removal does it then. Raises NotFound, StoreFailed."""
        path = libraryfolder.root_path(self.folder, cid)
        entry = libraryfolder.read_root(path)
        if entry is None:
            raise NotFound(f"{cids.text(cid)} is no root of the library: `ipfsfuse library` lists them")
        with store_errors(f"the library {self.folder}"):
            path.unlink(missing_ok=True)
            libraryfolder.sync_folder(path.parent)
        self.tidy(entry.packs)
        return entry

    def compact(self, wait: bool = True, only: Sequence[str] | None = None) -> bool:
        """Gives back the space of what no root reaches, in the packs `only` or in all, and brings small packs
        together. False if the library was busy and `wait` is False. Raises StoreFailed."""
        with (
            store_errors(f"the library {self.folder}"),
            libraryfolder.lock(self.folder, exclusive=True, wait=wait) as held,
        ):
            if not held:
                return False
            libraryfolder.sweep(self.folder)
            entries = libraryfolder.read_roots(self.folder)
            staying = librarycompact.drop_unneeded(self.folder, entries)
            shrinking = sorted(staying if only is None else staying.intersection(only))
            if shrinking:
                librarycompact.rewrite(self.folder, entries, self.packs, shrinking)
            librarycompact.merge_small(self.folder, entries)
        return True

    def tidy(self, packs: Sequence[str] = ()) -> None:
        """Gives back what nobody needs, in the packs named and in what earlier removals had to leave, if that
        can be done now. After an add or a removal, which it can't fail."""
        try:
            self.compact(wait=False, only=packs)
        except StoreFailed as exc:
            log.warning("the library's space was not given back: %s", exc)

    def close(self) -> None:
        self.packs.close()


def _readable(cid: Cid, found: Found | None) -> Found:
    """Raises NotHere, BlockTooLarge."""
    if found is None:
        raise NotHere(f"the library does not have {cids.text(cid)}")
    if found.place.size > cids.MAX_BLOCK:
        raise too_large("library", cid, found.place.size)
    return found


class LibrarySource:
    """The library as a source."""

    name = "library"
    in_place = True

    def __init__(self, library: Library) -> None:
        """`library` is closed with the source."""
        self.library = library

    async def get(self, cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        multihash = cids.multihash(cid)
        if cids.inline(cid) is not None:
            raise NotHere("an identity CID is no block of a source")
        try:
            found = self.library.packs.find(multihash, read_cached)
        except BlockingIOError:
            found = await threads.run_sync(self.library.packs.find, multihash, read_disk)
        found = _readable(cid, found)
        with suppress(BlockingIOError):
            return found.file.read_small(found.place)
        return await threads.run_sync(found.file.read, found.place)

    async def stream(self, run: LeafRange, deliver: Deliver) -> None:
        await stream_places(run, self._find, deliver)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        """Nothing: each block is at hand."""

    def _find(self, cid: Cid) -> Found | None:
        return self.library.packs.find(cids.multihash(cid))

    def roots(self) -> Sequence[Cid]:
        try:
            return self.library.roots()
        except StoreFailed:  # the folder is gone, and all that was in it
            return ()

    async def aclose(self) -> None:
        await threads.run_sync(self.library.close)
