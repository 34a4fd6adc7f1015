"""fsck: hashes everything that is staged. Wrong blocks are set aside, and fetched again if a source has them.

Concurrency: one task, while others use the cache. It checks each leaf or block by reading it.
"""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeVar

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.store.packs import PackLocation, head_before, rewrite_head
from ipfsfuse.cache.store.staging import StagingEntry
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Leaf, Node, parse
from ipfsfuse.dag.traversal import Walk, drive, node
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.fileio import threads

T = TypeVar("T")

LISTED_BYTES = 64 << 20
"""Bytes of a file whose leaves are listed together."""

MOST_LOST = 1000
"""Wrong blocks that a report names."""

FsckProgress = Callable[[int, int], Awaitable[None]]
"""Called with (bytes checked, bytes in all)."""


@dataclass(slots=True)
class FsckReport:
    files: int = 0
    """Staging files that were checked."""
    blocks: int = 0
    """Leaves and small blocks that were hashed."""
    bytes: int = 0
    wrong: int = 0
    """Those of `blocks` that did not match their CID, and were set aside."""
    mended: int = 0
    """Those of `wrong` that were fetched again."""
    lost: list[str] = field(default_factory=list)
    """The CIDs of the other wrong blocks, at most `MOST_LOST`; a leaf's CID comes with its file."""
    heads: int = 0
    """Damaged heads of small blocks in packs that were rewritten."""
    found: int = 0
    """Correct blocks that were missing in the index."""
    unproved: int = 0
    """Files whose leaves could not be listed, because a block above them is neither staged nor available.
    Each of their leaves is verified when it is read."""


async def fsck(store: Store, reader: Reader, report_progress: FsckProgress | None = None) -> FsckReport:
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


async def _tell(report_progress: FsckProgress | None, report: FsckReport, total: int) -> None:
    if report_progress is not None:
        await report_progress(min(report.bytes, total), total)


async def _check_pack(store: Store, reader: Reader, pack: int, report: FsckReport) -> None:
    """Checks the blocks that their heads lead to; then those that only the index knows; then looks for blocks
    that the index does not know."""
    size, end, named, lost = store.blocks.packs.sizes.get(pack, 0), 0, set[PackLocation](), False
    for cid, location in await threads.run_sync(list, store.blocks.packs.sections(pack)):
        end = location.at + location.size
        if store.blocks.locate(cid) != location:
            lost = True  # a damaged head, a block that was set aside, a copy, or a missing row of the index
            continue
        named.add(location)
        await _check_block(store, reader, cid, location, report)
    if lost or end < size:
        await _check_by_index(store, reader, pack, named, report)
        await _find_unnamed(store, pack, named, report)


async def _check_block(
    store: Store, reader: Reader, cid: Cid, location: PackLocation, report: FsckReport
) -> bool:
    """Checks the block that the index has at `location`, and fetches it again if it is wrong. Returns whether
    it was correct."""
    report.blocks += 1
    report.bytes += location.size
    if await store.blocks.get(cid) is not None:
        return True
    if location.pack in store.blocks.packs.sizes:  # otherwise it was evicted meanwhile
        report.wrong += 1
        await _mend(reader.block(cid), cids.text(cid), report)
    return False


async def _check_by_index(
    store: Store, reader: Reader, pack: int, named: set[PackLocation], report: FsckReport
) -> None:
    """Checks blocks of the index that no intact head leads to, and adds them to `named`."""
    for key in dict.fromkeys([*await store.blocks.keys_in(pack), *store.blocks.packs.unindexed_in(pack)]):
        location = store.blocks.locate(cids.make(cids.RAW, key))
        if location is None or location.pack != pack or location in named:
            continue
        named.add(location)
        # OSError: evicted meanwhile, or the disk can't read it; a read fetches it again
        with contextlib.suppress(OSError):
            cid, intact = await threads.run_sync(head_before, store.blocks.packs, key, location)
            if (
                await _check_block(store, reader, cid, location, report)
                and not intact
                and pack in store.blocks.packs.sizes
            ):
                await threads.run_sync(rewrite_head, store.blocks.packs, cid, location)
                report.heads += 1


async def _find_unnamed(store: Store, pack: int, named: set[PackLocation], report: FsckReport) -> None:
    """Finds correct blocks that the index does not have, in the gaps between the blocks `named`."""

    def unnamed() -> list[tuple[Cid, PackLocation]]:
        starts = sorted({0, *(location.at + location.size for location in named)})
        return [
            found
            for start in starts
            for found in takewhile(
                lambda found: found[1] not in named, store.blocks.packs.sections(pack, start)
            )
        ]

    for cid, location in await threads.run_sync(unnamed):
        if store.blocks.locate(cid) is None and await store.blocks.take_back(cid, location):
            report.blocks += 1
            report.bytes += location.size
            report.found += 1


async def _check_leaf(
    store: Store, reader: Reader, entry: StagingEntry, leaf: Leaf, report: FsckReport
) -> None:
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


async def leaves_of(reader: Reader, entry: StagingEntry) -> AsyncIterator[Leaf]:
    """The leaves of a staging file, as its root lists them. Raises what reading its blocks raises."""
    if cids.codec(entry.cid) == cids.RAW:
        yield Leaf(entry.cid, 0, entry.size)
        return
    root = await _drive(reader, node(entry.cid))
    at = 0
    while isinstance(root, File) and at < root.size:
        found = await _drive(reader, file_layout.leaves(root, at, LISTED_BYTES))
        for leaf in found:
            yield leaf
        at = found[-1].offset + found[-1].size


async def _drive(reader: Reader, walk: Walk[T]) -> T:
    async def fetch(wanted: Sequence[Cid]) -> list[Node]:
        return [parse(cid, await reader.block(cid)) for cid in wanted]

    return await drive(walk, fetch)
