"""The store: the cache on disk, within the budget. It keeps leaves in staging files, and blocks in packs
(`packs.BlockStore`).

What can't be read counts as missing, and what can't be written is not stored; `backoff` says why. Everything
is verified when it is read. Concurrency: on the event loop; files are read, hashed and written in worker
threads."""

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

from ipfsfuse.cache.base import CacheItem, FileRef, LeafPart, NoPins, Pieces, Pins
from ipfsfuse.cache.budget import Budget, FreeSpace, Key, WriteBackoff, disk_usage
from ipfsfuse.cache.store import staging
from ipfsfuse.cache.store.folder import INDEX, PACKS, PINNED_FOLDER, STAGING
from ipfsfuse.cache.store.index import Index
from ipfsfuse.cache.store.packs import BlockStore, IoLimits, Packs
from ipfsfuse.cache.store.records import PinRecord, PinRecords
from ipfsfuse.cache.store.staging import PIECE, Extents, Removed, Staging, StagingEntry, is_free
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import current_request
from ipfsfuse.structures import Buffer, Lru

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

MAX_PACKED = 64 << 10
"""Files of up to so many bytes are stored in packs."""
NOTE_USE = 60.0
"""Seconds after which the time of a file's last use is written to the disk again."""
MAX_TAGS = 16 << 20
"""Bytes of tags that are kept in memory, enough for 7 GiB in leaves of 1 MiB."""
LOOP_PIECES = 8
"""Pieces that are read from the page cache and hashed on the event loop, which takes about 15 us."""
TAGS_OVERHEAD = 300
"""Bytes of memory for one leaf's tags in addition to the tags themselves."""
FILES_LISTED_TOGETHER = 500
"""Staging files that are listed before other tasks run, which takes some milliseconds."""


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
        """`budget` and `reserve` are in bytes; see `FreeSpace`. Raises StoreFailed or OSError if the folder
        can't be used at all."""
        self.folder = folder
        self.nursery = nursery
        self.pins: Pins = pins or NoPins()
        self.space = FreeSpace(folder, reserve)
        self.small_budget = min(budget, self.space.total or budget)
        """The budget from which the sizes of packs, of the index's write-ahead log and of its margin are
        computed."""
        self.budget = Budget(budget, self._evict, self.space.spare)
        self.backoff = WriteBackoff()
        self.io = IoLimits()
        with contextlib.ExitStack() as opened:
            self.staging = Staging(folder / STAGING)
            opened.callback(self.staging.folder.close)
            self.budget.unit = self.staging.unit
            self.pin_records = PinRecords(folder / PINNED_FOLDER)
            opened.callback(self.pin_records.folder.close)
            index = Index(folder / INDEX, self.small_budget, self.pin_records.take_over)
            opened.callback(index.close)
            packs = Packs(folder / PACKS, index, max(MAX_PACKED, min(1 << 20, self.small_budget // 64)))
            opened.pop_all()
        self.pinned: dict[Cid, PinRecord] = {}
        """The pins when the store was opened."""
        self.not_kept: set[Cid] = set()
        """Pinned files of which a part could not be staged."""
        self.order_until: float | None = None
        """The time of the latest use of an earlier run, in seconds since 1970, if the index has all uses of
        that run; otherwise None."""
        self.blocks = BlockStore(packs, index, self.budget, self.backoff, self.io, self.staging.unit)
        self._full = False
        self.arriving: Counter[Cid] = Counter()
        """Blocks and files that readers have got and that are still being staged. They count as staged."""
        self.completed: Callable[[StagingEntry], None] = lambda _entry: None
        """Called when a staging file has got its final name."""
        self._lingering: dict[int, int] = {}
        """Bytes of evicted files that the kernel still reads, by descriptor."""
        self._tags: Lru[Cid, bytes] = Lru(MAX_TAGS)
        """The tags of the pieces of verified leaves, by the leaf's CID."""

    # -- leaves ----------------------------------------------------------------------------------------------

    async def has_leaf(self, file: FileRef, leaf: Leaf) -> bool:
        """Whether the leaf seems to be staged. Only its hash can prove it."""
        return await self._entry_with(file, leaf.offset, leaf.offset + leaf.size) is not None

    async def leaf(self, file: FileRef, leaf: Leaf) -> bytes | None:
        """The leaf's verified content; None if it is missing or wrong (then it is set aside)."""
        entry = await self._entry_with(file, leaf.offset, leaf.offset + leaf.size)
        if entry is None or (found := await self._read(self.staging.read, entry, leaf)) is None:
            return None
        data, right, tags = found
        if right:
            self._tags.put(leaf.cid, tags, len(tags) + TAGS_OVERHEAD)
        return await self._checked(entry, leaf, data, right)

    async def part(self, file: FileRef, leaf: Leaf, start: int, stop: int) -> LeafPart | None:
        """The bytes [start, stop) of a leaf that was verified before, so that they can be verified without
        the rest. None if it was not, or if they are wrong."""
        pieces, entry = self.pieces(file, leaf), self.staging.find(file.cid)
        if pieces is None or entry is None:
            return None
        data, arguments = None, (entry, leaf, start, stop, pieces.tags)
        try:
            if stop - start <= LOOP_PIECES * PIECE:  # reading the page cache costs less than a thread
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
        if stop - start == leaf.size:  # the leaf may have been verified in another file only
            self._proved(entry, leaf.offset, leaf.offset + leaf.size)
        return LeafPart(data, pieces)

    def pieces(self, file: FileRef, leaf: Leaf) -> Pieces | None:
        """How the C thread can read a leaf that is staged and was verified; None for other leaves."""
        entry, tags = self.staging.find(file.cid), self._tags.get(leaf.cid)
        if tags is None or entry is None or entry.dead or entry.extents is None:
            return None
        if not entry.extents.covers(leaf.offset, leaf.offset + leaf.size):
            return None
        return Pieces(*self.staging.dir_and_name(entry), tags)

    async def leaves(self, file: FileRef, leaves: Sequence[Leaf]) -> Sequence[memoryview | None]:
        """Reads leaves that follow each other without a gap, at least one. Returns None for a leaf that is
        missing or wrong."""
        entry = await self._entry_with(file, leaves[0].offset, leaves[-1].offset + leaves[-1].size)
        if entry is None or (found := await self._read(self.staging.read_each, entry, leaves)) is None:
            return [None] * len(leaves)
        return [await self._checked(entry, leaf, *each) for leaf, each in zip(leaves, found, strict=True)]

    async def _checked(self, entry: StagingEntry, leaf: Leaf, data: T, right: bool) -> T | None:
        """Returns `data` if it is right; otherwise sets the leaf aside."""
        if right:
            self.budget.arc.refresh(entry.cid)
            self._proved(entry, leaf.offset, leaf.offset + leaf.size)
            return data
        if not entry.dead:
            await self._set_aside(entry, leaf)
        return None

    async def _entry_with(self, file: FileRef, start: int, end: int) -> StagingEntry | None:
        """The entry of `file`, if [start, end) seems to be staged."""
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

    async def _set_aside(self, entry: StagingEntry, leaf: Leaf) -> None:
        """Frees the space of a wrong leaf."""
        entry.verified = False
        if entry.fresh or entry.complete:  # otherwise a crash may have cut it short, which is no fault
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
            self._adjust(entry)
        else:  # nothing is left of it: remove the file too
            await self.budget.evict(entry.cid)

    async def _read(
        self, read: Callable[[StagingEntry, *Ts], T], entry: StagingEntry, *arguments: *Ts
    ) -> T | None:
        """Calls `read` in a thread. Returns None if the file can't be read."""
        try:
            return await threads.run_sync(read, entry, *arguments, limiter=self.io.reading)
        except OSError as exc:
            await self._lost(entry, exc)
            return None

    async def _lost(self, entry: StagingEntry, error: OSError) -> None:
        """Drops a staging file that can't be read. If it was removed by someone, the disk may be fine: the
        next write will show that."""
        if not entry.dead:
            path = self.staging.path / cids.text(entry.cid)
            if isinstance(error, FileNotFoundError):
                log.info("%s was removed by somebody: what is read of it is fetched again", path)
            else:
                self.backoff.failed(str(path), error)
            await self.budget.evict(entry.cid)

    async def put_leaves(
        self, file: FileRef, leaves: Sequence[Leaf], contents: Sequence[Buffer], source: str
    ) -> bool:
        """Stages adjacent leaves, at least one. Returns whether they are staged now."""
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
    async def _writing(
        self, file: FileRef, start: int, end: int, source: str
    ) -> AsyncIterator[StagingEntry | None]:
        """Reserves room in the budget for a write of [start, end), and yields the entry of `file`. Yields
        None if there is no room."""
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
            entry = StagingEntry(file.cid, file.size, extents=(there := Extents()), proved=there)
            self.staging.entries[file.cid] = entry
        entry.reserved += cost
        entry.charged += cost
        entry.source = source
        try:
            yield entry
        finally:
            self._adjust(entry, cost)

    async def clone_leaves(
        self, file: FileRef, leaves: Sequence[Leaf], files: Sequence[str], source: str
    ) -> Sequence[memoryview]:
        """Stages adjacent leaves, at least one, by sharing the extents of `files`, which may hold their
        blocks. Returns the unverified bytes of the first leaves, as many as could be shared. They are
        verified when they are read again, unless the caller verifies them and calls `note_proved`.

        File systems share whole blocks, so this works for raw leaves that begin at a block of the file
        system."""
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
            except (OSError, Removed):  # the leaves are written instead, which reports errors
                return []
            entry.disk += grown
            if found and entry.extents is not None:
                if entry.proved is entry.extents:  # until now every present byte was verified
                    entry.proved = Extents([*entry.extents.starts], [*entry.extents.ends])
                last = leaves[len(found) - 1]
                entry.extents.add(start, last.offset + last.size)
            return found

    def note_not_kept(self, cid: Cid) -> None:
        """A part of the file `cid` could not be staged."""
        if self.budget.is_pinned(cid):
            self.not_kept.add(cid)

    def note_proved(self, file: FileRef, leaves: Sequence[Leaf]) -> None:
        """Notes that the caller has verified adjacent leaves that `clone_leaves` returned."""
        entry = self.staging.entries.get(file.cid)
        if entry is not None and not entry.dead:
            self._proved(entry, leaves[0].offset, leaves[-1].offset + leaves[-1].size)

    def _proved(self, entry: StagingEntry, start: int, end: int) -> None:
        """Notes that the leaves in [start, end) were written or verified. If every byte of the file is, gives
        it its final name."""
        if not entry.complete and entry.proved is not None:
            whole = entry.proved.add(start, end) == (0, entry.size)
            if whole and not self.backoff.waiting:
                self.nursery.start_soon(self.finish, entry)

    def _adjust(self, entry: StagingEntry, reserved: int = 0) -> None:
        """Corrects what the budget counts for `entry`. `reserved`: the bytes that were reserved for a write
        that has ended."""
        entry.reserved -= reserved
        by = 0
        if not entry.dead:
            empty = not entry.disk and not entry.reserved
            charge = 0 if empty else self.staging.charge(entry)
            by, entry.charged = charge - entry.charged, charge
            if empty:
                self.staging.forget(entry)
        self.budget.adjust(entry.cid, by, reserved)

    async def finish(self, entry: StagingEntry) -> None:
        """Syncs a complete file and gives it its final name."""
        try:
            entry.disk += await threads.run_sync(self.staging.finish, entry, limiter=self.io.background)
        except OSError as exc:
            if not entry.dead:
                self.backoff.failed(cids.text(entry.cid), exc)
        self._adjust(entry)
        if entry.complete:
            self.completed(entry)

    def note_use(self, file: FileRef) -> None:
        """Notes a new use of a file. Writes its time to the disk after NOTE_USE seconds."""
        entry = self.staging.find(file.cid)
        if entry is None:
            return
        self.budget.arc.use(file.cid, current_request.get().caller)
        entry.last_used = staging.now()
        if entry.last_used - entry.noted > NOTE_USE:
            entry.noted = entry.last_used
            self.nursery.start_soon(self._note_use, entry)

    async def _note_use(self, entry: StagingEntry) -> None:
        try:
            await threads.run_sync(self.staging.note_use, entry, limiter=self.io.background)
        except OSError:  # read-only or gone: its place in the order of use may be wrong after a restart
            pass

    # -- what is there ---------------------------------------------------------------------------------------

    async def listed(self) -> Sequence[CacheItem]:
        """All staging files, last used first. Waits until they are counted. Other tasks run meanwhile,
        because 100,000 files take half a second."""
        await self.budget.counted.wait()
        entries = await threads.run_sync(
            partial(sorted, key=lambda entry: -entry.last_used), list(self.staging.entries.values())
        )
        found = []
        for number, entry in enumerate(entries):
            if number % FILES_LISTED_TOGETHER == 0:
                await trio.lowlevel.checkpoint()
            if not entry.dead:
                found.append(self._item(entry))
        return found

    def item_of(self, cid: Cid) -> CacheItem | None:
        """The staging file or small block of `cid`. A small block has no time of use of its own."""
        entry = self.staging.find(cids.canonical(cid))
        if entry is not None:
            return self._item(entry)
        location = self.blocks.locate(cid)
        if location is None:
            return None
        pinned = "user" if self.budget.is_pinned(location.pack) else self._pin_state(cids.canonical(cid))
        return CacheItem(cid, location.size, location.size, True, 0.0, pinned, "")

    def _item(self, entry: StagingEntry) -> CacheItem:
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
        """Removes a staging file or pack from the disk, and then its pins at the node."""
        size = self.blocks.packs.sizes.get(key, 0) if isinstance(key, int) else 0
        try:
            if isinstance(key, int):
                for cid in await self.blocks.evict(key):
                    # it may have been staged again meanwhile, as a block or as a file
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
        """Bytes on disk of evicted files that the kernel still reads."""
        return sum(self._lingering.values())

    def free_lingering(self) -> None:
        """Frees evicted files that the kernel no longer reads."""
        for file, size in list(self._lingering.items()):
            if is_free(file):
                os.close(file)
                del self._lingering[file]
                self.budget.stuck(-size)

    def close_lingering(self) -> None:
        """Closes evicted files that the kernel may still read, at the end."""
        while self._lingering:
            os.close(self._lingering.popitem()[0])

    async def evict(self, cid: Cid | None = None) -> int:
        """Evicts a file or block, or everything that is not pinned. Returns the bytes freed on disk.

        If `cid` is a small block, its pack is evicted. Raises UsageError if it is pinned."""
        await self.budget.counted.wait()
        if cid is None:
            keys, is_pinned = self.budget.evictable(), self.budget.is_pinned
            # a key may have been pinned meanwhile
            return sum([await self.budget.evict(key) for key in keys if not is_pinned(key)])
        key: Key = cids.canonical(cid)
        if key not in self.staging.entries:
            location = self.blocks.locate(cid)
            if location is None:
                return 0
            key = location.pack
        if self.budget.is_pinned(key):
            raise UsageError(f"{cids.text(cid)} is pinned: unpin it first")
        return await self.budget.evict(key)

    def holds(self, cid: Cid) -> bool:
        """Whether `cid` itself is staged, or is being staged, at least in part."""
        own = cids.canonical(cid)
        here = own in self.arriving or self.staging.find(own) is not None
        return here or self.blocks.locate(cid) is not None

    def rest_on_disk(self) -> int:
        """Bytes on disk of everything in the folder except staging files and packs. The folders themselves
        count. In any thread."""
        return disk_usage(self.folder, but_in=(self.staging.path, self.blocks.packs.folder.path))

    def no_room(self) -> str:
        """Why nothing new can be staged; "" if it can."""
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
        """Logs when there is no room for new blocks, and when there is again."""
        reason = self.no_room() if self.budget.counted.is_set() else ""
        if bool(reason) != self._full:
            self._full = bool(reason)
            if reason:
                log.warning("%s; reads go on without the cache", reason)
            else:
                log.info("there is room in the cache again")
