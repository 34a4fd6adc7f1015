"""Which staging files the kernel may read itself (FUSE passthrough), and what that asks of the store.

A complete staging file is verified whole, once in the daemon's life, in the background. From then on the disk
is trusted for it, as long as nobody has written to the file: its inode number, size and times are compared
each time it is opened.

While the kernel reads it, a file is protected: it counts in the budget, ARC does not choose it, and nothing
of it is punched out. A user who evicts it takes its name; its space counts until the last reader has gone. A
mapping (mmap(2)) of the backing file lives longer than the last release of the FUSE file, and nobody tells of
its end. So a file is protected until the kernel grants a lease on it.

Concurrency: the event loop's. Files are verified one after another, by a thread at a time.
"""

import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.fsck import leaves_of
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.store.staging import Entry, is_free
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.fileio import threads

log = logging.getLogger(__name__)

MAX_OPEN = 1000
"""Files that are open at once, the mapped ones included. Any more are read through the daemon."""
OPEN_PART = 2
"""The part of the budget, as a divisor, that may be open at once: the rest is left to what is read next."""
HASHED_TOGETHER = 4 << 20
"""Bytes that are read and hashed by one thread hop while a file is verified."""
TRIES = 2
"""How often a file is read whole in a row that was changed meanwhile, or had a leaf that was wrong."""
LOOK_SECONDS = 1.0
"""Between two looks whether closed files are still mapped."""


@dataclass(frozen=True, slots=True)
class PassthroughStatus:
    """For `status`."""

    trust: str
    """What is trusted, in words."""
    verified: int
    """Staging files that were verified whole since the mount began, and are there."""
    waiting: int
    """Files that are still to be verified, the one that is being verified included."""
    open: int
    """Files that the kernel reads itself now."""
    mapped: int
    """Files that were closed and are still mapped."""
    lingering: int
    """Bytes on disk of what was evicted while the kernel still reads it."""


class PassthroughFiles:
    def __init__(self, store: Store, reader: Reader) -> None:
        self._store, self._reader = store, reader
        self._waiting: dict[Entry, None] = {}
        self._verifying = False
        self._wake = trio.Event()
        self._open: dict[Entry, int] = {}
        """Their descriptors."""
        self._mapped: dict[Entry, int] = {}
        """The same, of files that have no reader that we know of."""
        store.completed = self.verify_later

    def status(self) -> PassthroughStatus:
        return PassthroughStatus(
            "the kernel reads a staging file that was verified whole: the disk is trusted while it is open",
            sum(entry.verified for entry in self._store.staging.entries.values()),
            len(self._waiting) + self._verifying,
            len(self._open),
            len(self._mapped),
            self._store.lingering,
        )

    def check_place(self) -> int:
        """A file in the folder of staging files that has no name, open for reading, on which the kernel
        grants leases. Raises OSError."""
        file = os.open(self._store.staging.path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            is_free(file)
        except OSError:
            os.close(file)
            raise
        return file

    # -- verifying -------------------------------------------------------------------------------------------

    def consider(self, cid: Cid) -> None:
        """`cid` was opened, and the kernel could not read it: if it is complete, it may the next time."""
        entry = self._store.staging.find(cids.canonical(cid))
        if entry is not None and entry.complete and not entry.verified:
            self.verify_later(entry)

    def verify_later(self, entry: Entry) -> None:
        self._waiting[entry] = None
        self._wake.set()

    async def run(self) -> None:
        """For as long as the mount serves."""
        while True:
            with trio.move_on_after(LOOK_SECONDS if self._mapped else float("inf")):
                await self._wake.wait()
            self._wake = trio.Event()
            self._look_at_mapped()
            while self._waiting:
                entry = next(iter(self._waiting))
                del self._waiting[entry]
                self._verifying = True
                try:
                    await self._verify(entry)
                except (IpfsFuseError, OSError) as exc:
                    log.debug("%s can't be verified whole: %s", cids.text(entry.cid), exc)
                finally:
                    self._verifying = False
                self._look_at_mapped()

    async def _verify(self, entry: Entry) -> None:
        """A leaf that is wrong or was set aside is fetched again. Then all of the file is read once more."""
        staging, file = self._store.staging, FileRef(entry.cid, entry.size)
        for _ in range(TRIES):
            if entry.dead or not entry.complete or entry.verified:
                return
            entry.stamp = await threads.run_sync(staging.stamp, entry, limiter=self._store.io.reading)
            at = 0
            async for leaves in _together(leaves_of(self._reader, entry)):
                for leaf, found in zip(leaves, await self._store.leaves(file, leaves), strict=True):
                    if found is None:
                        await self._reader.leaf(file, leaf)
                at = leaves[-1].offset + leaves[-1].size
            now = await threads.run_sync(staging.stamp, entry, limiter=self._store.io.reading)
            entry.verified = at == entry.size and now == entry.stamp and entry.whole() and not entry.dead

    # -- read by the kernel ----------------------------------------------------------------------------------

    def open(self, cid: Cid) -> tuple[Entry, int] | None:
        """The staging file of `cid`, and a descriptor of it, if all of it was verified and there is room to
        protect it. The caller closes it."""
        entry = self._store.staging.find(cids.canonical(cid))
        if entry is None or not entry.verified or entry in self._open:
            return None
        budget = self._store.budget
        if not entry.read_by_kernel and (
            len(self._open) + len(self._mapped) >= MAX_OPEN
            or budget.protected_bytes + budget.size(entry.cid) > budget.limit // OPEN_PART
        ):
            return None
        try:
            file = self._store.staging.open_verified(entry)
        except OSError:  # a read through the daemon reports it
            file = None
        if file is None:
            entry.verified = False
            return None
        if entry in self._mapped:
            os.close(self._mapped.pop(entry))
        entry.read_by_kernel = True
        budget.protect(entry.cid)
        self._open[entry] = file
        return entry, file

    def close(self, entry: Entry) -> None:
        """The kernel has released it for the last time."""
        self._mapped[entry] = self._open.pop(entry)
        self._look_at_mapped()
        self._wake.set()

    def _look_at_mapped(self) -> None:
        for entry, file in list(self._mapped.items()):
            if entry.dead or is_free(file):  # one that has left is looked at by the store
                os.close(file)
                del self._mapped[entry]
                entry.read_by_kernel = False
                if not entry.dead:
                    self._store.budget.unprotect(entry.cid)

    def close_all(self) -> None:
        """When the mount is gone."""
        for entry, file in [*self._open.items(), *self._mapped.items()]:
            os.close(file)
            if not entry.dead:
                self._store.budget.unprotect(entry.cid)
        self._open.clear()
        self._mapped.clear()


async def _together(leaves: AsyncIterator[Leaf]) -> AsyncIterator[Sequence[Leaf]]:
    """`leaves` in groups of about HASHED_TOGETHER bytes."""
    group: list[Leaf] = []
    size = 0
    async for leaf in leaves:
        group.append(leaf)
        size += leaf.size
        if size >= HASHED_TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group
