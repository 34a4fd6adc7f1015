"""What is on disk, within the budget: staging files, packs and their index behind four verbs (give, keep, look, evict).

Nothing here raises for what is wrong with the disk: what can't be read is not there, what can't be written is not
kept, and `trouble` says why. Whatever is given was hashed after it was read.

Concurrency: the event loop's; disk work over some KiB runs in worker threads, hashing with it.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from ipfsfuse.cache.base import FileRef, Kept
from ipfsfuse.cache.blocks import Packs, Place, section
from ipfsfuse.cache.index import Damaged, Index
from ipfsfuse.cache.pins import NoPins, Pins
from ipfsfuse.cache.room import Key, Room
from ipfsfuse.cache.staging import Entry, Removed, Staging
from ipfsfuse.cache.trouble import Trouble
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import StoreFailed, UsageError, WrongBlock

log = logging.getLogger(__name__)

SMALL = 64 << 10
"""Files of up to so many bytes lie in packs."""
ON_LOOP = 32 << 10
"""Blocks of up to so many bytes are read, hashed and written on the event loop: 10 to 30 us, less than a thread costs."""
RECENT_PACKS = 2
"""A use of a block in one of the last packs is part of the same use that brought it."""
NOTE_USE = 60.0
"""Seconds between two notes on disk of one file's use."""


