"""The store: what lies on the disk, within the budget. Leaves of files go into staging files here, and
blocks in packs (`packs.BlockStore`).

What can't be read is not there, what can't be written is not stored, and `backoff` says why. Whatever is
given was hashed after it was read. Concurrency: the event loop's; files are read, hashed and written in
worker threads."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from ipfsfuse.cache.base import CacheItem, Content, FileRef, LeafPart, NoPins, Pieces, Pins
from ipfsfuse.cache.budget import Budget, FreeSpace, Key, WriteBackoff, disk_usage
from ipfsfuse.cache.store import staging
from ipfsfuse.cache.store.folder import INDEX, PACKS, PINNED, STAGING
from ipfsfuse.cache.store.index import Index
from ipfsfuse.cache.store.packs import BlockStore, IoLimits, Packs
from ipfsfuse.cache.store.records import PinRecord, PinRecords
from ipfsfuse.cache.store.staging import PIECE, Entry, Extents, Removed, Staging, is_free
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import current_request
from ipfsfuse.structures import Lru

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

MAX_PACKED = 64 << 10
"""Files of up to so many bytes lie in packs."""
NOTE_USE = 60.0
"""Seconds between two notes on disk of one file's use."""
MAX_TAGS = 16 << 20
"""Bytes of tags that are kept in memory: those of 7 GiB in leaves of 1 MiB."""
LOOP_PIECES = 8
"""Pieces that are read from the page cache and hashed on the event loop: some 15 us."""
TAGS_OVERHEAD = 300
"""Bytes of memory that one leaf's tags take besides themselves."""
LISTED_TOGETHER = 500
"""Staging files that are listed before other calls have their turn: some milliseconds."""


