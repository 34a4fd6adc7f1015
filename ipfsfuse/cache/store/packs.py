"""Small blocks on disk: directories, interior nodes, symlinks, files of up to 64 KiB.

They are in packs: files of about 1 MiB that are appended to until they are full, and evicted as a whole. The
index says where a block is. (As rows in SQLite, blocks would be written twice, and pages that hold one row
and a half would cost up to 1.8 times the bytes.) A pack is a sequence of CAR sections (varint length, CID,
block). So blocks that were written just before a crash, or all blocks if the index is lost, are found by
reading the packs.

Concurrency: on the event loop, except for the functions under "in a thread". The store appends one block at a
time. Rows wait in `pending`, and are written to the index later.
"""

import contextlib
import logging
import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

from ipfsfuse.cache.base import SmallBlocks
from ipfsfuse.cache.budget import Budget, WriteBackoff
from ipfsfuse.cache.store.folder import Subfolder, is_our_own, report_strays
from ipfsfuse.cache.store.index import Damaged, Index, Statements
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag import varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid, StoreFailed, Unsupported, WrongBlock
from ipfsfuse.fileio import threads
from ipfsfuse.fileio.files import Closing, write_all
from ipfsfuse.sources.base import Caller, current_request

T = TypeVar("T")

log = logging.getLogger(__name__)

PACK_SUFFIX = ".pack"
_NAME = re.compile(r"([1-9][0-9]{0,17})\.pack")
MAX_OPEN_PACKS = 64
"""Packs that are kept open for reading."""
_HEAD = 160
"""Bytes that are enough for the length and the CID of a section: no allowed digest is longer than 128."""
ON_LOOP = 32 << 10
"""Blocks of up to so many bytes are read and hashed on the event loop. That takes 10 to 30 us, less than a
thread costs."""
WRITE_ON_LOOP = 64 << 10
"""Sections of up to so many bytes are written on the event loop, which takes 30 us."""
RECENT_PACKS = 2
"""A use of a block in one of the last packs is part of the use for which it was fetched."""
ROWS = 512
"""Rows that are written to the index together."""


class PackLocation(NamedTuple):
    pack: int
    at: int
    size: int


class PackSet:
    """Packs that are filled one after the other."""

    def __init__(self) -> None:
        self.packs: list[int] = []

    @property
    def pack(self) -> int:
        """The pack that is being filled; 0 if there is none yet."""
        return self.packs[-1] if self.packs else 0


class Section(NamedTuple):
    """One block as it is stored in a pack."""

    cid: Cid
    data: bytes
    head: int
    """The offset in `data` at which the block begins."""


def section(cid: Cid, block: bytes) -> Section:
    head = varint.put(len(cid) + len(block)) + cid
    return Section(cid, head + block, len(head))


