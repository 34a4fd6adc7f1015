"""Sources whose blocks lie in CAR files on this machine: one file, or the library. Their blocks are read in
place, so none is staged.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import LeafRange, Source, has_claimed_size
from ipfsfuse.sources.local.car_file import (
    CarFile,
    CarLocation,
    Found,
    IndexProgress,
    Read,
    ensure_index,
    read_cached,
    read_disk,
    readable,
)
from ipfsfuse.sources.local.library import Library
from ipfsfuse.sources.streams import Delivery, JobOrder, Leases, Send, all_of, consecutive, segments_of

# -- long reads ----------------------------------------------------------------------------------------------

SEGMENTS_IN_MEMORY = 8
"""Segments of up to 4 MiB that may be in memory at a time, for all readers of all CAR files."""
READ_TASKS = 2
"""Segments of one file that are read at a time."""
_MAX_GAP = 4 << 10
"""The largest gap between two blocks of one read: to read the gap is cheaper than a second read."""
_ALONE = 128 << 10
"""Blocks of this size or more are read one by one: that saves copying them out of a longer read."""


IndexedBlocks = list[tuple[int, bytes]]
"""(index of the leaf, block)."""

Find = Callable[[Cid], Found | None]
"""Blocking; called in worker threads. None for a block that is not here."""


_room = trio.lowlevel.RunVar[trio.Semaphore]("segments of CAR files")


def _room_of_run() -> trio.Semaphore:
    try:
        return _room.get()
    except LookupError:
        _room.set(room := trio.Semaphore(SEGMENTS_IN_MEMORY))
        return room


async def send_found(leaves: Sequence[Leaf], find: Find, send: Send[Delivery]) -> None:
    """Sends the blocks of `leaves` that `find` finds and that fit, in their order. Raises SourceFailed."""
    room = _room_of_run()
    segments = segments_of(leaves)
    order = JobOrder()

    async def work() -> None:
        for start, segment in segments:
            slot = order.take()
            await room.acquire()  # in the order of the segments, since each segment waits for those before it
            release = leases.take(1)
            rows = list(consecutive(await threads.run_sync(_read_segment, start, segment, find)))
            async with slot:
                for first, blocks in rows[:-1]:
                    await send.send(Delivery(first, blocks))
                if rows:
                    await send.send(Delivery(*rows.pop(), release))
                else:
                    release()
            del rows  # frees the blocks before the next segment is read

    with closing(Leases(lambda _one: room.release())) as leases:
        await all_of([work] * READ_TASKS)


def _read_segment(start: int, leaves: Sequence[Leaf], find: Find) -> IndexedBlocks:
    """(index, block) of every leaf that is found and fits. Raises SourceFailed."""
    found = [
        (start + index, where)
        for index, leaf in enumerate(leaves)
        if (where := find(leaf.cid)) is not None and has_claimed_size(leaf, where.location.size)
    ]
    blocks: IndexedBlocks = []
    while found:
        count = 1  # blocks that one read covers
        while count < len(found) and _adjoin(found[count - 1][1], found[count][1]):
            count += 1
        blocks += _read_together(found[:count])
        del found[:count]
    return blocks


def _adjoin(one: Found, other: Found) -> bool:
    gap = other.location.offset - one.location.offset - one.location.size
    return other.file is one.file and 0 <= gap <= _MAX_GAP and one.location.size < _ALONE


def _read_together(near: list[tuple[int, Found]]) -> IndexedBlocks:
    file, first = near[0][1]
    if len(near) == 1:
        return [(near[0][0], file.read(first))]
    last = near[-1][1].location
    data = memoryview(file.read(CarLocation(first.offset, last.offset + last.size - first.offset)))
    return [
        (index, bytes(data[location.offset - first.offset :][: location.size]))
        for index, (_file, location) in near
    ]


# -- the source ----------------------------------------------------------------------------------------------


class InPlaceSource(Source):
    """A source whose blocks lie in CAR files on this machine.

    Blocks that the page cache holds are read at once on the event loop (10 us; a worker thread costs 80).
    All other blocks are read in worker threads. For long reads (`send_found`), neighbouring blocks are read
    together, and the next segment is read while one is delivered. Only blocks that fit their leaves are read:
    so the claimed sizes of the leaves bound the memory of a segment. All calls together hold at most
    SEGMENTS_IN_MEMORY."""

    in_place = True

    @abstractmethod
    def find(self, cid: Cid, read: Read = read_disk) -> Found | None:
        """Where the block is; None if it is not here. Raises SourceFailed, and BlockingIOError if `read`
        does."""

    async def get(self, cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        try:
            found = self.find(cid, read_cached)
        except BlockingIOError:
            found = await threads.run_sync(self.find, cid)
        found = readable(self.name, cid, found)
        with suppress(BlockingIOError):
            return found.file.read_small(found.location)
        return await threads.run_sync(found.file.read, found.location)

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        await send_found(wanted.leaves, self.find, send)


class CarSource(InPlaceSource):
    """One file as a source. `whole` is False if the file is damaged: blocks before the damage can be read."""

    def __init__(self, file: CarFile, whole: bool = True) -> None:
        """`file` must have an index. Takes `file` over. Most callers want `open`."""
        self._file = file
        self.name = file.name
        self.path = file.path
        self.whole = whole

    @classmethod
    def open(cls, path: Path, indexes: Path, progress: IndexProgress | None = None) -> "CarSource":
        """Opens the CAR file at `path`. If the file has no index, builds one in the folder `indexes`, and
        blocks meanwhile.

        Raises SourceFailed: no such file, empty, not a CAR, a wrong header, an index that can't be written.
        """
        file = CarFile(path)
        try:
            return cls(file, ensure_index(file, indexes, progress))
        except BaseException:
            file.close()
            raise

    def find(self, cid: Cid, read: Read = read_disk) -> Found | None:
        location = self._file.find(cids.multihash(cid), read)
        return Found(self._file, location) if location else None

    def roots(self) -> Sequence[Cid]:
        return self._file.roots

    async def aclose(self) -> None:
        await threads.run_sync(self._file.close)


class LibrarySource(InPlaceSource):
    """The library as a source."""

    name = "library"

    def __init__(self, library: Library) -> None:
        """Takes `library` over."""
        self.library = library

    def find(self, cid: Cid, read: Read = read_disk) -> Found | None:
        return self.library.packs.find(cids.multihash(cid), read)

    def roots(self) -> Sequence[Cid]:
        try:
            return self.library.roots()
        except StoreFailed:  # the folder is gone
            return ()

    async def aclose(self) -> None:
        await threads.run_sync(self.library.close)