class Store:
    """Staging files, and the blocks in packs (`blocks`)."""

    def __init__(
        self,
        folder: Path,
        budget: int,
        nursery: trio.Nursery,
        pins: Pins | None = None,
        reserve: int | None = None,
    ) -> None:
        """`budget` and `reserve` in bytes; see `FreeSpace`. Raises StoreFailed or OSError where the folder
        can't be used at all."""
        self.folder = folder
        self.nursery = nursery
        self.pins: Pins = pins or NoPins()
        self.space = FreeSpace(folder, reserve)
        self.small_budget = min(budget, self.space.total or budget)
        """What the sizes of packs, of the index's write-ahead log and of its margin are derived from."""
        self.budget = Budget(budget, self._evict, self.space.spare)
        self.backoff = WriteBackoff()
        self.io = IoLimits()
        with contextlib.ExitStack() as opened:
            self.staging = Staging(folder / STAGING)
            opened.callback(self.staging.folder.close)
            self.budget.unit = self.staging.unit
            self.pin_records = PinRecords(folder / PINNED)
            opened.callback(self.pin_records.folder.close)
            index = Index(folder / INDEX, self.small_budget, self.pin_records.take_over)
            opened.callback(index.close)
            packs = Packs(folder / PACKS, index, max(MAX_PACKED, min(1 << 20, self.small_budget // 64)))
            opened.pop_all()
        self.pinned: dict[Cid, PinRecord] = {}
        """What was pinned when the store was opened."""
        self.order_until: float | None = None
        """The latest use, in seconds since 1970, that the index has of what an earlier run left; None where
        it does not have all of them."""
        self.blocks = BlockStore(packs, index, self.budget, self.backoff, self.io, self.staging.unit)
        self._full = False
        self.arriving: Counter[Cid] = Counter()
        """What readers have already, and what is still being staged: it counts as here."""
        self.completed: Callable[[Entry], None] = lambda _entry: None
        """Called when a staging file got its final name."""
        self._lingering: dict[int, int] = {}
        """Bytes of files that have left while the kernel still reads them for others, by descriptor."""
        self._tags: Lru[Cid, bytes] = Lru(MAX_TAGS)
        """Those of the pieces of leaves that were verified, by the CIDs of the leaves."""

    # -- leaves ----------------------------------------------------------------------------------------------

    async def has_leaf(self, file: FileRef, leaf: Leaf) -> bool:
        """Whether it seems to be there: only its hash will tell."""
        return await self._entry_with(file, leaf.offset, leaf.offset + leaf.size) is not None

    async def leaf(self, file: FileRef, leaf: Leaf) -> bytes | None:
        """The leaf's content, hashed after it was read; None where it is not there or not right (then it is
        given up)."""
        entry = await self._entry_with(file, leaf.offset, leaf.offset + leaf.size)
        if entry is None or (found := await self._read(self.staging.read, entry, leaf)) is None:
            return None
        data, right, tags = found
        if right:
            self._tags.put(leaf.cid, tags, len(tags) + TAGS_OVERHEAD)
        return await self._looked_at(entry, leaf, data, right)

    async def part(self, file: FileRef, leaf: Leaf, start: int, stop: int) -> LeafPart | None:
        """The bytes [start, stop) of the leaf, if they can be proved without the rest of it: it was verified
        before. None where that is not so, or they are not right."""
        pieces, entry = self.pieces(file, leaf), self.staging.find(file.cid)
        if pieces is None or entry is None:
            return None
        data, arguments = None, (entry, leaf, start, stop, pieces.tags)
        try:
            if stop - start <= LOOP_PIECES * PIECE:  # what is in the page cache costs less than a thread
                data = self.staging.read_pieces(*arguments, os.RWF_NOWAIT)
            if data is None:
                data = await threads.run_sync(
                    self.staging.read_pieces, *arguments, 0, limiter=self.io.reading
                )
        except OSError:  # a read of the whole leaf reports it
            return None
        if data is None:
            return None
        self.budget.arc.refresh(entry.cid)
        if stop - start == leaf.size:  # another file may have verified the leaf, and not this one
            self._proved(entry, leaf.offset, leaf.offset + leaf.size)
        return LeafPart(data, pieces)

    def pieces(self, file: FileRef, leaf: Leaf) -> Pieces | None:
        """How a leaf that is staged and was verified may be read without us; None for any other."""
        entry, tags = self.staging.find(file.cid), self._tags.get(leaf.cid)
        if tags is None or entry is None or entry.dead or entry.extents is None:
            return None
        if not entry.extents.covers(leaf.offset, leaf.offset + leaf.size):
            return None
        return Pieces(*self.staging.place(entry), tags)

    async def leaves(self, file: FileRef, leaves: Sequence[Leaf]) -> Sequence[memoryview | None]:
        """Reads leaves that follow each other without a gap, at least one. Gives None for a leaf that is
        not staged or not right."""
        entry = await self._entry_with(file, leaves[0].offset, leaves[-1].offset + leaves[-1].size)
        if entry is None or (found := await self._read(self.staging.read_each, entry, leaves)) is None:
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

    async def _entry_with(self, file: FileRef, start: int, end: int) -> Entry | None:
        """The live entry of `file`, if [start, end) seems to be there."""
        entry = self.staging.find(file.cid)
        if entry is None:
            return None
        if entry.extents is None:
            found = await self._read(self.staging.look, entry)
            if found is None:
                return None
            if entry.extents is None:
                entry.extents, entry.proved = found, Extents()
        return entry if not entry.dead and entry.extents.covers(start, end) else None

    async def _set_aside(self, entry: Entry, leaf: Leaf) -> None:
        """A leaf that is not what its CID says: its space is given back."""
        entry.verified = False
        if entry.fresh or entry.complete:  # else a crash may well have cut it short
            log.warning("%s: wrong bytes in the cache at %d, set aside", cids.text(entry.cid), leaf.offset)
        if entry.extents is not None:
            entry.extents.remove(leaf.offset, leaf.offset + leaf.size)
        if entry.proved is not None:
            entry.proved.remove(leaf.offset, leaf.offset + leaf.size)
        try:
            end = leaf.offset + leaf.size
            entry.disk += await threads.run_sync(
                self.staging.punch, entry, leaf.offset, end, limiter=self.io.writing
            )
        except OSError as exc:
            self.backoff.failed(cids.text(entry.cid), exc)
        if entry.disk or entry.reserved or entry.dead:
            self._settle(entry)
        else:  # nothing is left of it: the name goes too, before the leaves come back under another
            await self.budget.evict(entry.cid)

    async def _read(self, read: Callable[[Entry, *Ts], T], entry: Entry, *arguments: *Ts) -> T | None:
        """What `read` gives, in a thread; None where the file can't be read."""
        try:
            return await threads.run_sync(read, entry, *arguments, limiter=self.io.reading)
        except OSError as exc:
            await self._lost(entry, exc)
            return None

    async def _lost(self, entry: Entry, error: OSError) -> None:
        """A staging file that can't be read: it is there no more. If somebody has removed it, the disk may
        well be right, and the next write tells."""
        if not entry.dead:
            path = self.staging.path / cids.text(entry.cid)
            if isinstance(error, FileNotFoundError):
                log.info("%s was removed by somebody: what is read of it is fetched again", path)
            else:
                self.backoff.failed(str(path), error)
            await self.budget.evict(entry.cid)

    async def put_leaves(
        self, file: FileRef, leaves: Sequence[Leaf], contents: Sequence[Content], source: str
    ) -> bool:
        """Whether leaves that lie one behind the other, at least one, are staged now."""
        start, end = leaves[0].offset, leaves[-1].offset + leaves[-1].size
        async with self._writing(file, start, end, source) as entry:
            if entry is None:
                return False
            try:
                grown, error = await threads.run_sync(
                    self.staging.write, entry, start, contents, limiter=self.io.writing
                )
            except Removed:
                return False
            entry.disk += grown
            if error is not None:
                if file.size < self.staging.too_large:
                    self.backoff.failed(str(self.staging.path / cids.text(entry.cid)), error)
                    self.budget.look_soon()
                return False
            if self.backoff.reason:
                self.backoff.succeeded()
            if entry.extents is not None:
                entry.extents.add(start, end)
                self._proved(entry, start, end)
            return True

    @asynccontextmanager
    async def _writing(self, file: FileRef, start: int, end: int, source: str) -> AsyncIterator[Entry | None]:
        """The entry of `file`, with room in the budget for a write of [start, end); None where there is
        none."""
        cost = 0
        if not (self.backoff.reason and self.backoff.waiting) and file.size < self.staging.too_large:
            cost = await self.budget.reserve(file.cid, start, end)
        if not cost:
            yield None
            return
        entry = self.staging.entries.get(file.cid)
        if entry is None:
            if self.pins.anywhere:
                self.pins.add(file.cid)
            entry = Entry(file.cid, file.size, extents=(there := Extents()), proved=there)
            self.staging.entries[file.cid] = entry
        entry.reserved += cost
        entry.charged += cost
        entry.source = source
        try:
            yield entry
        finally:
            self._settle(entry, cost)

    async def clone_leaves(
        self, file: FileRef, leaves: Sequence[Leaf], files: Sequence[str], source: str
    ) -> Sequence[memoryview]:
        """Stages leaves that lie one behind the other, at least one, by sharing the extents of `files`, which
        may hold their blocks. What is there now of the first ones, as many as could be shared: unproved, and
        hashed when it is read again, unless the caller verifies it and calls `note_proved`.

        Extents are shared block by block of the file system: of raw leaves, which begin where a block
        does."""
        start, end, unit = leaves[0].offset, leaves[-1].offset + leaves[-1].size, self.staging.unit
        if self.staging.shares is False or any(
            cids.codec(leaf.cid) != cids.RAW
            or leaf.offset % unit
            or (leaf.size % unit and leaf.offset + leaf.size != file.size)
            for leaf in leaves
        ):
            return []
        if self.staging.shares is None and not await threads.run_sync(
            self.staging.can_share, files[0], leaves[0].size, limiter=self.io.writing
        ):
            return []
        async with self._writing(file, start, end, source) as entry:
            if entry is None:
                return []
            try:
                grown, found = await threads.run_sync(
                    self.staging.clone, entry, leaves, files, limiter=self.io.writing
                )
            except (OSError, Removed):  # it is written then, and that reports it
                return []
            entry.disk += grown
            if found and entry.extents is not None:
                if entry.proved is entry.extents:  # until now all that is there was proved
                    entry.proved = Extents([*entry.extents.starts], [*entry.extents.ends])
                last = leaves[len(found) - 1]
                entry.extents.add(start, last.offset + last.size)
            return found

    def note_proved(self, file: FileRef, leaves: Sequence[Leaf]) -> None:
        """What `clone_leaves` gave of leaves that lie one behind the other was found right."""
        entry = self.staging.entries.get(file.cid)
        if entry is not None and not entry.dead:
            self._proved(entry, leaves[0].offset, leaves[-1].offset + leaves[-1].size)

    def _proved(self, entry: Entry, start: int, end: int) -> None:
        """The leaves in [start, end) were written or found right: the last one gives a file its name."""
        if not entry.complete and entry.proved is not None:
            whole = entry.proved.add(start, end) == (0, entry.size)
            if whole and not self.backoff.waiting:
                self.nursery.start_soon(self.finish, entry)

    def _settle(self, entry: Entry, reserved: int = 0) -> None:
        """Corrects what the budget counts for `entry`. `reserved` where a write has ended for which so many
        bytes were reserved."""
        entry.reserved -= reserved
        by = 0
        if not entry.dead:
            empty = not entry.disk and not entry.reserved
            charge = 0 if empty else self.staging.charge(entry)
            by, entry.charged = charge - entry.charged, charge
            if empty:
                self.staging.forget(entry)
        self.budget.settle(entry.cid, by, reserved)

    async def finish(self, entry: Entry) -> None:
        """Gives a whole file its final name, once it is on the disk."""
        try:
            entry.disk += await threads.run_sync(self.staging.finish, entry, limiter=self.io.background)
        except OSError as exc:
            if not entry.dead:
                self.backoff.failed(cids.text(entry.cid), exc)
        self._settle(entry)
        if entry.complete:
            self.completed(entry)

    def note_use(self, file: FileRef) -> None:
        """A new use of a file. Its time is written to the disk now and then."""
        entry = self.staging.find(file.cid)
        if entry is None:
            return
        self.budget.arc.use(file.cid, current_request.get().caller)
        entry.last_used = staging.now()
        if entry.last_used - entry.noted > NOTE_USE:
            entry.noted = entry.last_used
            self.nursery.start_soon(self._note_use, entry)

    async def _note_use(self, entry: Entry) -> None:
        try:
            await threads.run_sync(self.staging.note_use, entry, limiter=self.io.background)
        except OSError:  # read-only, or gone: then its order after a restart is a little off
            pass

    # -- what is there ---------------------------------------------------------------------------------------

    async def listed(self) -> Sequence[CacheItem]:
        """All staging files, last used first, once they are counted. Other calls go on meanwhile: 100,000
        files take half a second."""
        await self.budget.counted.wait()
        entries = await threads.run_sync(
            partial(sorted, key=lambda entry: -entry.last_used), list(self.staging.entries.values())
        )
        found = []
        for number, entry in enumerate(entries):
            if number % LISTED_TOGETHER == 0:
                await trio.lowlevel.checkpoint()
            if not entry.dead:
                found.append(self._item(entry))
        return found

    def item_of(self, cid: Cid) -> CacheItem | None:
        """A staging file, or a small block: of that its pack knows no use of its own."""
        entry = self.staging.find(cids.canonical(cid))
        if entry is not None:
            return self._item(entry)
        place = self.blocks.place(cid)
        if place is None:
            return None
        pinned = "user" if self.budget.is_pinned(place.pack) else self._pin_state(cids.canonical(cid))
        return CacheItem(cid, place.size, place.size, True, 0.0, pinned, "")

    def _item(self, entry: Entry) -> CacheItem:
        used = staging.to_wall(entry.last_used)
        return CacheItem(
            entry.cid, entry.disk, entry.size, entry.whole(), used, self._pin_state(entry.cid), entry.source
        )

    def _pin_state(self, cid: Cid) -> str:
        if self.budget.is_pinned(cid):
            return "user"
        return "cache" if self.pins.state(cid) == "cache" else ""

    # -- eviction --------------------------------------------------------------------------------------------

    async def _evict(self, key: Key) -> None:
        """Off the disk; then the node may let go of it."""
        size = self.blocks.packs.sizes.get(key, 0) if isinstance(key, int) else 0
        try:
            if isinstance(key, int):
                for cid in await self.blocks.evict(key):
                    # else it came back meanwhile, and may have been pinned anew; or its file is staged
                    if not self.holds(cid):
                        self.pins.remove(cid)
                return
            entry = self.staging.find(key)
            if entry is not None:
                size = entry.disk
                entry.dead = True
                self.staging.forget(entry)
                self.budget.unprotect(key)
                still_read = await threads.run_sync(self.staging.remove, entry, limiter=self.io.background)
                if still_read is not None:
                    self._lingering[still_read] = size
                    self.budget.stuck(size)
                self.pins.remove(key)
        except OSError as exc:
            self.backoff.failed(f"{self.folder}: nothing can be removed", exc)
            self.budget.stuck(size)

    @property
    def lingering(self) -> int:
        """Bytes on disk of what has left while the kernel still reads it for others."""
        return sum(self._lingering.values())

    def free_lingering(self) -> None:
        """Stops counting what nobody reads any more."""
        for file, size in list(self._lingering.items()):
            if is_free(file):
                os.close(file)
                del self._lingering[file]
                self.budget.stuck(-size)

    def close_lingering(self) -> None:
        """At the end."""
        while self._lingering:
            os.close(self._lingering.popitem()[0])

    async def evict(self, cid: Cid | None = None) -> int:
        """Removes a file or block, or all that is not pinned; returns the bytes freed on disk.

        Where `cid` is a small block, the pack goes that holds it. Raises UsageError for what is pinned."""
        await self.budget.counted.wait()
        if cid is None:
            keys, is_pinned = self.budget.evictable(), self.budget.is_pinned
            return sum([await self.budget.evict(key) for key in keys if not is_pinned(key)])  # nor meanwhile
        key: Key = cids.canonical(cid)
        if key not in self.staging.entries:
            place = self.blocks.place(cid)
            if place is None:
                return 0
            key = place.pack
        if self.budget.is_pinned(key):
            raise UsageError(f"{cids.text(cid)} is pinned: unpin it first")
        return await self.budget.evict(key)

    def holds(self, cid: Cid) -> bool:
        """Whether `cid` itself is staged, or is being staged, at least in part."""
        own = cids.canonical(cid)
        here = own in self.arriving or self.staging.find(own) is not None
        return here or self.blocks.place(cid) is not None

    def rest_on_disk(self) -> int:
        """Bytes on disk of all that lies in the folder besides staging files and packs, the folders
        themselves included. In any thread."""
        return disk_usage(self.folder, but_in=(self.staging.path, self.blocks.packs.folder.path))

    def no_room(self) -> str:
        """Why nothing new can be kept, "" where that is not so."""
        budget, space = self.budget, self.space
        if not budget.counted.is_set():
            count = len(self.staging.entries) + len(self.blocks.packs.sizes)
            return f"{self.folder}: what is there is being counted, {count} files so far: nothing new is kept"
        if budget.arc.capacity >= MAX_PACKED:
            return ""
        if budget.limit < budget.configured:
            free, reserve = (f"{count / (1 << 20):.1f} MiB" for count in (space.free, space.reserve))
            return (
                f"{self.folder}: the disk is too full to cache anything: {free} are free, {reserve} "
                "stay reserved"
            )
        return f"{self.folder}: what is pinned, the index and the log leave nothing of the budget"

    def note_room(self) -> None:
        """Logs when there is no room any more, and when there is again."""
        reason = self.no_room() if self.budget.counted.is_set() else ""
        if bool(reason) != self._full:
            self._full = bool(reason)
            if reason:
                log.warning("%s; reads go on without the cache", reason)
            else:
                log.info("there is room in the cache again")
