"""Opens and closes the store: finds the files of an earlier run, and then writes the index in the background.

Concurrency: `Inventory.run` and `write_behind` are one task each.
"""

import contextlib
import gc
import heapq
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import trio

from ipfsfuse.cache.base import Pins
from ipfsfuse.cache.budget import RETRY, Key
from ipfsfuse.cache.store import staging
from ipfsfuse.cache.store.folder import as_store_failed, tag
from ipfsfuse.cache.store.index import Damaged, Index
from ipfsfuse.cache.store.packs import ROWS, PackLocation
from ipfsfuse.cache.store.staging import StagingEntry
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.fileio.buffers import give_back

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

AT_FIRST = 2000
"""Files of an earlier run that are examined before the mount is up, which takes 0.02 s. Further files are
examined while reads are served."""
EXAMINE_DELAY_SECONDS = 0.3
"""Seconds until that begins. The mount comes up first, because both need the interpreter."""
LOOKED_AT_TOGETHER = 2000
"""Files that one call in a thread examines after that."""
COUNTED_TOGETHER = 500
"""Files that are counted in one step of the event loop, which takes some milliseconds."""
WAIT = 1.0
"""Seconds that rows may wait to be written. A crash loses none, because they can be read from the packs
again."""
MAX_PENDING = 50_000
"""Rows that are kept in memory while the disk can't be written. With more, the oldest are dropped."""
IN_ORDER = "in order"
"""The key of a row among the uses. If it exists, the rows are those of the last unmount."""
INDEX_MARGIN = 1 << 20
"""Bytes that the index and the log may grow between two measurements; at most an eighth of the budget."""
USE_BYTES = 44
"""The most bytes of a row of uses in the index, without those of a CID."""
USES_TOGETHER = 2000
"""Rows of uses that one transaction writes if all rows are written. They fill 45 pages."""
FEWEST_TOGETHER = 64
"""The same if only a few rows have changed: each may be on a page of its own, so that the write-ahead log
stays as small."""
FEW_CAME = 64
"""The part of the restored items, as a divisor, that may have been added if only changes are written: a new
row may split a page, and half of that page stays empty."""
PAGE_BYTES = 4096
"""Bytes of a page of the index."""
MEASURE_SECONDS = 5.0
"""Seconds between two measurements of the folder and of the free space, while nothing is written."""


async def open_store(
    folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None, reserve: int | None = None
) -> Store:
    """Opens the store in `folder`. Raises StoreFailed.

    The files there are counted before this returns; if there are many, by a task in `nursery` (see
    `Inventory`)."""

    def make() -> tuple[Store, Inventory, bool]:
        with as_store_failed(f"the cache folder {folder} can't be used"), _no_collections():
            store = Store(folder, budget, nursery, pins, reserve)
            with _closed_after_failure(store):
                inventory = Inventory(store)
                ended = inventory.look(AT_FIRST)
                tag(folder)
            return store, inventory, ended

    store, inventory, ended = await threads.run_sync(make)
    with _closed_after_failure(store):
        inventory.take()
        if ended:
            await inventory.complete()
        else:
            nursery.start_soon(inventory.run)
            await measure(store)
    if store.budget.limit < budget:
        mebibytes = [
            n / (1 << 20) for n in (store.budget.limit, budget, store.space.free, store.space.reserve)
        ]
        log.info(
            "the budget is %.0f MiB, not %.0f MiB: %.0f MiB are free on this disk, %.0f of them reserved",
            *mebibytes,
        )
    return store


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Disables Python's garbage collection, because all objects that are made meanwhile live as long as the
    cache. With 160,000 files, collecting them again and again takes a sixth of the start, and later each full
    collection stops every read for a tenth of a second."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


