"""What lies on the disk: staging files, packs and the index, the budget they share, and who may ask for how
much of it.

Nothing here raises for what is wrong with the disk: `backoff` says it. Concurrency: the event loop's; disk
work over some KiB runs in worker threads.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from ipfsfuse.cache import clock
from ipfsfuse.cache.base import Kept, NoPins, Pins, SmallBlocks
from ipfsfuse.cache.budget import Budget, Key
from ipfsfuse.cache.store.folder import INDEX, PACKS, PINNED, STAGING
from ipfsfuse.cache.store.index import Damaged, Index
from ipfsfuse.cache.store.packs import Packs, PackSet, Place
from ipfsfuse.cache.store.pin_records import PinRecord, PinRecords
from ipfsfuse.cache.store.space import FreeSpace, disk_usage
from ipfsfuse.cache.store.staging import Entry, Staging
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Caller, current_request

log = logging.getLogger(__name__)

ROWS = 512
"""Rows that are written to the index at once."""
SMALL = 64 << 10
"""Files of up to so many bytes lie in packs."""


AT_ONCE = 500
"""Staging files that are told of before other calls have their turn: some milliseconds."""

RETRY = 5.0
"""Seconds after a failed write in which nothing is written."""


class WriteBackoff:
    """What is wrong with the disk just now. Reads go on uncached; `status` says why, and the log once."""

    def __init__(self) -> None:
        self.reason = ""
        """What is wrong, "" where nothing is."""
        self._until = 0.0

    @property
    def waiting(self) -> bool:
        """Whether it is too early to try again."""
        return bool(self.reason) and trio.current_time() < self._until

    def failed(self, what: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = reason if reason.startswith(what) else f"{what}: {reason}"
        if not self.reason:
            log.warning("%s; reads go on without the cache", text)
        self.reason = text
        self._until = trio.current_time() + RETRY

    def succeeded(self) -> None:
        if self.reason:
            log.info("the cache can be written again")
            self.reason = ""


class Disk:
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
        self.space = FreeSpace(folder, reserve)
        self.small_budget = min(budget, self.space.total or budget)
        """What the sizes of packs, of the index's write-ahead log and of its margin are derived from."""
        self.staging = Staging(folder / STAGING)
        self.pin_records = PinRecords(folder / PINNED)
        self.index = Index(folder / INDEX, self.small_budget, self.pin_records.take_over)
        self.packs = Packs(folder / PACKS, self.index, max(SMALL, min(1 << 20, self.small_budget // 64)))
        self.budget = Budget(budget, self._evict, self.space.spare)
        self.backoff = WriteBackoff()
        self._full = False
        self.when_blocks_leave: list[Callable[[], None]] = []
        self.pins: Pins = pins or NoPins()
        self.nursery = nursery
        self.pinned: dict[Cid, PinRecord] = {}
        """What was pinned when the store was opened."""
        self.packs_indexed = trio.Event()
        """Set when the index says of every block in the packs where it lies."""
        self._pack_sets: dict[Caller, PackSet] = {}
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
    def pack_set(self) -> PackSet:
        """Where blocks go that nobody asked to keep: packs of each caller's own, which leave on its account
        alone."""
        return self._pack_sets.setdefault(current_request().caller, PackSet())

    # -- what is there ---------------------------------------------------------------------------------------

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
        entries = await threads.run_sync(_by_use, list(self.staging.entries.values()))
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
        pinned = "user" if self.budget.kept(place.pack) else self._pin_state(cids.canonical(cid))
        return Kept(cid, place.size, place.size, True, 0.0, pinned, "")

    async def small(self) -> SmallBlocks:
        """What the packs hold; no blocks are counted where the index can't be read."""
        size = sum(self.packs.sizes.values())
        try:
            return SmallBlocks(await threads.run_sync(self.index.count_blocks, limiter=self.reading), size)
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return SmallBlocks(0, size)

    def _told(self, entry: Entry) -> Kept:
        used = clock.to_wall(entry.last_used)
        return Kept(
            entry.cid, entry.disk, entry.size, entry.whole(), used, self._pin_state(entry.cid), entry.source
        )

    def _pin_state(self, cid: Cid) -> str:
        if self.budget.kept(cid):
            return "user"
        return "cache" if self.pins.state(cid) == "cache" else ""

    # -- eviction and the index ------------------------------------------------------------------------------

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
                await threads.run_sync(self.staging.remove, entry, limiter=self.upkeep)
                self.pins.remove(key)
        except OSError as exc:
            self.backoff.failed(f"{self.folder}: nothing can be removed", exc)
            self.budget.stuck(size)

    async def _evict_pack(self, pack: int) -> None:
        for call in self.when_blocks_leave:
            call()
        size = self.packs.sizes.get(pack, 0)
        unindexed = self.packs.unindexed_in(pack)
        self.packs.close_pack(pack)
        held, end = await threads.run_sync(self.packs.remove, pack, limiter=self.upkeep)
        # a damaged head hides what lies behind it: the index knows that, if not by which codec
        if end < size:
            keys = [*unindexed, *await self.keys_in(pack)]
            held += [cids.make(codec, key) for key in keys for codec in (cids.RAW, cids.DAG_PB)]
        self.packs.forget_all(pack, held)
        self.tell_index()
        for cid in held:
            # else it came back meanwhile, and may have been pinned anew; or its file is staged
            if not self.holds(cid):
                self.pins.remove(cid)

    async def keys_in(self, pack: int) -> list[bytes]:
        """The multihashes that the index has of a pack; none where it can't be read."""
        try:
            return await threads.run_sync(self.index.keys_in, pack, limiter=self.reading)
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return []

    async def evict(self, cid: Cid | None = None) -> int:
        """As `PinsetCache.evict`."""
        if cid is None:
            # else pinned meanwhile
            return sum(
                [await self.budget.evict(key) for key in list(self.budget.arc) if key in self.budget.arc]
            )
        key: Key = cids.canonical(cid)
        if key not in self.staging.entries:
            place = self.place(cid)
            if place is None:
                return 0
            key = place.pack
        if self.budget.kept(key):
            raise UsageError(f"{cids.text(cid)} is kept for good: unpin it first")
        return await self.budget.evict(key)

    def holds(self, cid: Cid) -> bool:
        """Whether `cid` itself is staged, at least in part."""
        return cids.canonical(cid) in self.staging.entries or self.place(cid) is not None

    def rest_on_disk(self) -> int:
        """Bytes on disk of all that lies in the folder besides staging files and packs, the folders
        themselves included. In any thread."""
        return disk_usage(self.folder, but_in=(self.staging.path, self.packs.folder.path))

    def no_room(self) -> str:
        """Why nothing new can be kept, "" where that is not so."""
        budget, space = self.budget, self.space
        if budget.arc.capacity >= SMALL:
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
        reason = self.no_room()
        if bool(reason) != self._full:
            self._full = bool(reason)
            if reason:
                log.warning("%s; reads go on without the cache", reason)
            else:
                log.info("there is room in the cache again")

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
            self.backoff.failed(str(self.index.path), error)
            self.budget.look_soon()


def _by_use(entries: list[Entry]) -> list[Entry]:
    """Last used first."""
    return sorted(entries, key=lambda entry: -entry.last_used)
