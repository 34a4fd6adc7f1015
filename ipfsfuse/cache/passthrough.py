"""Decides which staging files the kernel may read itself (FUSE passthrough), and protects them meanwhile.

A complete staging file is verified as a whole in the background, once in the daemon's life. From then on the
disk is trusted for it, unless the file was written to: each time it is opened, its inode number, size and
times are compared.

While the kernel reads a file, it is protected: it counts in the budget, ARC does not evict it, and no holes
are punched in it. If a user evicts it, its name is removed, and its space counts until the last reader has
gone. A mapping (mmap(2)) of the staging file can outlive the last release of the FUSE file, and the kernel
does not tell when it ends. So a file stays protected until the kernel grants a lease on it.

Concurrency: on the event loop. Files are verified one after the other, in one thread at a time.
"""

import logging
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.fsck import leaves_of
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.store.staging import StagingEntry, is_free
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.fileio import threads

log = logging.getLogger(__name__)

MAX_PASSED_FILES = 1000
"""Files that are open or mapped at a time. Further files are read through the daemon."""
OPEN_PART = 2
"""The part of the budget, as a divisor, that these files may take. The rest is for what is read next."""
HASHED_TOGETHER = 4 << 20
"""Bytes that one call in a thread reads and hashes while a file is verified."""
VERIFY_TRIES = 2
"""How often a file is verified in a row if it changes meanwhile or has a wrong leaf."""
MAPPED_CHECK_SECONDS = 1.0
"""Seconds between two checks whether closed files are still mapped."""


@dataclass(frozen=True, slots=True)
class PassthroughStatus:
    """For `status`."""

    trust: str
    """A sentence that says what is trusted."""
    verified: int
    """Staging files that were verified as a whole since the mount began, and still exist."""
    waiting: int
    """Files that are waiting to be verified or are being verified."""
    open: int
    """Files that the kernel reads itself now."""
    mapped: int
    """Files that were closed and are still mapped."""
    lingering: int
    """Bytes on disk of evicted files that the kernel still reads."""


class PassthroughFiles:
    def __init__(self, store: Store, reader: Reader) -> None:
        self._store, self._reader = store, reader
        self._waiting: dict[StagingEntry, None] = {}
        self._verifying = False
        self._wake = trio.Event()
        self._open: dict[StagingEntry, int] = {}
        """The descriptors of files that the kernel reads itself."""
        self._mapped: dict[StagingEntry, int] = {}
        """The descriptors of files that were closed, and may be mapped."""
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
        """Opens a file without a name in the folder of staging files, and checks that the kernel grants
        leases on it. Raises OSError."""
        file = os.open(self._store.staging.path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            is_free(file)
        except OSError:
            os.close(file)
            raise
        return file

    # -- verifying -------------------------------------------------------------------------------------------

    def consider(self, cid: Cid) -> None:
        """Called when `cid` was opened and the kernel could not read it itself. If it is complete, it is
        verified, so that the kernel can next time."""
        entry = self._store.staging.find(cids.canonical(cid))
        if entry is not None and entry.complete and not entry.verified:
            self.verify_later(entry)

    def verify_later(self, entry: StagingEntry) -> None:
        self._waiting[entry] = None
        self._wake.set()

    async def run(self) -> None:
        """Verifies files, until it is cancelled."""
        while True:
            with trio.move_on_after(MAPPED_CHECK_SECONDS if self._mapped else float("inf")):
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

    async def _verify(self, entry: StagingEntry) -> None:
        """Verifies a file. A wrong or missing leaf is fetched again, and then the file is verified once
        more."""
        staging, file = self._store.staging, FileRef(entry.cid, entry.size)
        for _ in range(VERIFY_TRIES):
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

    def open(self, cid: Cid) -> tuple[StagingEntry, int] | None:
        """The staging file of `cid`, and a descriptor of it, if it was verified as a whole and there is room
        to protect it. The caller calls `close` at the end."""
        entry = self._store.staging.find(cids.canonical(cid))
        if entry is None or not entry.verified or entry in self._open:
            return None
        budget = self._store.budget
        if not entry.read_by_kernel and (
            len(self._open) + len(self._mapped) >= MAX_PASSED_FILES
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

    def close(self, entry: StagingEntry) -> None:
        """The kernel has released the file for the last time."""
        self._mapped[entry] = self._open.pop(entry)
        self._look_at_mapped()
        self._wake.set()

    def _look_at_mapped(self) -> None:
        for entry, file in list(self._mapped.items()):
            if entry.dead or is_free(file):  # the store itself watches evicted ones
                os.close(file)
                del self._mapped[entry]
                entry.read_by_kernel = False
                if not entry.dead:
                    self._store.budget.unprotect(entry.cid)

    def close_all(self) -> None:
        """Called when the mount is gone."""
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
