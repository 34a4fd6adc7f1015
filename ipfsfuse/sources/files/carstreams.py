"""Long reads from CAR files: blocks that lie side by side come by one read, the next read runs while one is
delivered.

Only blocks that fit their leaves are read, so that the leaves' sizes, which are claims, bound what a group
takes. Concurrency: one call per run; files are read in worker threads. All calls together hold GROUPS groups.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import outcome
import trio
from outcome import Outcome

from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Deliver, LeafRange, fits
from ipfsfuse.sources.files.carfile import CarFile, Place

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