class Packs:
    def __init__(self, path: Path, index: Index, limit: int) -> None:
        """`limit`: bytes after which a new pack is begun. Raises StoreFailed, OSError."""
        self.folder = Subfolder(path)
        self._index = index
        self.limit = limit
        self._files: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        """The bytes written to each pack. Until `inventoried`, some packs are missing here."""
        self.inventoried = False
        self.last = 0
        """The highest number in use."""
        self.pending: dict[bytes, PackLocation | None] = {}
        """Locations that are not in the index yet; None for a row that must be deleted."""
        self._unindexed: set[int] = set()
        self._gone: list[tuple[bytes, int]] = []
        self._gone_packs: list[tuple[int]] = []

    # -- on the event loop -----------------------------------------------------------------------------------

    def find(self, keys: Iterable[bytes]) -> dict[bytes, PackLocation]:
        """The locations of those blocks that are stored, by multihash. Raises what the index raises."""
        locations, unknown = dict[bytes, PackLocation | None](), list[bytes]()
        for key in keys:
            if key in self.pending:
                locations[key] = self.pending[key]
            else:
                unknown.append(key)
        for key, *numbers in self._index.locate_each(unknown):
            if all(type(number) is int for number in numbers):
                locations[key] = PackLocation(*numbers)
        return {key: found for key, found in locations.items() if found is not None and self._has(found)}

    def _has(self, location: PackLocation) -> bool:
        """Whether `location` is inside a pack. It is not if the pack was evicted, or if a bit flipped in the
        row: SQLite has no checksums."""
        return 0 <= location.at <= location.at + location.size <= self._size(location.pack)

    def _size(self, pack: int) -> int:
        """The bytes written to a pack; -1 if there is no such pack. Until all packs are known, looks for it
        on the disk."""
        size = self.sizes.get(pack, -1)
        if size < 0 and not self.inventoried:
            with contextlib.suppress(OSError, StoreFailed):
                info = self.folder.stat(_name(pack))
                if is_our_own(info):
                    size = self.sizes[pack] = info.st_size
        return size

    def read(self, location: PackLocation) -> bytes:
        """The unverified bytes at `location`. Raises OSError."""
        file = self._files.get(location.pack)
        if file is None:
            if len(self._files) >= MAX_OPEN_PACKS:
                os.close(self._files.pop(next(iter(self._files))))
            file = self._files[location.pack] = self.open(location.pack, os.O_RDONLY)
        return os.pread(file, location.size, location.at)

    def choose(self, packs: PackSet, size: int) -> int:
        """The pack of `packs` for the next `size` bytes. Begins a new one if the last is too full."""
        filled = self.sizes.get(packs.pack)
        if filled is None or filled + size > self.limit:
            self.last += 1
            packs.packs.append(self.last)
        return packs.pack

    def note(self, pack: int, at: int, sections: Iterable[Section]) -> None:
        """Notes that `sections` were written to `pack`, one after the other, beginning at `at`."""
        for cid, data, head in sections:
            self.pending[cids.multihash(cid)] = PackLocation(pack, at + head, len(data) - head)
            at += len(data)
        self.sizes[pack] = at
        self._unindexed.add(pack)

    def forget(self, key: bytes) -> None:
        """Removes `key` from the index."""
        self.pending[key] = None

    def unindexed_in(self, pack: int) -> list[bytes]:
        """The multihashes of blocks in `pack` that are not in the index yet."""
        return [key for key, found in self.pending.items() if found is not None and found.pack == pack]

    def close_pack(self, pack: int) -> None:
        """Forgets a pack that is about to be removed, and closes its file."""
        self.sizes.pop(pack, None)
        if (file := self._files.pop(pack, None)) is not None:
            os.close(file)
        for key in self.unindexed_in(pack):
            del self.pending[key]
        self._gone_packs.append((pack,))

    def drop_empty(self, pack: int) -> None:
        """Removes the file of a pack without blocks, which a failed append may have left."""
        if not self.sizes.get(pack):
            self.sizes.pop(pack, None)
            with contextlib.suppress(OSError):
                self.folder.unlink(_name(pack))

    def forget_all(self, pack: int, blocks: Iterable[Cid]) -> None:
        """Removes `blocks`, which were in the removed `pack`, from the index."""
        self._gone += [(cids.multihash(cid), pack) for cid in blocks]

    def unwritten(self) -> tuple[dict[bytes, PackLocation | None], Statements]:
        """What is pending, and the statements that write it."""
        batch = dict(self.pending)
        locations = [(key, *location) for key, location in batch.items() if location is not None]
        gone = [(key,) for key, location in batch.items() if location is None]
        sizes = [(pack, self.sizes[pack]) for pack in self._unindexed if pack in self.sizes]
        forgotten, packs = self._gone, self._gone_packs
        self._unindexed.clear()
        self._gone, self._gone_packs = [], []
        return batch, [
            ("DELETE FROM blocks WHERE key = ? AND pack = ?", forgotten),
            ("DELETE FROM packs WHERE pack = ?", packs),
            ("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", locations),
            ("DELETE FROM blocks WHERE key = ?", gone),
            ("INSERT OR REPLACE INTO packs VALUES (?, ?)", sizes),
        ]

    def written(self, batch: dict[bytes, PackLocation | None]) -> None:
        """Notes that `batch` is in the index now."""
        for key, location in batch.items():
            if self.pending.get(key, batch) is location:
                del self.pending[key]

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    # -- in a thread -----------------------------------------------------------------------------------------

    def read_apart(self, location: PackLocation) -> bytes:
        """Reads a block in a worker thread. Opens the pack itself, because the open files belong to the event
        loop."""
        with Closing(self.open(location.pack, os.O_RDONLY)) as file:
            return os.pread(file, location.size, location.at)

    def path(self, pack: int) -> Path:
        """The path of a pack, for messages."""
        return self.folder.path / _name(pack)

    def open(self, pack: int, flags: int) -> int:
        """A descriptor of a pack. Raises OSError."""
        return self.folder.open(_name(pack), flags)

    def write(self, pack: int, at: int, data: bytes) -> None:
        """Writes sections at `at`. Small ones are written on the event loop, which takes 10 us (page
        cache)."""
        with Closing(self.open(pack, os.O_WRONLY | os.O_CREAT)) as file:
            write_all(file, data, at)

    def scan(self) -> Iterator[tuple[int, os.stat_result]]:
        """The packs of an earlier run. Removes files with the name of a pack that are not our own; leaves
        other names alone."""
        strays = []
        for name in self.folder.names():
            matched, info = _NAME.fullmatch(name), self.folder.stat(name)
            if matched is None or stat.S_ISDIR(info.st_mode):
                strays.append(name)
            elif is_our_own(info):
                yield int(matched[1]), info
            else:
                self.folder.unlink(name)
        report_strays(self.folder.path, strays)

    def sections(self, pack: int, start: int = 0) -> Iterator[tuple[Cid, PackLocation]]:
        """(CID, location) of the blocks in `pack` from `start` on, as far as it can be read."""
        with (
            contextlib.suppress(OSError, Malformed, NotACid),
            Closing(self.open(pack, os.O_RDONLY)) as file,
        ):
            end, at = os.fstat(file).st_size, start
            while at < end:
                head = os.pread(file, _HEAD, at)
                length, behind = varint.get(head, 0)
                cid, block = cids.decode_prefix(head, behind)
                size = length - (block - behind)
                if size < 0 or at + block + size > end:
                    return
                yield cid, PackLocation(pack, at + block, size)
                at += block + size

    def remove(self, pack: int) -> tuple[list[Cid], int]:
        """Deletes the file. Returns the blocks that were in it, as far as it could be read, and the offset up
        to which it could be read."""
        blocks, end = [], 0
        for cid, location in self.sections(pack):
            blocks.append(cid)
            end = location.at + location.size
        with contextlib.suppress(FileNotFoundError):
            self.folder.unlink(_name(pack))
        return blocks, end