class Inventory:
    """Finds the files of an earlier run and counts them in the budget, in the order of use, so that ARC
    evicts first what it would have evicted first in that run.

    The status of each file is read, because only the disk knows its size. That takes some seconds for a
    million files. Meanwhile reads find files by their names (`Staging.find`, `Packs.find`), and nothing new
    is staged (`Budget.counted`)."""

    def __init__(self, store: Store) -> None:
        """Blocks for some system calls. Raises OSError, StoreFailed."""
        self._store = store
        self._index = store.blocks.index
        self._damaged: Damaged | None = None
        store.pinned = store.pin_records.load()
        for record in store.pinned.values():
            for key in record.keys or ():
                store.budget.pin(key)
        self._in_order = bool(self._from_index(lambda: self._index.uses([IN_ORDER])))
        self._begin()

    def _begin(self) -> None:
        self._newest = 0.0
        """The latest of the times in `_looks`."""
        self._all_known = self._in_order
        """Whether the index has the use of every file and pack that was found and is not pinned."""
        self._packs, self._entries = self._store.blocks.packs.scan(), self._store.staging.scan()
        self._new: tuple[list[tuple[int, os.stat_result]], list[StagingEntry]] = [], []
        """What the last `look` found."""
        self._looks: list[list[tuple[float, bool, Key, float]]] = []
        """What each `look` found, in the order of use: (time of use by the wall clock, whether it was used
        again, key, time of use by the machine's clock; for a pack, bytes on disk)."""

    # -- in a thread -----------------------------------------------------------------------------------------

    def look(self, count: int) -> bool:
        """Examines `count` more files. Returns whether none is left. Raises OSError, StoreFailed."""
        packs = list(islice(self._packs, count))
        entries = list(islice(self._entries, count - len(packs)))
        keys: list[Key] = [pack for pack, _info in packs]
        keys += [entry.cid for entry in entries]
        uses = self._from_index(lambda: self._index.uses(keys))
        is_pinned = self._store.budget.is_pinned
        self._all_known = self._all_known and all(key in uses or is_pinned(key) for key in keys)

        def used(key: Key, changed: float) -> tuple[float, bool]:
            """The last use of a file that was `changed` at that time, and whether it was used again."""
            last, frequent = uses.get(key, (0.0, False))
            return (last if self._in_order and key in uses else max(last, changed)), frequent

        unit = self._store.staging.unit
        found: list[tuple[float, bool, Key, float]] = [
            (*used(pack, info.st_mtime), pack, float(info.st_blocks * 512 + unit)) for pack, info in packs
        ]
        of_files = sorted(((*used(entry.cid, entry.last_used), entry) for entry in entries), key=_when)
        moments = staging.from_wall([last for last, _frequent, _entry in of_files])
        for (last, frequent, entry), moment in zip(of_files, moments, strict=True):
            entry.last_used = entry.noted = moment
            found.append((last, frequent, entry.cid, moment))
        found.sort(key=_when)
        self._looks.append(found)
        self._newest = max(self._newest, found[-1][0] if found else 0.0)
        self._new = packs, entries
        return len(packs) + len(entries) < count

    def _from_index(self, ask: Callable[[], dict[A, B]]) -> dict[A, B]:
        """The rows that `ask` reads from the index; none if the index is damaged."""
        try:
            return ask() if self._damaged is None else {}
        except Damaged as exc:
            self._damaged = exc
            return {}

    # -- on the event loop -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Examines the remaining files and counts them. After an error of the disk, begins again."""
        await trio.sleep(EXAMINE_DELAY_SECONDS)
        while True:
            try:
                ended = False
                while not ended:
                    ended = await threads.run_sync(
                        self.look, LOOKED_AT_TOGETHER, limiter=self._store.io.background
                    )
                    self.take()
                    gc.freeze()  # as in `_no_collections`
                await self.complete()
                self._store.backoff.succeeded()
                return
            except (OSError, StoreFailed) as exc:
                self._store.backoff.failed(f"{self._store.folder}: what is there can't be counted", exc)
                await trio.sleep(RETRY)
                self._begin()

    def take(self) -> None:
        """Adds what the last `look` found to the store."""
        packs, entries = self._new
        for pack, info in packs:
            self._store.blocks.packs.sizes.setdefault(pack, info.st_size)
        for entry in entries:
            self._store.staging.take(entry)

    async def complete(self) -> None:
        """Counts everything that was found. From then on new blocks are staged. Raises StoreFailed."""
        store, packs, files = self._store, self._store.blocks.packs, self._store.staging
        indexed = await threads.run_sync(self._from_index, store.blocks.index.packs)
        if self._damaged is not None:
            store.blocks.index.replace(str(self._damaged))
            self._damaged = None
        packs.last = max(packs.sizes, default=0)
        early, used_again = files.found_early, list[StagingEntry]()
        for number, (_last, frequent, key, what) in enumerate(heapq.merge(*self._looks, key=_when)):
            if number % COUNTED_TOGETHER == COUNTED_TOGETHER - 1:
                await trio.lowlevel.checkpoint()
            if isinstance(key, int):
                store.budget.restore(key, int(what), frequent)
            elif (entry := files.entries.get(key)) is not None:
                if entry.last_used is early.pop(key, what):
                    store.budget.restore(key, entry.charged, frequent)
                else:
                    used_again.append(entry)
        while self._looks:  # freeing a million items at once would take a tenth of a second
            self._looks.pop()
            await trio.lowlevel.checkpoint()
        # files that were renamed while the folder was read may not have been listed
        used_again += [entry for key in early if (entry := files.entries.get(key)) is not None]
        for entry in sorted(used_again, key=lambda entry: entry.last_used):
            store.budget.restore(entry.cid, entry.charged, True)
        store.budget.arc.follow()
        for entry in used_again:
            store.budget.arc.refresh(entry.cid)
        # with a time in the future, all later uses would get that time
        store.order_until = self._newest if self._all_known and self._newest <= time.time() else None
        gone = [pack for pack in indexed if pack not in packs.sizes]
        if gone:  # deleted packs that the index still has: their numbers are not used until it forgets them
            packs.last = max(packs.last, *gone)
            store.blocks.statements += [("DELETE FROM packs WHERE pack = ?", [(pack,)]) for pack in gone]
            store.blocks.write_later("DELETE FROM blocks WHERE pack NOT IN (SELECT pack FROM packs)", ())
        # from now on the files' times are newer than the rows of uses
        store.blocks.write_later("DELETE FROM uses WHERE key = ?", (IN_ORDER,))
        if store.blocks.index.in_memory:  # the index on disk may have any lower number
            packs.last = max(packs.last, int(time.time()))
        self._keep_pinned()
        if not store.blocks.index.anew:
            _note_pending(store, await threads.run_sync(_tails, store, indexed))
            store.blocks.packs_indexed.set()
        files.inventoried = packs.inventoried = True
        early.clear()
        store.budget.counted.set()
        await measure(store)

    def _keep_pinned(self) -> None:
        """If the keys of a pin are not known, pins everything until `PinnedDags.recover` has found them.
        Ensures that the number of a lost pack is not used again."""
        store = self._store
        for record in store.pinned.values():
            if record.keys is None:
                for key in list(store.budget.arc):
                    store.budget.pin(key)
            store.blocks.packs.last = max(
                store.blocks.packs.last, *(key for key in record.keys or () if isinstance(key, int)), 0
            )