class Store:
    def __init__(self, folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None = None) -> None:
        """Raises StoreFailed where the folder can't be used at all."""
        self.folder = folder
        self.staging = Staging(folder / "files")
        self.index = Index(folder / "index.sqlite")
        self.packs = Packs(folder / "packs", self.index, max(SMALL, min(1 << 20, budget // 64)))
        self.room = Room(budget, self._evict)
        self.trouble = Trouble()
        self.pins: Pins = pins or NoPins()
        self._nursery = nursery
        self._appending = trio.Lock()
        self._reading = trio.CapacityLimiter((os.cpu_count() or 1) + 2)
        self._writing = trio.CapacityLimiter(4)
        self._upkeep = trio.CapacityLimiter(2)
        self.statements: list[tuple[str, Sequence[Sequence[Any]]]] = []
        """What the index shall be told besides where blocks lie."""
        self.damaged: Damaged | None = None
        self.changed = trio.Event()
        """Set when the index has something to be told."""

    # -- blocks ------------------------------------------------------------------------------------------------------

    def place(self, cid: Cid) -> Place | None:
        try:
            return self.packs.find(cids.multihash(cid))
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return None

    async def block(self, cid: Cid) -> bytes | None:
        """The block, hashed after it was read; None where it is not kept, or not right (then it is forgotten)."""
        place = self.place(cid)
        if place is None:
            return None
        self._used_pack(place.pack)
        try:
            if place.size <= ON_LOOP:
                return self._read_block(cid, place)
            return await trio.to_thread.run_sync(self._read_block, cid, place, limiter=self._reading)
        except WrongBlock:
            log.warning("%s: wrong bytes in the cache, set aside", cids.text(cid))
        except OSError as exc:
            if place.pack in self.packs.sizes:
                self.trouble.note(str(self.packs.path(place.pack)), exc)
        self.packs.forget(cids.multihash(cid))
        self.changed.set()
        return None

    def _read_block(self, cid: Cid, place: Place) -> bytes:
        block = self.packs.read(place)
        cids.verify(cid, block)
        return block

    def _used_pack(self, pack: int) -> None:
        if pack < self.packs.current - RECENT_PACKS:
            self.room.arc.use(pack)
        else:
            self.room.arc.refresh(pack)

    async def keep_block(self, cid: Cid, block: bytes) -> bool:
        """Whether it is kept now."""
        if self.trouble.waiting:
            return False
        data, head = section(cids.canonical(cid), block)
        async with self._appending:
            if self.place(cid) is not None:
                return True
            pack = self.packs.choose(len(data))
            held = self.packs.sizes.get(pack, 0)
            if not await self.room.reserve(pack, self.staging.cost(held, held + len(data))):
                return False
            held = self.packs.sizes.get(pack, 0)  # 0 where it had to leave to make room for itself
            try:
                if len(data) <= ON_LOOP:
                    self.packs.write(pack, held, data)
                else:
                    await trio.to_thread.run_sync(self.packs.write, pack, held, data, limiter=self._writing)
            except OSError as exc:
                self.trouble.note(str(self.packs.path(pack)), exc)
                return False
            else:
                self.trouble.over()
                self.packs.note(cid, pack, held + head, len(block))
                self.changed.set()
                return True
            finally:
                self._settle_pack(pack)

    def _settle_pack(self, pack: int) -> None:
        size, unit = self.packs.sizes.get(pack, 0), self.staging.unit
        charge = -(-size // unit) * unit + unit if size else 0
        self.room.adjust(pack, charge - self.room.size(pack))

    # -- leaves ------------------------------------------------------------------------------------------------------

    async def has_leaf(self, file: FileRef, leaf: Leaf) -> bool:
        """Whether it seems to be there: only its hash will tell."""
        entry = await self._entry(file.cid)
        return entry is not None and entry.extents is not None and entry.extents.covers(leaf.offset, leaf.offset + leaf.size)

    async def leaf(self, file: FileRef, leaf: Leaf) -> bytes | None:
        """The leaf's content, hashed after it was read; None where it is not there or not right (then it is given up)."""
        if not await self.has_leaf(file, leaf):
            return None
        entry = self.staging.entries.get(file.cid)
        if entry is None:
            return None
        try:
            data, right = await trio.to_thread.run_sync(self.staging.read, entry, leaf, limiter=self._reading)
        except OSError as exc:
            await self._lost(entry, exc)
            return None
        if right:
            self.room.arc.refresh(file.cid)
            return data
        if not entry.dead:
            await self._set_aside(entry, leaf)
        return None

    async def _entry(self, cid: Cid) -> Entry | None:
        """The live entry of `cid`, with its extents known."""
        entry = self.staging.entries.get(cid)
        if entry is not None and entry.extents is None:
            try:
                found = await trio.to_thread.run_sync(self.staging.look, entry, limiter=self._reading)
            except OSError as exc:
                await self._lost(entry, exc)
                return None
            if entry.extents is None:
                entry.extents = found
                if not entry.complete and entry.whole():  # whole, and ended before it had its name
                    self._nursery.start_soon(self.finish, entry)
        return entry if entry is not None and not entry.dead else None

    async def _set_aside(self, entry: Entry, leaf: Leaf) -> None:
        """A leaf that is not what its CID says: its space is given back."""
        if entry.fresh or entry.complete:  # else a crash may well have cut it short
            log.warning("%s: wrong bytes in the cache at %d, set aside", cids.text(entry.cid), leaf.offset)
        if entry.extents is not None:
            entry.extents.remove(leaf.offset, leaf.offset + leaf.size)
        try:
            end = leaf.offset + leaf.size
            entry.disk += await trio.to_thread.run_sync(self.staging.punch, entry, leaf.offset, end, limiter=self._writing)
        except OSError as exc:
            self.trouble.note(cids.text(entry.cid), exc)
        self._settle(entry)

    async def _lost(self, entry: Entry, error: OSError) -> None:
        """A staging file that can't be read: it is there no more."""
        if not entry.dead:
            self.trouble.note(str(self.staging.folder / cids.text(entry.cid)), error)
            await self.room.evict(entry.cid)

    async def keep_leaf(self, file: FileRef, leaf: Leaf, content: bytes | memoryview, source: str) -> bool:
        """Whether it is kept now."""
        if self.trouble.waiting:
            return False
        cost = self.staging.cost(leaf.offset, leaf.offset + leaf.size)
        if not await self.room.reserve(file.cid, cost):
            return False
        if file.cid not in self.staging.entries:
            self.pins.add(file.cid)
        entry = self.staging.entry(file.cid, file.size)
        entry.reserved += cost
        entry.charged += cost
        entry.source = source
        try:
            grown, error = await trio.to_thread.run_sync(self.staging.write, entry, leaf.offset, content, limiter=self._writing)
        except Removed:
            return False
        else:
            entry.disk += grown
            return self._kept_leaf(entry, leaf, error)
        finally:
            entry.reserved -= cost
            self._settle(entry)

    def _kept_leaf(self, entry: Entry, leaf: Leaf, error: OSError | None) -> bool:
        """What a write came to."""
        if error is not None:
            self.trouble.note(str(self.staging.folder / cids.text(entry.cid)), error)
            return False
        self.trouble.over()
        if entry.extents is not None:
            entry.extents.add(leaf.offset, leaf.offset + leaf.size)
            if not entry.complete and entry.whole():
                self._nursery.start_soon(self.finish, entry)
        return True

    def _settle(self, entry: Entry) -> None:
        if entry.dead:
            return
        empty = not entry.disk and not entry.reserved
        charge = 0 if empty else self.staging.charge(entry)
        self.room.adjust(entry.cid, charge - entry.charged)
        entry.charged = charge
        if empty:
            self.staging.forget(entry)

    async def finish(self, entry: Entry) -> None:
        """Gives a whole file its final name, once it is on the disk."""
        try:
            entry.disk += await trio.to_thread.run_sync(self.staging.finish, entry, limiter=self._upkeep)
        except OSError as exc:
            if not entry.dead:
                self.trouble.note(cids.text(entry.cid), exc)
        self._settle(entry)

    def note_use(self, file: FileRef) -> None:
        """A new use of a file. Its time is written to the disk now and then."""
        entry = self.staging.entries.get(file.cid)
        if entry is None:
            return
        self.room.arc.use(file.cid)
        now = time.time()
        stale = now - entry.last_used > NOTE_USE
        entry.last_used = now
        if stale:
            self._nursery.start_soon(self._note_use, entry)

    async def _note_use(self, entry: Entry) -> None:
        try:
            await trio.to_thread.run_sync(self.staging.note_use, entry, limiter=self._upkeep)
        except OSError:  # read-only, or gone: then its order after a restart is a little off
            pass

    def kept(self) -> Sequence[Kept]:
        """Staging files, last used first."""
        entries = sorted(self.staging.entries.values(), key=lambda entry: -entry.last_used)
        return [self._told(entry) for entry in entries]

    def kept_of(self, cid: Cid) -> Kept | None:
        """A staging file, or a small block: of that its pack knows no use of its own."""
        entry = self.staging.entries.get(cids.canonical(cid))
        if entry is not None:
            return self._told(entry)
        place = self.place(cid)
        return Kept(cid, place.size, place.size, True, 0.0, self._pin_state(cids.canonical(cid)), "") if place is not None else None

    def _told(self, entry: Entry) -> Kept:
        return Kept(entry.cid, entry.disk, entry.size, entry.whole(), entry.last_used, self._pin_state(entry.cid), entry.source)

    def _pin_state(self, cid: Cid) -> str:
        if self.room.kept(cid):
            return "user"
        return "cache" if self.pins.state(cid) == "cache" else ""

    # -- eviction and the index --------------------------------------------------------------------------------------

    async def _evict(self, key: Key) -> None:
        """Off the disk; then the node may let go of it."""
        try:
            if isinstance(key, int):
                self.packs.close_pack(key)
                self.packs.forget_all(await trio.to_thread.run_sync(self.packs.remove, key, limiter=self._upkeep))
                self.changed.set()
                return
            entry = self.staging.entries.get(key)
            if entry is not None:
                entry.dead = True
                self.staging.forget(entry)
                await trio.to_thread.run_sync(self.staging.remove, entry, limiter=self._upkeep)
                self.pins.remove(key)
        except OSError as exc:
            self.trouble.note(f"{self.folder}: nothing can be removed", exc)

    async def evict(self, cid: Cid | None = None) -> int:
        """As `PinsetCache.evict`."""
        if cid is None:
            return sum([await self.room.evict(key) for key in list(self.room.arc)])
        key: Key = cids.canonical(cid)
        if key not in self.staging.entries:
            place = self.place(cid)
            if place is None:
                return 0
            key = place.pack
        if self.room.kept(key):
            raise UsageError(f"{cids.text(cid)} is kept for good: unpin it first")
        return await self.room.evict(key)

    def holds(self, cid: Cid) -> bool:
        """Whether `cid` itself is staged, at least in part."""
        return cids.canonical(cid) in self.staging.entries or self.place(cid) is not None

    def folders_disk(self) -> int:
        """Bytes on disk of the folders that names lie in."""
        try:
            return sum((self.folder / name).stat().st_blocks * 512 for name in ("files", "packs", "."))
        except OSError:
            return 0

    def write_later(self, sql: str, arguments: Sequence[Any]) -> None:
        """One more statement for the index."""
        self.statements.append((sql, [arguments]))
        self.changed.set()

    def index_failed(self, error: Exception) -> None:
        """The index gave no answer; where it is damaged, it is replaced soon."""
        if isinstance(error, Damaged):
            self.damaged = error
            self.changed.set()
        else:
            self.trouble.note(str(self.index.path), error)
