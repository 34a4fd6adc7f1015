"""fsck: everything that is staged is hashed again; what is wrong is set aside and, where the sources can, fetched again.

Concurrency: one task, beside all others: each leaf or block is checked as a read of it would.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.folder.entry import Entry
from ipfsfuse.cache.folder.store import Store
from ipfsfuse.cache.reading import Reading
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import ranges
from ipfsfuse.dag.front import Walk, node
from ipfsfuse.dag.nodes import File, Leaf, parse
from ipfsfuse.errors import IpfsFuseError

T = TypeVar("T")

WINDOW = 64 << 20
"""Bytes of a file whose leaves are listed at once."""

Told = Callable[[int, int], Awaitable[None]]
"""Awaited with (bytes checked, bytes in all)."""


@dataclass(slots=True)
class FsckReport:
    files: int = 0
    """Staging files looked at."""
    blocks: int = 0
    """Leaves and small blocks hashed."""
    bytes: int = 0
    wrong: int = 0
    """Of them, those that were not what their CID says, and were set aside."""
    mended: int = 0
    """Of those, the ones that were fetched again."""
    unproved: int = 0
    """Files whose leaves could not be listed, because a block above them is neither staged nor to be had: each of their
    leaves is proved whenever it is read."""


async def fsck(store: Store, reading: Reading, told: Told | None = None) -> FsckReport:
    report = FsckReport()
    entries = list(store.staging.entries.values())
    total = sum(entry.disk for entry in entries) + sum(store.packs.sizes.values())
    for pack in list(store.packs.sizes):
        await _check_pack(store, reading, pack, report)
        await _tell(told, report, total)
    for entry in entries:
        report.files += 1
        try:
            async for leaf in _leaves(reading, entry):
                await _check_leaf(store, reading, entry, leaf, report)
                await _tell(told, report, total)
        except IpfsFuseError:
            report.unproved += 1
    return report


async def _tell(told: Told | None, report: FsckReport, total: int) -> None:
    if told is not None:
        await told(min(report.bytes, total), total)


async def _check_pack(store: Store, reading: Reading, pack: int, report: FsckReport) -> None:
    for cid, place in await trio.to_thread.run_sync(list, store.packs.sections(pack)):
        if store.place(cid) != place:
            continue
        report.blocks += 1
        report.bytes += place.size
        if await store.block(cid) is None and pack in store.packs.sizes:  # else it was evicted meanwhile
            report.wrong += 1
            report.mended += await _had(reading.block(cid))


async def _check_leaf(store: Store, reading: Reading, entry: Entry, leaf: Leaf, report: FsckReport) -> None:
    file = FileRef(entry.cid, entry.size)
    if entry.dead or not await store.has_leaf(file, leaf):
        return
    report.blocks += 1
    report.bytes += leaf.size
    if await store.leaf(file, leaf) is None and not entry.dead:
        report.wrong += 1
        report.mended += await _had(reading.leaf(file, leaf))


async def _had(fetch: Awaitable[object]) -> bool:
    try:
        await fetch
    except IpfsFuseError:
        return False
    return True


async def _leaves(reading: Reading, entry: Entry) -> AsyncIterator[Leaf]:
    """The leaves of a staging file, by its root's word. Raises what its blocks meet."""
    if cids.codec(entry.cid) == cids.RAW:
        yield Leaf(entry.cid, 0, entry.size)
        return
    root = await _drive(reading, node(entry.cid))
    at = 0
    while isinstance(root, File) and at < root.size:
        found = await _drive(reading, ranges.leaves(root, at, WINDOW))
        for leaf in found:
            yield leaf
        at = found[-1].offset + found[-1].size


async def _drive(reading: Reading, walk: Walk[T]) -> T:
    try:
        wanted = next(walk)
        while True:
            wanted = walk.send([parse(cid, await reading.block(cid)) for cid in wanted])
    except StopIteration as end:
        result: T = end.value
        return result
