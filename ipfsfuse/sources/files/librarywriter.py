"""One `add` into the library: blocks that it does not have yet go into one new pack, then the roots become
known.

Blocking; a writer is for one thread at a time, several writers and processes at once are safe. It holds the
library's lock shared from its first to its last moment, so that no pack whose blocks it counts on can go.
"""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.files import libraryfolder
from ipfsfuse.sources.files.carwriter import CarWriter
from ipfsfuse.sources.files.libraryfolder import Entry, store_errors
from ipfsfuse.sources.files.packs import Packs

_MAX_REMEMBERED = 200_000
"""Blocks of this add that are known not to be needed again: 20 MB. Forgetting one costs its space, no
more."""


class NewRoot(NamedTuple):
    cid: Cid
    name: str
    size: int
    """Bytes of its DAG."""


class LibraryWriter:
    """Use it as a context manager: what is not committed is gone at its end."""

    def __init__(self, folder: Path, packs: Packs) -> None:
        self._folder = folder
        self._packs = packs
        self._held = ExitStack()
        self._held.enter_context(libraryfolder.lock(folder, exclusive=False))
        packs.refresh()  # what went until now; nothing goes from here on
        self._pack: CarWriter | None = None
        self._path = folder
        self._fd = -1
        self._seen: dict[bytes, None] = {}
        self._used: set[str] = set()

    def __enter__(self) -> "LibraryWriter":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.abort()

    def put(self, cid: Cid, block: bytes) -> bool:
        """Adds a block. False if the library has it already. Raises StoreFailed."""
        multihash = cids.multihash(cid)
        if multihash in self._seen or cids.inline(cid) is not None:
            return False
        found = self._packs.find(multihash)
        if found is not None:
            self._used.add(found.file.name)
        else:
            with store_errors(f"the library {self._folder}"):
                self._writer().add(cid, block)
        self._seen[multihash] = None
        if len(self._seen) > _MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return found is None

    def _writer(self) -> CarWriter:
        if self._pack is None:
            self._path, self._fd = libraryfolder.new_temporary(self._folder)
            self._pack = CarWriter(self._fd, self._folder)
        return self._pack

    def commit(self, roots: Sequence[NewRoot]) -> None:
        """Makes all of it seen by every reader: the pack first, then the roots. Raises StoreFailed, leaving
        nothing new."""
        with store_errors(f"the library {self._folder}"):
            if self._pack is not None:
                self._pack.finish()
                self._pack = None
                final = self._path.with_suffix(libraryfolder.PACK)
                os.rename(self._path, final)
                libraryfolder.sync_folder(self._folder)
                self._used.add(final.name)
            self._write_roots(roots)
        self.abort()

    def _write_roots(self, roots: Sequence[NewRoot]) -> None:
        """All of them, or on an error none that was not there."""
        new: list[Path] = []
        try:
            for root in roots:
                path = libraryfolder.root_path(self._folder, root.cid)
                known = libraryfolder.read_root(path)
                packs = tuple(sorted(self._used.union(known.packs if known else ())))
                if known is None:
                    new.append(path)
                    libraryfolder.write_root(self._folder, Entry(*root, time.time(), packs))
                elif known.packs != packs:
                    libraryfolder.write_root(self._folder, replace(known, packs=packs))
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            raise

    def abort(self) -> None:
        """Leaves the library as it was. Does nothing behind a commit."""
        with self._held:
            if self._pack is not None:
                self._pack.abandon()
                self._pack = None
                self._path.unlink(missing_ok=True)
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