def _name(pack: int) -> str:
    return f"{pack}{PACK_SUFFIX}"


# -- repair, in a thread: sections are rewritten in place, so that a repaired block needs no new room


def rewrite_block(packs: Packs, location: PackLocation, data: bytes, head: int) -> bool:
    """Writes the block of the section `data` (from offset `head` in it) at `location`. Returns False and
    writes nothing if the head before that location is different: then the location is wrong. Raises
    OSError."""
    if location.size != len(data) - head or location.at < head:
        return False
    with Closing(packs.open(location.pack, os.O_RDWR)) as file:
        if os.pread(file, head, location.at - head) != data[:head]:
            return False
        write_all(file, memoryview(data)[head:], location.at)
        return True


def head_before(packs: Packs, key: bytes, location: PackLocation) -> tuple[Cid, bool]:
    """The CID of the block with the multihash `key` at `location`, and whether the head before it is intact.

    A multihash does not contain the codec. If the head is damaged, the codec that differs from it by fewer
    bits is assumed. Raises OSError."""
    with Closing(packs.open(location.pack, os.O_RDONLY)) as file:
        found: dict[Cid, int] = {}
        for cid in (cids.make(codec, key) for codec in cids.CODECS):
            head = _head(cid, location)
            found[cid] = _turned(head, os.pread(file, len(head), max(0, location.at - len(head))))
    intact = [cid for cid, turned in found.items() if not turned]
    if intact:
        return intact[0], True
    # raw or dag-pb, which nearly all blocks are
    return min(list(found)[:2], key=found.__getitem__), False


