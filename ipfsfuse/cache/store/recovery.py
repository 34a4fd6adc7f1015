"""What the store does besides reads: at the start it finds what an earlier run left, and then it writes the
index in the background.

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
from ipfsfuse.cache.store.packs import ROWS, Place
from ipfsfuse.cache.store.staging import Entry
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
"""Files of an earlier run that are looked at before the mount is up: 0.02 s. What is beyond them is looked at
while reads are served."""
HEAD_START = 0.3
"""Seconds after which that begins. The mount comes up first, because both need the interpreter."""
LOOKED_AT_TOGETHER = 2000
"""Files that are looked at by one thread hop after that."""
COUNTED_TOGETHER = 500
"""Files that are counted in one step of the event loop: some milliseconds."""
WAIT = 1.0
"""Seconds that rows may wait to be written. A crash loses none: they can be read from the packs again."""
MAX_PENDING = 50_000
"""Rows kept in memory while the disk takes none; then the oldest are dropped."""
IN_ORDER = "in order"
"""The key of a row among the uses. It says that their order is that of the last unmount, and not older."""
MARGIN = 1 << 20
"""Bytes that the index and the log may grow between two looks at them, at most an eighth of the budget."""
USE_BYTES = 44
"""Bytes in the index, at most, of the row that says when something was used last; those of a CID besides."""
USES_TOGETHER = 2000
"""Such rows that are written by one transaction where all are written: they fill 45 pages."""
FEWEST_TOGETHER = 64
"""The same where few have changed, which lie on as many pages: the write-ahead log stays as small."""
FEW_CAME = 64
"""The part of what was restored, as a divisor, that may have come besides while only changes are written: a
new row may split a page, and half of it stays empty."""
PAGE_BYTES = 4096
"""Of a page of the index."""
MEASURE_SECONDS = 5.0
"""Between two looks at what the folder takes, and at the free space, while nothing is written."""


async def open_store(
    folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None, reserve: int | None = None
) -> Store:
    """The store in `folder`, within its budget. Raises StoreFailed.

    What lies there is counted before this returns, or, where that is much, by a task of `nursery`: see
    `Inventory`."""

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
        said = [n / (1 << 20) for n in (store.budget.limit, budget, store.space.free, store.space.reserve)]
        log.info(
            "the budget is %.0f MiB, not %.0f MiB: %.0f MiB are free on this disk, %.0f of them reserved",
            *said,
        )
    return store


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """What is made meanwhile lives as long as the cache: looking through it for garbage, again and again
    while there is more and more of it, takes a sixth of a start, and later stops every read for a tenth of a
    second (of 160,000 files)."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