def _when(found: tuple[Any, ...]) -> float:
    last: float = found[0]
    return last


def _tails(store: Store, indexed: Mapping[int, int]) -> list[tuple[Cid, PackLocation]]:
    """The blocks in packs after the bytes that are `indexed`: their rows were not written before a crash."""
    packs = store.blocks.packs
    return [
        found
        for pack, size in list(packs.sizes.items())
        if indexed.get(pack, 0) < size
        for found in packs.sections(pack, indexed.get(pack, 0))
    ]


def _note_pending(store: Store, sections: Iterable[tuple[Cid, PackLocation]]) -> None:
    for cid, location in sections:
        store.blocks.packs.pending.setdefault(cids.multihash(cid), location)


async def write_behind(store: Store) -> None:
    """Writes pending rows to the index, until it is cancelled."""
    await store.budget.counted.wait()
    if store.blocks.index.anew:
        await _read_packs(store)
    while True:
        await store.blocks.changed.wait()
        with trio.move_on_after(WAIT):
            await store.blocks.much_changed.wait()
        store.blocks.changed, store.blocks.much_changed = trio.Event(), trio.Event()
        await flush(store)


async def flush(store: Store) -> None:
    """Writes everything that is pending. What can't be written stays pending."""
    with trio.CancelScope(shield=True):  # rows that were taken from `pending` must be written
        async with store.blocks.index_lock:
            await _flush(store)