def rewrite_head(packs: Packs, cid: Cid, location: PackLocation) -> None:
    """Writes the head before the verified block at `location`. Raises OSError."""
    head = _head(cid, location)
    with Closing(packs.open(location.pack, os.O_WRONLY)) as file:
        write_all(file, head, location.at - len(head))


def _head(cid: Cid, location: PackLocation) -> bytes:
    _cid, data, begins = section(cid, bytes(location.size))
    return data[:begins]


def _turned(one: bytes, other: bytes) -> int:
    """The number of bits that differ."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


def _proved(read: Callable[[PackLocation], bytes], cid: Cid, location: PackLocation) -> bytes:
    block = read(location)
    if not multihashes.matches(cids.multihash(cid), (block,)):
        raise WrongBlock(cids.text(cid))
    return block


class IoLimits:
    """Limits how many worker threads use the disk at a time, for each kind of work."""

    def __init__(self) -> None:
        self.reading = trio.CapacityLimiter((os.cpu_count() or 1) + 2)
        self.writing = trio.CapacityLimiter(4)
        self.background = trio.CapacityLimiter(2)


@asynccontextmanager
async def _holding(lock: trio.Lock) -> AsyncIterator[None]:
    """`async with lock` without its checkpoint if the lock is free: a checkpoint costs 20 us."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


