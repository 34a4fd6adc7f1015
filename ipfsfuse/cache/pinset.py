"""The pinset cache: opens and closes it, and answers commands. `reader` reads, `store` is the disk.

Concurrency: every method may be called by many tasks at once.
"""

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from ipfsfuse.cache import arc
from ipfsfuse.cache.base import Copy, Pins
from ipfsfuse.cache.fsck import FsckProgress, FsckReport, fsck
from ipfsfuse.cache.pinned import PinnedDags
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.store import recovery
from ipfsfuse.cache.store.index import Damaged
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import BlockFetcher

MAX_STAGED_NAMES = 10_000
"""Names that are kept. With more, those that are no longer staged are removed."""
LOOK_AT = 4
"""Names that are checked when one more is noted. So noting one takes the same time for many names as for
few."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """For `status`. Sizes are in bytes on disk; counts are since the mount began."""

    budget: int
    """The configured budget."""
    effective_budget: int
    """The budget, or less if the file system is too full for it."""
    reserve: int
    """Bytes of the file system that stay free."""
    free: int
    """Free bytes of the file system at the last look."""
    used: int
    """Never more than the effective budget, except for a moment after others have filled the disk."""
    pinned: int
    """The part of `used` that is pinned."""
    pinned_lost: int
    """Staging files and packs of pins that no longer exist. Their blocks are fetched when they are used."""
    hits: int
    """Blocks and leaves read from the disk."""
    misses: int
    """Blocks and leaves asked of the sources."""
    evictions: int
    counted: bool
    """Whether everything of an earlier run is counted in `used`. Until then nothing new is staged."""
    trouble: str
    """Why the disk can't be written now; "" if it can."""
    per_caller_bytes: int
    """The most bytes that one caller (user id) keeps when the budget is used up and other callers have bytes
    here."""
    callers: dict[str, int]
    """Bytes by the caller for which they were fetched since the mount began: user ids, and `all` for what
    several callers use."""


class RootNames:
    """The names that were opened in the mount's root, as they were first spelled.

    A name is listed while its own block or file is staged or pinned. A program that goes below the name reads
    that block, so the block is evicted after the blocks below it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            rows = store.blocks.index.rows(
                "SELECT cid, spelling FROM roots ORDER BY at", lambda cid, name: (cids.decode(cid), str(name))
            )
            self._names: dict[Cid, str] = dict(rows)
        except (StoreFailed, Damaged):
            self._names = {}
        self._round = deque(self._names)
        """All names, in the order in which they are checked next."""

    def note(self, cid: Cid, spelling: str) -> None:
        """`cid` was opened by this name in the mount's root."""
        own = cids.canonical(cid)
        if own in self._names:
            return
        if len(self._names) >= MAX_STAGED_NAMES:
            self._forget_some()
        self._names[own] = spelling
        self._round.append(own)
        self._store.blocks.write_later(
            "INSERT OR IGNORE INTO roots (cid, spelling) VALUES (?, ?)", (own, spelling)
        )

    def spelling(self, cid: Cid) -> str:
        """The spelling by which the CID was first opened; the usual spelling if it was not."""
        return self._names.get(cids.canonical(cid)) or cids.text(cid)

    def staged(self) -> Iterator[tuple[Cid, str]]:
        """(CID, spelling) of each name whose own block or file is still staged."""
        for cid, spelling in list(self._names.items()):
            if self._store.holds(cid):
                yield cid, spelling

    def _forget_some(self) -> None:
        for _ in range(LOOK_AT):
            cid = self._round.popleft()
            if self._store.holds(cid):
                self._round.append(cid)
            else:
                del self._names[cid]
                self._store.blocks.write_later("DELETE FROM roots WHERE cid = ?", (cid,))


class PinsetCache:
    """The cache in one cache folder. Made by `open`."""

    def __init__(self, store: Store, reader: Reader) -> None:
        self.store = store
        self.reader = reader
        """Reads through the cache."""
        self.names = RootNames(store)
        self.pinned = PinnedDags(store, reader)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        folder: Path,
        blocks: BlockFetcher,
        budget: int,
        *,
        deadline: float = 30.0,
        pins: Pins | None = None,
        reserve: int | None = None,
    ) -> AsyncIterator["PinsetCache"]:
        """Opens the cache in `folder`, which the caller has locked (`folder.locked`). Raises StoreFailed.

        `budget` is in bytes, `deadline` in seconds (see `single_flight`). `reserve`: bytes of the file system
        that stay free; None for a twentieth of it, at most 2 GiB."""
        failure: BaseException | None = None
        store: Store | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    async with _open_store(folder, budget, nursery, pins, reserve) as store:
                        cache = cls(store, Reader(store, blocks, nursery, deadline))
                        nursery.start_soon(cache.pinned.recover)
                        try:
                            yield cache
                        finally:
                            # what was read is staged before the store closes
                            with trio.CancelScope(shield=True):
                                await cache.reader.wait_until_staged()
                except BaseException as exc:
                    failure = exc
                    raise
        except BaseExceptionGroup:
            if failure is not None:  # the body's exception, without the nursery's group
                raise failure from failure.__cause__
            raise
        finally:
            if store is not None:
                recovery.close_folders(store)

    @property
    def trouble(self) -> str:
        """Why the disk can't be written now; "" if it can."""
        return self.store.backoff.reason or self.store.no_room()

    def statistics(self) -> Statistics:
        budget, space = self.store.budget, self.store.space
        callers = {str(owner): size for owner, size in budget.arc.bytes_by_owner().items()}
        return Statistics(
            budget.configured, budget.limit, space.reserve, space.free, budget.used, budget.pinned_bytes,
            self.pinned.lost, self.reader.hits, self.reader.misses, budget.evictions,
            budget.counted.is_set(), self.trouble,
            budget.arc.capacity // arc.OWNER_SHARE, callers,
        )  # fmt: skip

    def named_roots(self) -> Iterator[tuple[Cid, str]]:
        """(CID, spelling) of each pin, and of each name that was opened in the root and is still staged."""
        for cid in self.pinned.roots:
            yield cid, self.names.spelling(cid)
        yield from self.names.staged()

    def is_file_root(self, cid: Cid) -> bool:
        return cids.codec(cid) == cids.DAG_PB and self.store.staging.find(cids.canonical(cid)) is not None

    async def copy(self, cid: Cid, node: str) -> Copy | None:
        entry = self.store.staging.find(cids.canonical(cid))
        if self.store.blocks.locate(cid) is None and (
            entry is None or entry.source not in ("", node) or cids.codec(cid) == cids.RAW
        ):
            return None
        block = await self.reader.block(cid)
        if cids.codec(cid) == cids.RAW:
            return Copy(block, ())
        below = nodes.children(await threads.run_sync(nodes.parse, cid, block))
        return Copy(block, [child for child in below if self.store.blocks.locate(child) is not None])

    async def fsck(self, report_progress: FsckProgress | None = None) -> FsckReport:
        """See `cache.fsck`."""
        await self.store.budget.counted.wait()
        return await fsck(self.store, self.reader, report_progress)


@contextlib.asynccontextmanager
async def _open_store(
    folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None, reserve: int | None
) -> AsyncIterator[Store]:
    """Opens the store and starts its tasks. At the end, cancels all tasks in `nursery` and closes the
    store."""
    store = await recovery.open_store(folder, budget, nursery, pins, reserve)
    nursery.start_soon(recovery.write_behind, store)
    nursery.start_soon(recovery.follow_space, store)
    try:
        yield store
    finally:
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await recovery.close(store)
