"""The pinset cache: its lifetime, and what commands ask of it; reading is `reading`'s, the disk is `store`'s.

Concurrency: every method may be called by many tasks at once.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import trio

from ipfsfuse.cache import arc
from ipfsfuse.cache.base import Copy, FileRef, Kept, Pins, SmallBlocks
from ipfsfuse.cache.fsck import FsckReport, Told, fsck
from ipfsfuse.cache.pinned import PinnedDags, Pinning
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.root_names import RootNames
from ipfsfuse.cache.store import recovery
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Blocks


@dataclass(frozen=True, slots=True)
class Statistics:
    """For `status`. Sizes in bytes on disk, counts since the mount began."""

    budget: int
    """As configured."""
    effective_budget: int
    """The budget, or less where the file system is too full for it."""
    reserve: int
    """Bytes of the file system that stay free."""
    free: int
    """Bytes that were free there at the last look."""
    used: int
    """Never more than the effective budget, but for a moment after others have filled the disk."""
    pinned: int
    """Part of `used` that is kept for good."""
    pinned_lost: int
    """Staging files and packs of what is pinned that are not there any more: they are fetched when they are
    used."""
    hits: int
    """Blocks and leaves read from the disk."""
    misses: int
    """Blocks and leaves asked of the sources."""
    evictions: int
    trouble: str
    """What is wrong with the disk just now, "" where nothing is."""
    per_caller_bytes: int
    """What one caller (user id) keeps at most once the budget is used up, while others have something
    here."""
    callers: dict[str, int]
    """Bytes by who had them fetched since the mount began: user ids, and `all` for what several use."""


class PinsetCache(Reader):
    """The shared cache of one folder. Made by `open`."""

    def __init__(self, store: Store, blocks: Blocks, nursery: trio.Nursery, deadline: float) -> None:
        super().__init__(store, blocks, nursery, deadline)
        self._names = RootNames(store)
        self._pinned = PinnedDags(store, self)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        folder: Path,
        blocks: Blocks,
        budget: int,
        *,
        deadline: float = 30.0,
        pins: Pins | None = None,
        reserve: int | None = None,
    ) -> AsyncIterator["PinsetCache"]:
        """The cache that lives in `folder`, which the caller holds (`folder.locked`). Raises StoreFailed.

        `budget` in bytes; `deadline` in seconds: see `flights`. `reserve`: bytes of the file system that stay
        free, None for a twentieth of it, at most 2 GiB."""
        failure: BaseException | None = None
        store: Store | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    async with _living(folder, budget, nursery, pins, reserve) as store:
                        cache = cls(store, blocks, nursery, deadline)
                        nursery.start_soon(cache._pinned.recover)
                        yield cache
                except BaseException as exc:
                    failure = exc
                    raise
        except BaseExceptionGroup:
            if failure is not None:  # of one task alone: not to be wrapped
                raise failure from failure.__cause__
            raise
        finally:
            if store is not None:
                recovery.close_folders(store)

    # -- uses ------------------------------------------------------------------------------------------------

    def opened(self, file: FileRef) -> None:
        """As `Cache.opened`."""
        # first what costs least: a small file is opened in as much time as the index takes to answer
        pins = self.store.pins
        if pins.anywhere and not pins.state(file.cid) and self.store.holds(file.cid):
            pins.add(file.cid)
        self.store.note_use(file)

    def closed(self, file: FileRef) -> None:
        """As `Cache.closed`."""

    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        """As `Cache.when_blocks_leave`."""
        self.store.when_blocks_leave.append(call)

    def kept(self) -> Sequence[Kept]:
        """As `Cache.kept`."""
        return self.store.kept()

    async def listed(self) -> Sequence[Kept]:
        """As `kept`, of any number without stopping other calls."""
        return await self.store.listed()

    async def small(self) -> SmallBlocks:
        """What lies in packs, which `kept` does not list."""
        return await self.store.small()

    def kept_of(self, cid: Cid) -> Kept | None:
        """As `Cache.kept_of`."""
        return self.store.kept_of(cid)

    def used(self) -> int:
        """As `Cache.used`."""
        return self.store.budget.used

    # -- what commands ask -----------------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """What is wrong with the disk just now, "" where nothing is."""
        return self.store.backoff.reason or self.store.no_room()

    def statistics(self) -> Statistics:
        budget, space = self.store.budget, self.store.space
        held = {str(owner): size for owner, size in budget.arc.held_by().items()}
        return Statistics(
            budget.configured, budget.limit, space.reserve, space.free, budget.used, budget.kept_bytes,
            self._pinned.lost, self.hits, self.misses, budget.evictions, self.trouble,
            budget.arc.capacity // arc.SHARE, held,
        )  # fmt: skip

    async def evict(self, cid: Cid | None = None) -> int:
        """Removes a file or block, or all that is not kept for good; returns the bytes freed on disk.

        Where `cid` is a small block, the pack goes that holds it. Raises UsageError for what is kept for
        good."""
        return await self.store.evict(cid)

    def note_root(self, cid: Cid, spelling: str) -> None:
        """`cid` was opened by this name in the mount's root."""
        self._names.note(cid, spelling)

    def named_roots(self) -> Iterator[tuple[Cid, str]]:
        """(CID, as first spelled) of what is kept for good, and what was opened by name and is still staged
        itself."""
        for cid in self._pinned.pins:
            yield cid, self._names.spelling(cid)
        yield from self._names.staged()

    def pinned(self) -> Sequence[Cid]:
        """The roots, in canonical form, of what is kept for good."""
        return self._pinned.pins

    def pinning(self, cid: Cid) -> AbstractAsyncContextManager[Pinning]:
        """Keeps a DAG for good: the caller reads all of it within the block, and awaits `Pinning.file` for
        each file first.

        Raises StoreFailed, naming the sizes, where the budget has no room for it; then nothing stays kept."""
        return self._pinned.pinning(cid)

    def joins(self, cid: Cid) -> bool:
        """As `Copies.joins`."""
        return cids.codec(cid) == cids.DAG_PB and cids.canonical(cid) in self.store.staging.entries

    async def copy(self, cid: Cid, node: str) -> Copy | None:
        """As `Copies.copy`."""
        entry = self.store.staging.entries.get(cids.canonical(cid))
        if self.store.place(cid) is None and (
            entry is None or entry.source not in ("", node) or cids.codec(cid) == cids.RAW
        ):
            return None
        block = await self.block(cid)
        if cids.codec(cid) == cids.RAW:
            return Copy(block, ())
        below = nodes.children(await threads.run_sync(nodes.parse, cid, block))
        return Copy(block, [child for child in below if self.store.place(child) is not None])

    async def unpin(self, cid: Cid) -> None:
        """What `pinning` kept may be evicted again. Raises UsageError for what is not pinned."""
        await self._pinned.unpin(cid)

    async def fsck(self, told: Told | None = None) -> FsckReport:
        """Hashes everything again, sets aside what is wrong, and fetches that again where the sources can."""
        return await fsck(self.store, self, told)


@contextlib.asynccontextmanager
async def _living(
    folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None, reserve: int | None
) -> AsyncIterator[Store]:
    """An open store and its tasks; closed, and all of `nursery` with it, at the end."""
    store = await recovery.open_store(folder, budget, nursery, pins, reserve)
    nursery.start_soon(recovery.write_behind, store)
    nursery.start_soon(recovery.follow_space, store)
    try:
        yield store
    finally:
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await recovery.close(store)