class Inventory:
    """Finds what an earlier run left, and counts it in the budget, in the order of use: what ARC gives back
    first is what it would have.

    The status of each file is read, because only the disk knows its size: some seconds for a million files.
    Meanwhile reads find what they ask for by its name (`Staging.find`, `Packs.find`), and nothing new is kept
    (`Budget.counted`)."""

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
        """Whether the index has the use of each thing that was found and is not pinned."""
        self._packs, self._entries = self._store.blocks.packs.scan(), self._store.staging.scan()
        self._new: tuple[list[tuple[int, os.stat_result]], list[Entry]] = [], []
        """What the last look found."""
        self._looks: list[list[tuple[float, bool, Key, float]]] = []
        """What each look found, last used last: (when by the wall clock, whether it was used again, key,
        moment of that use; for a pack, bytes on disk)."""

    # -- in a thread -----------------------------------------------------------------------------------------

    def look(self, count: int) -> bool:
        """Looks at so many more files. Whether those were the last. Raises OSError, StoreFailed."""
        packs = list(islice(self._packs, count))
        entries = list(islice(self._entries, count - len(packs)))
        keys: list[Key] = [pack for pack, _info in packs]
        keys += [entry.cid for entry in entries]
        uses = self._from_index(lambda: self._index.uses(keys))
        is_pinned = self._store.budget.is_pinned
        self._all_known = self._all_known and all(key in uses or is_pinned(key) for key in keys)

        def used(key: Key, changed: float) -> tuple[float, bool]:
            """When something was used last, whose file says that it was `changed` then; and whether it was
            used again."""
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
        """What the index says; nothing where it is damaged."""
        try:
            return ask() if self._damaged is None else {}
        except Damaged as exc:
            self._damaged = exc
            return {}

    # -- on the event loop -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks at what is left to look at. A disk in trouble is tried again."""
        await trio.sleep(HEAD_START)
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
        """Takes in what the last look found."""
        packs, entries = self._new
        for pack, info in packs:
            self._store.blocks.packs.sizes.setdefault(pack, info.st_size)
        for entry in entries:
            self._store.staging.take(entry)

    async def complete(self) -> None:
        """Counts all that was found. From then on new things are kept. Raises StoreFailed."""
        store, packs, files = self._store, self._store.blocks.packs, self._store.staging
        indexed = await threads.run_sync(self._from_index, store.blocks.index.packs)
        if self._damaged is not None:
            store.blocks.index.replace(str(self._damaged))
            self._damaged = None
        packs.last = max(packs.sizes, default=0)
        early, used_again = files.found_early, list[Entry]()
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
        while self._looks:  # a million at once would take a tenth of a second
            self._looks.pop()
            await trio.lowlevel.checkpoint()
        # some were renamed while the folder was read, and not found so
        used_again += [entry for key in early if (entry := files.entries.get(key)) is not None]
        for entry in sorted(used_again, key=lambda entry: entry.last_used):
            store.budget.restore(entry.cid, entry.charged, True)
        store.budget.arc.follow()
        for entry in used_again:
            store.budget.arc.refresh(entry.cid)
        # times that lie in the future would be those of all that is used from now on
        store.order_until = self._newest if self._all_known and self._newest <= time.time() else None
        gone = [pack for pack in indexed if pack not in packs.sizes]
        if gone:  # deleted before the index has it: their numbers are not used again until it has
            packs.last = max(packs.last, *gone)
            store.blocks.statements += [("DELETE FROM packs WHERE pack = ?", [(pack,)]) for pack in gone]
            store.blocks.write_later("DELETE FROM blocks WHERE pack NOT IN (SELECT pack FROM packs)", ())
        store.blocks.write_later(
            "DELETE FROM uses WHERE key = ?", (IN_ORDER,)
        )  # from now on the files' times say more
        if store.blocks.index.in_memory:  # the one on the disk may know any lower number
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
        """Where it is not known what belongs to a pin, nothing at all may be evicted until
        `PinnedDags.recover` has found out. The number of a pack that is lost is not given to another."""
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


def _tails(store: Store, indexed: Mapping[int, int]) -> list[tuple[Cid, Place]]:
    """What lies in packs behind the bytes that are `indexed`: rows that a crash kept from being written."""
    packs = store.blocks.packs
    return [
        found
        for pack, size in list(packs.sizes.items())
        if indexed.get(pack, 0) < size
        for found in packs.sections(pack, indexed.get(pack, 0))
    ]


def _note_pending(store: Store, sections: Iterable[tuple[Cid, Place]]) -> None:
    for cid, place in sections:
        store.blocks.packs.pending.setdefault(cids.multihash(cid), place)


async def write_behind(store: Store) -> None:
    """Writes rows as they come, for as long as the cache lives."""
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
    """Writes all that is pending; what can't be written stays pending."""
    with trio.CancelScope(shield=True):  # what was taken to be written is written, whoever asked for it
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
        with contextlib.suppress(StoreFailed, Damaged):  # a question will say so
            store.blocks.index.stay_in_memory()
        await measure(store)


