"""What lies on the disk: staging files, packs and the index, the room they share, and who may ask for how
much of it.

Nothing here raises for what is wrong with the disk: `trouble` says it. Concurrency: the event loop's; disk
work over some KiB runs in worker threads.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from ipfsfuse.cache.base import Kept, NoPins, Pins, SmallBlocks
from ipfsfuse.cache.folder.blocks import Packs, Place, Series
from ipfsfuse.cache.folder.entry import Entry
from ipfsfuse.cache.folder.index import Damaged, Index
from ipfsfuse.cache.folder.staging import Staging
from ipfsfuse.cache.folder.trouble import Trouble
from ipfsfuse.cache.room import Key, Room
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed, UsageError
from ipfsfuse.sources.base import Caller, current_request

ROWS = 512
"""Rows that are written to the index at once."""
SMALL = 64 << 10
"""Files of up to so many bytes lie in packs."""


AT_ONCE = 500
"""Staging files that are told of before other calls have their turn: some milliseconds."""


class Disk:
    def __init__(self, folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None = None) -> None:
        """Raises StoreFailed where the folder can't be used at all."""
        self.folder = folder
        self.staging = Staging(folder / "files")
        self.index = Index(folder / "index.sqlite", budget)
        self.packs = Packs(folder / "packs", self.index, max(SMALL, min(1 << 20, budget // 64)))
        self.room = Room(budget, self._evict)
        self.trouble = Trouble()
        self.when_blocks_leave: list[Callable[[], None]] = []
        self.pins: Pins = pins or NoPins()
        self.nursery = nursery
        self._series: dict[Caller, Series] = {}
        self.set_aside: dict[bytes, Place] = {}
        """Where wrong blocks lay, by multihash, until they are fetched again."""
        self.appending = trio.Lock()
        self.reading = trio.CapacityLimiter((os.cpu_count() or 1) + 2)
        self.writing = trio.CapacityLimiter(4)
        self.upkeep = trio.CapacityLimiter(2)
        self.statements: list[tuple[str, Sequence[Sequence[Any]]]] = []
        """What the index shall be told besides where blocks lie."""
        self.damaged: Damaged | None = None
        self.telling = trio.Lock()
        self.changed, self.much_changed = trio.Event(), trio.Event()
        """Set when the index has something to be told; when it should not wait."""

    @property
    def series(self) -> Series:
        """Where blocks go that nobody asked to keep: packs of each caller's own, which leave on its account
        alone."""
        return self._series.setdefault(current_request().caller, Series())

    # -- what is there ---------------------------------------------------------------------------------------------

    def place(self, cid: Cid) -> Place | None:
        try:
            return self.packs.find(cids.multihash(cid))
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return None

    def kept(self) -> Sequence[Kept]:
        """Staging files, last used first."""
        return [self._told(entry) for entry in _by_use(list(self.staging.entries.values()))]

    async def listed(self) -> Sequence[Kept]:
        """As `kept`, of any number without stopping other calls: 100,000 take half a second."""
        entries = await trio.to_thread.run_sync(_by_use, list(self.staging.entries.values()))
        found = []
        for number, entry in enumerate(entries):
            if number % AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            if not entry.dead:
                found.append(self._told(entry))
        return found

    def kept_of(self, cid: Cid) -> Kept | None:
        """A staging file, or a small block: of that its pack knows no use of its own."""
        entry = self.staging.entries.get(cids.canonical(cid))
        if entry is not None:
            return self._told(entry)
        place = self.place(cid)
        if place is None:
            return None
        pinned = "user" if self.room.kept(place.pack) else self._pin_state(cids.canonical(cid))
        return Kept(cid, place.size, place.size, True, 0.0, pinned, "")

    async def small(self) -> SmallBlocks:
        """What the packs hold; no blocks are counted where the index can't be read."""
        size = sum(self.packs.sizes.values())
        try:
            return SmallBlocks(await trio.to_thread.run_sync(self.index.count_blocks, limiter=self.reading), size)
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return SmallBlocks(0, size)

    def _told(self, entry: Entry) -> Kept:
        return Kept(entry.cid, entry.disk, entry.size, entry.whole(), entry.last_used, self._pin_state(entry.cid), entry.source)

    def _pin_state(self, cid: Cid) -> str:
        if self.room.kept(cid):
            return "user"
        return "cache" if self.pins.state(cid) == "cache" else ""

    # -- eviction and the index --------------------------------------------------------------------------------------

    async def _evict(self, key: Key) -> None:
        """Off the disk; then the node may let go of it."""
        size = self.packs.sizes.get(key, 0) if isinstance(key, int) else 0
        try:
            if isinstance(key, int):
                await self._evict_pack(key)
                return
            entry = self.staging.entries.get(key)
            if entry is not None:
                size = entry.disk
                entry.dead = True
                self.staging.forget(entry)
                await trio.to_thread.run_sync(self.staging.remove, entry, limiter=self.upkeep)
                self.pins.remove(key)
        except OSError as exc:
            self.trouble.note(f"{self.folder}: nothing can be removed", exc)
            self.room.stuck(size)

    async def _evict_pack(self, pack: int) -> None:
        for call in self.when_blocks_leave:
            call()
        size = self.packs.sizes.get(pack, 0)
        unsaid = self.packs.unsaid_in(pack)
        self.packs.close_pack(pack)
        held, end = await trio.to_thread.run_sync(self.packs.remove, pack, limiter=self.upkeep)
        if end < size:  # a damaged head hides what lies behind it: the index knows that, if not by which codec
            keys = [*unsaid, *await self.keys_in(pack)]
            held += [cids.make(codec, key) for key in keys for codec in (cids.RAW, cids.DAG_PB)]
        self.packs.forget_all(pack, held)
        self.tell_index()
        for cid in held:
            if not self.holds(cid):  # else it came back meanwhile, and may have been pinned anew; or its file is staged
                self.pins.remove(cid)

    async def keys_in(self, pack: int) -> list[bytes]:
        """The multihashes that the index has of a pack; none where it can't be read."""
        try:
            return await trio.to_thread.run_sync(self.index.keys_in, pack, limiter=self.reading)
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return []

    async def evict(self, cid: Cid | None = None) -> int:
        """As `PinsetCache.evict`."""
        if cid is None:
            return sum([await self.room.evict(key) for key in list(self.room.arc) if key in self.room.arc])  # else pinned meanwhile
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
        self.tell_index()

    def tell_index(self) -> None:
        """There is something the index does not say yet."""
        self.changed.set()
        if len(self.packs.pending) >= ROWS:
            self.much_changed.set()

    def index_failed(self, error: Exception) -> None:
        """The index gave no answer; where it is damaged, it is replaced soon."""
        if isinstance(error, Damaged):
            self.damaged = error
            self.tell_index()
        else:
            self.trouble.note(str(self.index.path), error)


def _by_use(entries: list[Entry]) -> list[Entry]:
    """Last used first."""
    return sorted(entries, key=lambda entry: -entry.last_used)
