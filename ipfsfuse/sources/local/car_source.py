"""A CAR file as a source: read in place, by multihash, never staged again.

Blocks that the page cache holds are read at once on the event loop (10 us; a worker thread costs 80).
Everything else is read in worker threads. For long reads (`stream_places`), blocks that lie side by side are
read together, and the next read runs while one is delivered. Only blocks that fit their leaves are read, so
the leaves' sizes, which are claims, bound the memory of a group. All calls together hold GROUPS groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import outcome
import trio
from outcome import Outcome

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Deliver, DeliverBlocks, LeafRange, Subtree, fits, too_large
from ipfsfuse.sources.local.car_file import CarFile, IndexProgress, Place, ensure_index, read_cached

# -- long reads ----------------------------------------------------------------------------------------------

GROUP_BYTES = 8 << 20
GROUPS = 4
"""Groups that may be in memory at a time, of all readers of all CAR files."""
_GROUP_LEAVES = 512
_MAX_GAP = 4 << 10
"""Reading over so many bytes that nobody wants is cheaper than a read of its own."""
_ALONE = 128 << 10
"""Blocks of this size or more are read each by itself: that saves copying them out of a longer read."""


class Found(NamedTuple):
    """Where a leaf's block lies."""

    file: CarFile
    place: Place


Blocks = list[tuple[int, bytes]]
"""(index in the run, block)."""

Find = Callable[[Cid], Found | None]
"""Blocking; called in worker threads. None for a block that is not here."""


_room = trio.lowlevel.RunVar[trio.Semaphore]("groups of blocks from CAR files")


def _room_of_run() -> trio.Semaphore:
    try:
        return _room.get()
    except LookupError:
        _room.set(room := trio.Semaphore(GROUPS))
        return room


async def stream_places(run: LeafRange, find: Find, deliver: Deliver) -> None:
    """Delivers the blocks of `run` that `find` finds and that fit, in the run's order. Raises
    SourceFailed."""
    send, receive = trio.open_memory_channel[Outcome[Blocks]](0)
    room = _room_of_run()
    failure: Exception | None = None
    async with trio.open_nursery() as nursery, receive:
        nursery.start_soon(_read_ahead, run.leaves, find, send, room)
        try:
            async for blocks in receive:
                try:
                    for index, block in blocks.unwrap():
                        await deliver(index, [block])
                finally:
                    del blocks  # before the next group is read in its place
                    room.release()
        except Exception as exc:  # kept out of the nursery, which would wrap it
            failure = exc
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _read_ahead(
    leaves: Sequence[Leaf], find: Find, send: trio.MemorySendChannel[Outcome[Blocks]], room: trio.Semaphore
) -> None:
    """Sends group by group, each with a place in the `room`, which its receiver gives back."""
    async with send:
        for start, group in _groups(leaves):
            await room.acquire()
            try:
                await send.send(await threads.run_sync(outcome.capture, _read_group, start, group, find))
            except BaseException:
                room.release()
                raise


def _groups(leaves: Sequence[Leaf]) -> Iterator[tuple[int, Sequence[Leaf]]]:
    start = size = 0
    for index, leaf in enumerate(leaves):
        if index > start and (size + leaf.size > GROUP_BYTES or index - start == _GROUP_LEAVES):
            yield start, leaves[start:index]
            start, size = index, 0
        size += leaf.size
    if leaves:
        yield start, leaves[start:]


def _read_group(start: int, leaves: Sequence[Leaf], find: Find) -> Blocks:
    """(index, block) of every leaf that is here and fits. Raises SourceFailed."""
    found = [
        (start + index, where)
        for index, leaf in enumerate(leaves)
        if (where := find(leaf.cid)) is not None and fits(leaf, where.place.size)
    ]
    blocks: Blocks = []
    for near in _neighbours(found):
        blocks += _read_together(near)
    return blocks


def _neighbours(found: list[tuple[int, Found]]) -> Iterator[list[tuple[int, Found]]]:
    """`found` cut into stretches that one read covers."""
    stretch: list[tuple[int, Found]] = []
    for item in found:
        if stretch and not _adjoin(stretch[-1][1], item[1]):
            yield stretch
            stretch = []
        stretch.append(item)
    if stretch:
        yield stretch


def _adjoin(one: Found, other: Found) -> bool:
    gap = other.place.offset - one.place.offset - one.place.size
    return other.file is one.file and 0 <= gap <= _MAX_GAP and one.place.size < _ALONE


def _read_together(near: list[tuple[int, Found]]) -> Blocks:
    file, first = near[0][1]
    if len(near) == 1:
        return [(near[0][0], file.read(first))]
    last = near[-1][1].place
    data = memoryview(file.read(Place(first.offset, last.offset + last.size - first.offset)))
    return [
        (index, bytes(data[place.offset - first.offset :][: place.size])) for index, (_file, place) in near
    ]


# -- the source ----------------------------------------------------------------------------------------------


class CarSource:
    """One file. `whole` is False where it is damaged: what stands before the damage reads."""

    in_place = True

    def __init__(self, file: CarFile, whole: bool = True) -> None:
        """`file` with an index; it is closed with the source. Most callers want `open`."""
        self._file = file
        self.name = file.name
        self.path = file.path
        self.whole = whole

    @classmethod
    def open(cls, path: Path, indexes: Path, progress: IndexProgress | None = None) -> "CarSource":
        """Opens the CAR file at `path`. Blocks while an index is built, which then stays in the folder
        `indexes`.

        Raises SourceFailed: no such file, empty, not a CAR, a header that lies, an index that can't be
        written.
        """
        file = CarFile(path)
        try:
            return cls(file, ensure_index(file, indexes, progress))
        except BaseException:
            file.close()
            raise

    async def get(self, cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        if cids.inline(cid) is not None:
            raise NotHere("an identity CID is no block of a source")
        multihash = cids.multihash(cid)
        try:
            place = self._file.find(multihash, read_cached)
        except BlockingIOError:
            place = await threads.run_sync(self._file.find, multihash)
        if place is None:
            raise NotHere(f"{self.name} does not have {cids.text(cid)}")
        if place.size > cids.MAX_BLOCK:
            raise too_large(self.name, cid, place.size)
        with suppress(BlockingIOError):
            return self._file.read_small(place)
        return await threads.run_sync(self._file.read, place)

    async def stream(self, run: LeafRange, deliver: Deliver) -> None:
        await stream_places(run, self._find, deliver)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        """Nothing: each block is at hand."""

    def _find(self, cid: Cid) -> Found | None:
        place = self._file.find(cids.multihash(cid))
        return Found(self._file, place) if place else None

    def roots(self) -> Sequence[Cid]:
        return self._file.roots

    async def aclose(self) -> None:
        await threads.run_sync(self._file.close)
