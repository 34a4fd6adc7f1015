"""fsck: everything that is staged is hashed again; what is wrong is set aside and, where the sources can,
fetched again.

Concurrency: one task, beside all others: each leaf or block is checked as a read of it would.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeVar

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.store.packs import Place, head_before, rewrite_head
from ipfsfuse.cache.store.staging import Entry
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Leaf, Node, parse
from ipfsfuse.dag.traversal import Walk, drive, node
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.fileio import threads

T = TypeVar("T")

WINDOW = 64 << 20
"""Bytes of a file whose leaves are listed at once."""

MOST_LOST = 1000
"""Wrong blocks that a report names."""

Progress = Callable[[int, int], Awaitable[None]]
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
    lost: list[str] = field(default_factory=list)
    """The others, at most `MOST_LOST` of them: each as a CID, of a leaf with its file."""
    heads: int = 0
    """Damaged marks between small blocks that were rewritten."""
    found: int = 0
    """Right blocks that the index had lost."""
    unproved: int = 0
    """Files whose leaves could not be listed, because a block above them is neither staged nor to be had:
    each of their leaves is proved whenever it is read."""


async def fsck(store: Store, reader: Reader, report_progress: Progress | None = None) -> FsckReport:
    report = FsckReport()
    entries = list(store.staging.entries.values())
    total = sum(entry.disk for entry in entries) + sum(store.blocks.packs.sizes.values())
    for pack in list(store.blocks.packs.sizes):
        await _check_pack(store, reader, pack, report)
        await _tell(report_progress, report, total)
    for entry in entries:
        report.files += 1
        try:
            async for leaf in leaves_of(reader, entry):
                await _check_leaf(store, reader, entry, leaf, report)
                await _tell(report_progress, report, total)
        except IpfsFuseError:
            report.unproved += 1
    return report


async def _tell(report_progress: Progress | None, report: FsckReport, total: int) -> None:
    if report_progress is not None:
        await report_progress(min(report.bytes, total), total)


async def _check_pack(store: Store, reader: Reader, pack: int, report: FsckReport) -> None:
    """Blocks that can be found by the heads before them; then those that the index alone knows; then those
    that it does not."""
    size, end, named, lost = store.blocks.packs.sizes.get(pack, 0), 0, set[Place](), False
    for cid, place in await threads.run_sync(list, store.blocks.packs.sections(pack)):
        end = place.at + place.size
        if store.blocks.place(cid) != place:
            lost = True  # a damaged head, a block that was set aside, a copy, or a row that is gone
            continue
        named.add(place)
        await _check_block(store, reader, cid, place, report)
    if lost or end < size:
        await _check_by_index(store, reader, pack, named, report)
        await _find_unnamed(store, pack, named, report)


async def _check_block(store: Store, reader: Reader, cid: Cid, place: Place, report: FsckReport) -> bool:
    """Whether the block that the index has at `place` is right, or is again."""
    report.blocks += 1
    report.bytes += place.size
    if await store.blocks.get(cid) is not None:
        return True
    if place.pack in store.blocks.packs.sizes:  # else it was evicted meanwhile
        report.wrong += 1
        await _mend(reader.block(cid), cids.text(cid), report)
    return False


async def _check_by_index(
    store: Store, reader: Reader, pack: int, named: set[Place], report: FsckReport
) -> None:
    """What no intact head leads to. `named` grows by it."""
    for key in dict.fromkeys([*await store.blocks.keys_in(pack), *store.blocks.packs.unindexed_in(pack)]):
        place = store.blocks.place(cids.make(cids.RAW, key))
        if place is None or place.pack != pack or place in named:
            continue
        named.add(place)
        # evicted meanwhile; or the disk does not give it, and a read fetches it again
        with contextlib.suppress(OSError):
            cid, intact = await threads.run_sync(head_before, store.blocks.packs, key, place)
            if (
                await _check_block(store, reader, cid, place, report)
                and not intact
                and pack in store.blocks.packs.sizes
            ):
                await threads.run_sync(rewrite_head, store.blocks.packs, cid, place)
                report.heads += 1


async def _find_unnamed(store: Store, pack: int, named: set[Place], report: FsckReport) -> None:
    """Right blocks that the index does not have anywhere, in the gaps between those that it has here."""

    def unnamed() -> list[tuple[Cid, Place]]:
        starts = sorted({0, *(place.at + place.size for place in named)})
        return [
            found
            for start in starts
            for found in takewhile(
                lambda found: found[1] not in named, store.blocks.packs.sections(pack, start)
            )
        ]

    for cid, place in await threads.run_sync(unnamed):
        if store.blocks.place(cid) is None and await store.blocks.take_back(cid, place):
            report.blocks += 1
            report.bytes += place.size
            report.found += 1


async def _check_leaf(store: Store, reader: Reader, entry: Entry, leaf: Leaf, report: FsckReport) -> None:
    file = FileRef(entry.cid, entry.size)
    if entry.dead or not await store.has_leaf(file, leaf):
        return
    report.blocks += 1
    report.bytes += leaf.size
    if await store.leaf(file, leaf) is None and not entry.dead:
        report.wrong += 1
        await _mend(
            reader.leaf(file, leaf),
            f"{cids.text(leaf.cid)} at {leaf.offset} in {cids.text(entry.cid)}",
            report,
        )


async def _mend(fetch: Awaitable[object], name: str, report: FsckReport) -> None:
    try:
        await fetch
    except IpfsFuseError:
        if len(report.lost) < MOST_LOST:
            report.lost.append(name)
    else:
        report.mended += 1


async def leaves_of(reader: Reader, entry: Entry) -> AsyncIterator[Leaf]:
    """The leaves of a staging file, by its root's word. Raises what its blocks meet."""
    if cids.codec(entry.cid) == cids.RAW:
        yield Leaf(entry.cid, 0, entry.size)
        return
    root = await _drive(reader, node(entry.cid))
    at = 0
    while isinstance(root, File) and at < root.size:
        found = await _drive(reader, file_layout.leaves(root, at, WINDOW))
        for leaf in found:
            yield leaf
        at = found[-1].offset + found[-1].size


async def _drive(reader: Reader, walk: Walk[T]) -> T:
    async def fetch(wanted: Sequence[Cid]) -> list[Node]:
        return [parse(cid, await reader.block(cid)) for cid in wanted]

    return await drive(walk, fetch)