class BlockStore:
    """Blocks by their multihash, in packs and within the budget. They are verified when they are read.

    A block that can't be read counts as missing; a block that can't be written is not stored. `backoff` says
    why. One append runs at a time."""

    def __init__(
        self, packs: Packs, index: Index, budget: Budget, backoff: WriteBackoff, io: IoLimits, unit: int
    ) -> None:
        """`unit`: bytes of a block of the file system."""
        self.packs = packs
        self.index = index
        self.when_blocks_leave: list[Callable[[], None]] = []
        self.packs_indexed = trio.Event()
        """Set when the index has every block in the packs."""
        self.statements: list[tuple[str, Sequence[Sequence[Any]]]] = []
        """Statements for the index, besides those for the locations of blocks."""
        self.damaged: Damaged | None = None
        self.index_lock = trio.Lock()
        self.changed, self.much_changed = trio.Event(), trio.Event()
        """Set when something must be written to the index; and when it should be written at once."""
        self._budget = budget
        self._backoff = backoff
        self._io = io
        self._unit = unit
        self._pack_sets: dict[Caller, PackSet] = {}
        self._set_aside: dict[bytes, PackLocation] = {}
        """The locations of wrong blocks, by multihash, until they are fetched again."""
        self._appending = trio.Lock()

    @property
    def pack_set(self) -> PackSet:
        """The packs for blocks that are not pinned. Each caller has its own, which are charged to it."""
        return self._pack_sets.setdefault(current_request.get().caller, PackSet())

    # -- reading ---------------------------------------------------------------------------------------------

    def locate(self, cid: Cid) -> PackLocation | None:
        return self.locate_each((cid,)).get(cids.multihash(cid))

    def locate_each(self, wanted: Iterable[Cid]) -> dict[bytes, PackLocation]:
        """The locations of those blocks that are stored, by multihash."""
        try:
            return self.packs.find(map(cids.multihash, wanted))
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return {}

    async def get(self, cid: Cid, *, use: bool = True) -> bytes | None:
        """The verified block; None if it is missing or wrong (then it is set aside). Without `use`, the read
        does not count as a use of its pack."""
        location = self.locate(cid)
        if location is None:
            return None
        if use:
            self._used_pack(location.pack)
        try:
            if location.size <= ON_LOOP:
                return _proved(self.packs.read, cid, location)
            return await threads.run_sync(
                _proved, self.packs.read_apart, cid, location, limiter=self._io.reading
            )
        except WrongBlock:
            log.warning("%s: wrong bytes in the cache, set aside", cids.text(cid))
            self._set_aside[cids.multihash(cid)] = location
        except OSError as exc:
            if location.pack in self.packs.sizes:
                self._backoff.failed(str(self.packs.path(location.pack)), exc)
        self.packs.forget(cids.multihash(cid))
        self.wake_index_writer()
        return None

    async def take_back(self, cid: Cid, location: PackLocation) -> bool:
        """Adds the block to the index again if the bytes at `location` match `cid`. Returns whether they
        do."""
        try:
            await threads.run_sync(_proved, self.packs.read_apart, cid, location, limiter=self._io.reading)
        except (WrongBlock, Unsupported, OSError):
            return False
        if location.pack not in self.packs.sizes:
            return False
        if self.packs.pending.get(cids.multihash(cid)) is None:
            self.packs.pending[cids.multihash(cid)] = location
        self.wake_index_writer()
        return True

    def _used_pack(self, pack: int) -> None:
        if pack < self.packs.last - RECENT_PACKS:
            self._budget.arc.use(pack, current_request.get().caller)
        else:
            self._budget.arc.refresh(pack)

    async def put(self, cid: Cid, block: bytes, pack_set: PackSet | None = None) -> bool:
        """Stores a block in a pack of `pack_set`, whose packs are pinned; by default in any pack. Returns
        whether it is stored now."""
        if self._backoff.waiting or not self._budget.counted.is_set():
            return False
        made = section(cids.canonical(cid), block)
        async with _holding(self._appending):
            location = self.locate(cid)
            if location is not None and (pack_set is None or location.pack in pack_set.packs):
                return True
            return await self._repaired(made, pack_set) or await self._append(
                pack_set or self.pack_set, [made]
            )

    async def put_many(self, blocks: Iterable[tuple[Cid, bytes]]) -> bool:
        """Stores several new blocks in a few writes: opening a pack costs as much as writing a small block.
        Whether all of them are stored now."""
        if self._backoff.waiting or not self._budget.counted.is_set():
            return False
        async with _holding(self._appending):
            stored, together = True, list[Section]()
            room = self.packs.limit - self.packs.sizes.get(self.pack_set.pack, 0)
            for made in (section(cids.canonical(cid), block) for cid, block in blocks):
                if self._set_aside and await self._repaired(made, None):
                    continue
                if len(made.data) > room:
                    if together:
                        stored &= await self._append(self.pack_set, together)
                    together, room = [], self.packs.limit  # a new pack is begun
                together.append(made)
                room -= len(made.data)
            if together:
                stored &= await self._append(self.pack_set, together)
            return stored

    async def _repaired(self, made: Section, pack_set: PackSet | None) -> bool:
        """Writes the block where a wrong one was set aside, so that what is pinned stays pinned. Returns
        whether that was done."""
        cid, data, head = made
        location = self._set_aside.pop(cids.multihash(cid), None)
        packs = self.packs.sizes if pack_set is None else pack_set.packs
        if location is None or location.pack not in packs:
            return False
        try:
            done = await threads.run_sync(
                rewrite_block, self.packs, location, data, head, limiter=self._io.writing
            )
        except OSError as exc:
            self._backoff.failed(str(self.packs.path(location.pack)), exc)
            return False
        if not done or location.pack not in self.packs.sizes:
            return False
        self.packs.pending[cids.multihash(cid)] = location
        self.wake_index_writer()
        return True

    async def _room_in(self, pack_set: PackSet, size: int) -> tuple[int, int] | None:
        """The pack of `pack_set` for `size` more bytes, and the bytes that are reserved for them, which the
        caller must give to `Budget.adjust`. None if there is no room."""
        while True:
            pack = self.packs.choose(pack_set, size)
            if pack_set is not self.pack_set:
                self._budget.pin(pack)
            filled = self.packs.sizes.get(pack, 0)
            cost = await self._budget.reserve(pack, filled, filled + size)
            if not cost:
                return None
            if self.packs.sizes.get(pack, 0) == filled:
                return pack, cost
            # the pack itself was evicted to make room: its number is not used again
            self._budget.adjust(pack, -cost, reserved=cost)

    async def _append(self, pack_set: PackSet, sections: Sequence[Section]) -> bool:
        """Appends `sections` to the last pack of `pack_set`, in one write. Returns False if there is no
        room."""
        data = sections[0].data if len(sections) == 1 else b"".join(made.data for made in sections)
        found = await self._room_in(pack_set, len(data))
        if found is None:
            return False
        pack, cost = found
        at = self.packs.sizes.setdefault(pack, 0)
        try:
            if len(data) <= WRITE_ON_LOOP:
                self.packs.write(pack, at, data)
            else:
                await threads.run_sync(self.packs.write, pack, at, data, limiter=self._io.writing)
            if pack not in self.packs.sizes:  # evicted while a thread wrote
                self.packs.drop_empty(pack)
                return False
            self._backoff.succeeded()
            self.packs.note(pack, at, sections)
            self.wake_index_writer()
            return True
        except OSError as exc:
            self._backoff.failed(str(self.packs.path(pack)), exc)
            self._budget.look_soon()
            self.packs.drop_empty(pack)
            return False
        finally:
            self._adjust_pack(pack, cost)

    def _adjust_pack(self, pack: int, reserved: int = 0) -> None:
        size, unit = self.packs.sizes.get(pack, 0), self._unit
        charge = -(-size // unit) * unit + unit if size else 0
        self._budget.adjust(pack, charge - self._budget.size(pack), reserved)

    # -- eviction and the index ------------------------------------------------------------------------------

    async def evict(self, pack: int) -> list[Cid]:
        """Deletes a pack. Returns the blocks that were in it. Raises OSError."""
        for call in self.when_blocks_leave:
            call()
        size = self.packs.sizes.get(pack, 0)
        unindexed = self.packs.unindexed_in(pack)
        self.packs.close_pack(pack)
        blocks, end = await threads.run_sync(self.packs.remove, pack, limiter=self._io.background)
        # A damaged head hides the blocks after it. The index has their multihashes, but not their codecs.
        if end < size:
            keys = [*unindexed, *await self.keys_in(pack)]
            blocks += [cids.make(codec, key) for key in keys for codec in (cids.RAW, cids.DAG_PB)]
        self.packs.forget_all(pack, blocks)
        self.wake_index_writer()
        return blocks

    async def keys_in(self, pack: int) -> list[bytes]:
        """The multihashes of a pack's blocks in the index; none if the index can't be read."""
        return await self._ask_index(partial(self.index.keys_in, pack), [])

    async def count(self) -> SmallBlocks:
        """The number and size of blocks in packs; the number is 0 if the index can't be read."""
        size = sum(self.packs.sizes.values())
        return SmallBlocks(await self._ask_index(self.index.count_blocks, 0), size)

    async def _ask_index(self, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return await threads.run_sync(ask, limiter=self._io.reading)
        except (StoreFailed, Damaged) as exc:
            self.index_failed(exc)
            return otherwise

    def write_later(self, sql: str, arguments: Sequence[Any]) -> None:
        """Adds a statement for the index."""
        self.statements.append((sql, [arguments]))
        self.wake_index_writer()

    def wake_index_writer(self) -> None:
        """Notes that something must be written to the index."""
        self.changed.set()
        if len(self.packs.pending) >= ROWS:
            self.much_changed.set()

    def index_failed(self, error: Exception) -> None:
        """Notes that the index could not be read. If it is damaged, it is replaced soon."""
        if isinstance(error, Damaged):
            self.damaged = error
            self.wake_index_writer()
        else:
            self._backoff.failed(str(self.index.path), error)
            self._budget.look_soon()