async def _flush(store: Store) -> None:
    if store.blocks.damaged is not None:
        await replace_index(store, store.blocks.damaged)
    batch, statements = store.blocks.packs.unwritten()
    others, store.blocks.statements = store.blocks.statements, []
    try:
        await threads.run_sync(store.blocks.index.write, [*statements, *others])
    except StoreFailed as exc:
        store.blocks.index_failed(exc)
        store.blocks.statements = others[-MAX_PENDING:] + store.blocks.statements
        for key in list(store.blocks.packs.pending)[:-MAX_PENDING]:
            del store.blocks.packs.pending[key]
    except Damaged as exc:
        store.blocks.statements = others + store.blocks.statements
        await replace_index(store, exc)
    else:
        store.blocks.packs.written(batch)
        with contextlib.suppress(StoreFailed, Damaged):  # the next query will report it
            store.blocks.index.stay_in_memory()
        await measure(store)


async def measure(store: Store) -> None:
    """Counts everything in the folder besides staging files and packs, with what that may grow by before the
    next call, and adapts the budget to the free space."""
    rest = await threads.run_sync(store.rest_on_disk, limiter=store.io.background)
    store.free_lingering()
    await store.budget.refit(rest, min(INDEX_MARGIN, store.small_budget // 8))
    store.note_room()


async def follow_space(store: Store) -> None:
    """Adapts the budget to the free space again and again, until it is cancelled. Also frees unused
    buffers."""
    while True:
        await trio.sleep(MEASURE_SECONDS)
        give_back()
        await measure(store)


async def replace_index(store: Store, why: Damaged) -> None:
    """Replaces the index by a new one, and fills it from the packs."""
    try:
        store.blocks.index.replace(str(why))
    except (StoreFailed, Damaged, OSError) as exc:
        store.backoff.failed(str(store.blocks.index.path), exc)
        return
    finally:
        store.blocks.damaged = None
    await _read_packs(store)


async def _read_packs(store: Store) -> None:
    """Adds the blocks in all packs to the index. If a block is in several packs, its location in a pinned one
    is used, because that is not evicted."""
    for pack in sorted(store.blocks.packs.sizes, key=lambda pack: (store.budget.is_pinned(pack), pack)):
        sections = await threads.run_sync(list, store.blocks.packs.sections(pack))
        if store.budget.is_pinned(pack):
            store.blocks.packs.pending.update((cids.multihash(cid), location) for cid, location in sections)
        else:
            _note_pending(store, sections)
        if len(store.blocks.packs.pending) >= ROWS:
            batch, statements = store.blocks.packs.unwritten()
            with contextlib.suppress(StoreFailed, Damaged):
                await threads.run_sync(store.blocks.index.write, statements)
                store.blocks.packs.written(batch)
    store.blocks.index.anew = False
    store.blocks.packs_indexed.set()


Use = tuple[Key | str, float, bool]
"""A row of the index's `uses`: a key, its last use, and whether it was used again."""


def uses(
    store: Store, once: Iterable[Key], again: Iterable[Key], after: float = 0.0
) -> tuple[list[Use], list[Use]]:
    """The packs and the files among `once` and `again`, which are ARC's lists or the ends of them, as rows
    for `Inventory` to read. Times increase in ARC's order, from `after` on."""
    packs, files = list[Use](), list[Use]()
    entries, booted = store.staging.entries, staging.to_wall(0.0)
    for frequent, keys in ((False, once), (True, again)):
        last = after
        for key in keys:
            last += 1e-6  # a pack has no time of use, only its place in the order
            if isinstance(key, int):
                packs.append((key, last, frequent))
            else:
                entry = entries.get(key)
                if entry is not None and (used := booted + entry.last_used) > last:
                    last = used
                files.append((key, last, frequent))
    return packs, files


async def close(store: Store) -> None:
    """Gives complete files their final names, writes what is pending, and writes the order of use."""
    for entry in list(store.staging.entries.values()):
        if entry.all_proved():
            await store.finish(entry)
    await flush(store)
    if store.budget.counted.is_set():  # otherwise the rows of uses in the index are better
        try:
            await _keep_order(store)
        except (StoreFailed, Damaged) as exc:
            log.warning("%s: the order of use is not kept: %s", store.blocks.index.path, exc)
    _close_files(store)


async def _keep_order(store: Store) -> None:
    """Writes the order of use, or only its changes. First evicts what no longer fits into the budget with
    these rows. Raises StoreFailed, Damaged."""
    index, arc, after = store.blocks.index, store.budget.arc, store.order_until
    rest = await threads.run_sync(store.rest_on_disk)
    only_changes = (
        after is not None
        and not arc.changes.too_many
        and len(arc.changes.came) * FEW_CAME <= arc.changes.count
        and await threads.run_sync(index.has_uses)  # not if the index was replaced
    )
    if only_changes:
        growth = len(arc.changes.came) * PAGE_BYTES
    else:
        free = await threads.run_sync(index.clear_uses)
        rows = sum(USE_BYTES if isinstance(key, int) else USE_BYTES + len(key) for key in arc)
        growth = max(0, rows - free)
    margin = min(INDEX_MARGIN, store.small_budget // 8)  # half of it for the write-ahead log
    await store.budget.refit(rest, max(margin, growth + margin // 2))
    if store.blocks.changed.is_set():
        await flush(store)
    if only_changes and arc.changes.too_many:  # because of what was just evicted
        await _keep_order(store)
    elif only_changes and after is not None:
        left, written = list(arc.changes.left), uses(store, *arc.moved(), after)
        share = (len(left) + len(arc.changes.moved)) / max(1, arc.changes.count)
        together = max(FEWEST_TOGETHER, int(USES_TOGETHER * share))
        await threads.run_sync(_write_uses, index, *written, left, together)
    else:
        await threads.run_sync(_write_uses, index, *uses(store, arc.used_once(), arc.used_again()))


def _write_uses(
    index: Index,
    packs: list[Use],
    files: list[Use],
    left: Sequence[Key] = (),
    together: int = USES_TOGETHER,
) -> None:
    """Writes the rows in the order of their keys, so that SQLite goes from one page to the next: it keeps
    only a few in memory. Writes some at a time, so that the write-ahead log stays small."""
    gone = sorted(left, key=lambda key: (not isinstance(key, int), key))
    for at in range(0, len(gone), together):
        index.write([("DELETE FROM uses WHERE key = ?", [(key,) for key in gone[at : at + together]])])
    for rows in (packs, files, [(IN_ORDER, 0.0, False)]):
        rows.sort()
        for at in range(0, len(rows), together):
            some = rows[at : at + together]
            index.write([("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", some)])


def _close_files(store: Store) -> None:
    store.blocks.packs.close()
    store.blocks.index.close()


@contextlib.contextmanager
def _closed_after_failure(store: Store) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _close_files(store)
        close_folders(store)
        raise


def close_folders(store: Store) -> None:
    """Closes the folders. Call it after the last task of the store has ended: otherwise a task could use a
    descriptor number that belongs to another file by then."""
    store.close_lingering()
    for each in (store.blocks.packs, store.staging, store.pin_records):
        each.folder.close()
