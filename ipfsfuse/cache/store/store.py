"""The store: what is on disk, within the budget, behind two verbs for blocks (`blockstore`) and two for
leaves.

What can't be read is not there, what can't be written is not kept, and `backoff` says why. Whatever is given
was hashed after it was read. Concurrency: the event loop's; files are read, hashed and written in worker
threads.
"""

import logging
from collections.abc import Sequence
from typing import TypeVar

from ipfsfuse.cache import clock
from ipfsfuse.cache.base import Content, FileRef
from ipfsfuse.cache.store.blockstore import BlockStore
from ipfsfuse.cache.store.staging import Entry, Extents, Removed
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import current_request

T = TypeVar("T")

log = logging.getLogger(__name__)

NOTE_USE = 60.0
"""Seconds between two notes on disk of one file's use."""


class Store(BlockStore):
    """Blocks, and leaves of files."""

    async def has_leaf(self, file: FileRef, leaf: Leaf) -> bool:
        """Whether it seems to be there: only its hash will tell."""
        entry = await self._entry(file.cid)
        return (
            entry is not None
            and entry.extents is not None
            and entry.extents.covers(leaf.offset, leaf.offset + leaf.size)
        )

    async def leaf(self, file: FileRef, leaf: Leaf) -> bytes | None:
        """The leaf's content, hashed after it was read; None where it is not there or not right (then it is
        given up)."""
        if not await self.has_leaf(file, leaf):
            return None
        entry = self.staging.entries.get(file.cid)
        if entry is None:
            return None
        try:
            data, right = await threads.run_sync(self.staging.read, entry, leaf, limiter=self.reading)
        except OSError as exc:
            await self._lost(entry, exc)
            return None
        return await self._looked_at(entry, leaf, data, right)

    async def leaves(self, file: FileRef, leaves: Sequence[Leaf]) -> Sequence[memoryview | None]:
        """As `leaf`, of leaves that lie one behind the other, at least one."""
        entry = await self._entry(file.cid)
        if (
            entry is None
            or entry.extents is None
            or not entry.extents.covers(leaves[0].offset, leaves[-1].offset + leaves[-1].size)
        ):
            return [None] * len(leaves)
        try:
            found = await threads.run_sync(self.staging.read_each, entry, leaves, limiter=self.reading)
        except OSError as exc:
            await self._lost(entry, exc)
            return [None] * len(leaves)
        return [await self._looked_at(entry, leaf, *each) for leaf, each in zip(leaves, found, strict=True)]

    async def _looked_at(self, entry: Entry, leaf: Leaf, data: T, right: bool) -> T | None:
        """What was read of a leaf, if that is right."""
        if right:
            self.budget.arc.refresh(entry.cid)
            self._proved(entry, leaf.offset, leaf.offset + leaf.size)
            return data
        if not entry.dead:
            await self._set_aside(entry, leaf)
        return None

    async def _entry(self, cid: Cid) -> Entry | None:
        """The live entry of `cid`, with its extents known."""
        entry = self.staging.entries.get(cid)
        if entry is not None and entry.extents is None:
            try:
                found = await threads.run_sync(self.staging.look, entry, limiter=self.reading)
            except OSError as exc:
                await self._lost(entry, exc)
                return None
            if entry.extents is None:
                entry.extents, entry.proved = found, Extents()
        return entry if entry is not None and not entry.dead else None

    async def _set_aside(self, entry: Entry, leaf: Leaf) -> None:
        """A leaf that is not what its CID says: its space is given back."""
        if entry.fresh or entry.complete:  # else a crash may well have cut it short
            log.warning("%s: wrong bytes in the cache at %d, set aside", cids.text(entry.cid), leaf.offset)
        if entry.extents is not None:
            entry.extents.remove(leaf.offset, leaf.offset + leaf.size)
        if entry.proved is not None:
            entry.proved.remove(leaf.offset, leaf.offset + leaf.size)
        try:
            end = leaf.offset + leaf.size
            entry.disk += await threads.run_sync(
                self.staging.punch, entry, leaf.offset, end, limiter=self.writing
            )
        except OSError as exc:
            self.backoff.failed(cids.text(entry.cid), exc)
        self._settle(entry)

    async def _lost(self, entry: Entry, error: OSError) -> None:
        """A staging file that can't be read: it is there no more."""
        if not entry.dead:
            self.backoff.failed(str(self.staging.path / cids.text(entry.cid)), error)
            await self.budget.evict(entry.cid)

    async def keep_leaf(self, file: FileRef, leaf: Leaf, content: Content, source: str) -> bool:
        """Whether it is kept now."""
        return await self.keep_leaves(file, [leaf], [content], source)

    async def keep_leaves(
        self, file: FileRef, leaves: Sequence[Leaf], contents: Sequence[Content], source: str
    ) -> bool:
        """Whether leaves that lie one behind the other, at least one, are kept now."""
        if self.backoff.waiting:
            return False
        start, end = leaves[0].offset, leaves[-1].offset + leaves[-1].size
        cost = self.staging.cost(start, end)
        if not await self.budget.reserve(file.cid, cost):
            return False
        if file.cid not in self.staging.entries:
            self.pins.add(file.cid)
        entry = self.staging.entry(file.cid, file.size)
        entry.reserved += cost
        entry.charged += cost
        entry.source = source
        try:
            grown, error = await threads.run_sync(
                self.staging.write, entry, start, contents, limiter=self.writing
            )
        except Removed:
            return False
        else:
            entry.disk += grown
            return self._kept(entry, start, end, error)
        finally:
            entry.reserved -= cost
            self.budget.settle(cost)
            self._settle(entry)

    def _kept(self, entry: Entry, start: int, end: int, error: OSError | None) -> bool:
        """What a write came to."""
        if error is not None:
            self.backoff.failed(str(self.staging.path / cids.text(entry.cid)), error)
            self.budget.look_soon()
            return False
        self.backoff.succeeded()
        if entry.extents is not None:
            entry.extents.add(start, end)
            self._proved(entry, start, end)
        return True

    def _proved(self, entry: Entry, start: int, end: int) -> None:
        """The leaves in [start, end) were written or found right: the last one gives a file its name."""
        if not entry.complete and entry.proved is not None:
            entry.proved.add(start, end)
            if entry.all_proved() and not self.backoff.waiting:
                self.nursery.start_soon(self.finish, entry)

    def _settle(self, entry: Entry) -> None:
        if entry.dead:
            return
        empty = not entry.disk and not entry.reserved
        charge = 0 if empty else self.staging.charge(entry)
        self.budget.adjust(entry.cid, charge - entry.charged)
        entry.charged = charge
        if empty:
            self.staging.forget(entry)

    async def finish(self, entry: Entry) -> None:
        """Gives a whole file its final name, once it is on the disk."""
        try:
            entry.disk += await threads.run_sync(self.staging.finish, entry, limiter=self.upkeep)
        except OSError as exc:
            if not entry.dead:
                self.backoff.failed(cids.text(entry.cid), exc)
        self._settle(entry)

    def note_use(self, file: FileRef) -> None:
        """A new use of a file. Its time is written to the disk now and then."""
        entry = self.staging.entries.get(file.cid)
        if entry is None:
            return
        self.budget.arc.use(file.cid, current_request().caller)
        entry.last_used = clock.now()
        if entry.last_used - entry.noted > NOTE_USE:
            entry.noted = entry.last_used
            self.nursery.start_soon(self._note_use, entry)

    async def _note_use(self, entry: Entry) -> None:
        try:
            await threads.run_sync(self.staging.note_use, entry, limiter=self.upkeep)
        except OSError:  # read-only, or gone: then its order after a restart is a little off
            pass