async def measure(store: Store) -> None:
    """Counts all that lies in the folder besides staging files and packs, with what that may grow before the
    next time, and follows the free space of the file system."""
    rest = await threads.run_sync(store.rest_on_disk, limiter=store.io.background)
    store.free_lingering()
    await store.budget.refit(rest, min(MARGIN, store.small_budget // 8))
    store.note_room()


async def follow_space(store: Store) -> None:
    """Gives room back when others fill the file system, and takes it when they leave, for as long as the
    cache lives. Gives unused memory back, too."""
    while True:
        await trio.sleep(MEASURE_SECONDS)
        give_back()
        await measure(store)


async def replace_index(store: Store, why: Damaged) -> None:
    """A new index, filled from the packs."""
    try:
        store.blocks.index.replace(str(why))
    except (StoreFailed, Damaged, OSError) as exc:
        store.backoff.failed(str(store.blocks.index.path), exc)
        return
    finally:
        store.blocks.damaged = None
    await _read_packs(store)


async def _read_packs(store: Store) -> None:
    """Finds the blocks in all packs. Of those that lie in several, the place in a pack that is pinned counts:
    it stays."""
    for pack in sorted(store.blocks.packs.sizes, key=lambda pack: (store.budget.is_pinned(pack), pack)):
        sections = await threads.run_sync(list, store.blocks.packs.sections(pack))
        if store.budget.is_pinned(pack):
            store.blocks.packs.pending.update((cids.multihash(cid), place) for cid, place in sections)
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
    """The packs and the files of these, as `Inventory` reads them: `once` and `again` are what ARC's lists
    hold, or end with. Times grow with ARC's order, from `after` on."""
    packs, files = list[Use](), list[Use]()
    entries, booted = store.staging.entries, staging.to_wall(0.0)
    for frequent, keys in ((False, once), (True, again)):
        last = after
        for key in keys:
            last += 1e-6  # of a pack only its place is known
            if isinstance(key, int):
                packs.append((key, last, frequent))
            else:
                entry = entries.get(key)
                if entry is not None and (used := booted + entry.last_used) > last:
                    last = used
                files.append((key, last, frequent))
    return packs, files


async def close(store: Store) -> None:
    """Names what is whole, and writes what is pending and in which order things were used."""
    for entry in list(store.staging.entries.values()):
        if entry.all_proved():
            await store.finish(entry)
    await flush(store)
    if store.budget.counted.is_set():  # else what the index says of the uses is still the best there is
        try:
            await _keep_order(store)
        except (StoreFailed, Damaged) as exc:
            log.warning("%s: the order of use is not kept: %s", store.blocks.index.path, exc)
    _close_files(store)


async def _keep_order(store: Store) -> None:
    """Writes in which order things were used. What is too much for the budget with these rows leaves before.
    Raises StoreFailed, Damaged."""
    index, arc, after = store.blocks.index, store.budget.arc, store.order_until
    rest = await threads.run_sync(store.rest_on_disk)
    only_changes = (
        after is not None
        and not arc.changes.too_many
        and len(arc.changes.came) * FEW_CAME <= arc.changes.count
        and await threads.run_sync(index.has_uses)  # else it was replaced
    )
    if only_changes:
        growth = len(arc.changes.came) * PAGE_BYTES
    else:
        free = await threads.run_sync(index.clear_uses)
        rows = sum(USE_BYTES if isinstance(key, int) else USE_BYTES + len(key) for key in arc)
        growth = max(0, rows - free)
    margin = min(MARGIN, store.small_budget // 8)  # half of it for the write-ahead log
    await store.budget.refit(rest, max(margin, growth + margin // 2))
    if store.blocks.changed.is_set():
        await flush(store)
    if only_changes and arc.changes.too_many:  # by what has just left
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
    """In the order of the keys, so that SQLite goes from one page to the next: it has room for a few of them
    in memory. And a part at a time, so that the write-ahead log stays small."""
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
    """After the last task of the store: a descriptor that is closed too early may be another file's by
    then."""
    store.close_lingering()
    for each in (store.blocks.packs, store.staging, store.pin_records):
        each.folder.close()
