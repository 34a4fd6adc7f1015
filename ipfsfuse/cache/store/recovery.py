"""The store's life: what an earlier run left is found at the start, and the index is written behind the
reads.

Concurrency: `recover` blocks and runs before anything else; `write_behind` is one task.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import trio

from ipfsfuse.cache.base import Pins
from ipfsfuse.cache.budget import Key
from ipfsfuse.cache.store import staging
from ipfsfuse.cache.store.folder import as_store_failed, tag
from ipfsfuse.cache.store.index import Damaged, Statements
from ipfsfuse.cache.store.packs import ROWS, Place
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed
from ipfsfuse.fileio import threads

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT = 1.0
"""Seconds that rows may wait to be written: a crash loses none, the packs tell them again."""
MAX_PENDING = 50_000
"""Rows kept in memory while the disk takes none; then the oldest are dropped."""
IN_ORDER = "in order"
"""The key of a row among the uses which says that their order is that of an unmount, and not older."""
MARGIN = 1 << 20
"""Bytes that the index and the log may grow between two looks at them, at most an eighth of the budget."""
MEASURE_SECONDS = 5.0
"""Between two looks at what the folder takes, and at the free space, while nothing is written."""


async def open_store(
    folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None, reserve: int | None = None
) -> Store:
    """The store in `folder`, with what lies there taken up, and within its budget. Raises StoreFailed."""

    def make() -> Store:
        with as_store_failed(f"the cache folder {folder} can't be used"), _no_collections():
            store = Store(folder, budget, nursery, pins, reserve)
            try:
                recover(store)
                tag(folder)
            except BaseException:
                _close_files(store)
                close_folders(store)
                raise
            return store

    store = await threads.run_sync(make)
    try:
        await measure(store)
    except BaseException:
        _close_files(store)
        close_folders(store)
        raise
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


def recover(store: Store) -> None:
    """Finds what lies in the folder, last used last, so that what ARC gives back first is what it would
    have."""
    recency = dict(
        _rows(
            store,
            "SELECT key, last, frequent FROM uses",
            lambda key, last, frequent: (key, (float(last), bool(frequent))),
        )
    )
    in_order = recency.pop(IN_ORDER, None) is not None

    def used(key: Key, changed: float) -> tuple[float, bool]:
        """When something was used last, whose file says that it was `changed` then; and whether it was used
        again."""
        last, frequent = recency.get(key, (0.0, False))
        return (last if in_order and key in recency else max(last, changed)), frequent

    found: list[tuple[float, bool, Key, int]] = []
    for entry in store.staging.scan():
        entry.last_used, frequent = used(entry.cid, entry.last_used)
        store.staging.entries[entry.cid] = entry
        entry.charged = store.staging.charge(entry)
        found.append((entry.last_used, frequent, entry.cid, entry.charged))
    for pack, info in store.blocks.packs.scan():
        store.blocks.packs.sizes[pack] = info.st_size
        store.blocks.packs.last = max(store.blocks.packs.last, pack)
        last, frequent = used(pack, info.st_mtime)
        found.append((last, frequent, pack, info.st_blocks * 512 + store.staging.unit))
    found.sort(key=lambda item: item[0])
    for (_last, frequent, key, size), moment in zip(
        found, staging.from_wall([last for last, *_ in found]), strict=True
    ):
        store.budget.arc.restore(key, size, frequent)
        if not isinstance(key, int):
            store.staging.entries[key].last_used = moment
    indexed = dict(_rows(store, "SELECT pack, indexed FROM packs", lambda pack, size: (int(pack), int(size))))
    gone = [pack for pack in indexed if pack not in store.blocks.packs.sizes]
    if gone:  # deleted before the index was told: their numbers are not used again until it has been
        store.blocks.packs.last = max(store.blocks.packs.last, *gone)
        store.blocks.statements = [("DELETE FROM packs WHERE pack = ?", [(pack,)]) for pack in gone]
        store.blocks.write_later("DELETE FROM blocks WHERE pack NOT IN (SELECT pack FROM packs)", ())
    store.blocks.write_later(
        "DELETE FROM uses WHERE key = ?", (IN_ORDER,)
    )  # from now on the files' times say more
    if store.blocks.index.in_memory:  # the one on the disk may know any lower number
        store.blocks.packs.last = max(store.blocks.packs.last, int(time.time()))
    _keep_pinned(store)
    if not store.blocks.index.anew:
        _read_tails(store, indexed)
        store.blocks.packs_indexed.set()


def _keep_pinned(store: Store) -> None:
    """Nothing that is pinned may be evicted. Where it is not known what belongs to a pin, nothing at all may
    be, until `PinnedDags.recover` has found out."""
    store.pinned = store.pin_records.load()
    for record in store.pinned.values():
        for key in list(store.budget.arc) if record.keys is None else record.keys:
            store.budget.keep(key)
            if isinstance(key, int):  # the number of a pack that is lost is not given to another
                store.blocks.packs.last = max(store.blocks.packs.last, key)


def _rows(store: Store, sql: str, read: Callable[..., T]) -> Sequence[T]:
    try:
        return store.blocks.index.rows(sql, read)
    except Damaged as exc:
        store.blocks.index.replace(str(exc))
        return ()


def _read_tails(store: Store, indexed: Mapping[int, int]) -> None:
    """Rows that a crash kept from being written are read from the packs, behind the bytes that are
    `indexed`."""
    for pack, size in store.blocks.packs.sizes.items():
        if indexed.get(pack, 0) < size:
            _take(store, store.blocks.packs.sections(pack, indexed.get(pack, 0)))


def _take(store: Store, sections: Iterable[tuple[Cid, Place]]) -> None:
    for cid, place in sections:
        store.blocks.packs.pending.setdefault(cids.multihash(cid), place)


async def write_behind(store: Store) -> None:
    """Writes rows as they come, for as long as the cache lives."""
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
        async with store.blocks.telling:
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
    rest = await threads.run_sync(store.rest_on_disk, limiter=store.io.upkeep)
    store.free_lingering()
    await store.budget.refit(rest, min(MARGIN, store.small_budget // 8))
    store.note_room()


async def follow_space(store: Store) -> None:
    """Gives room back when others fill the file system, and takes it when they leave, for as long as the
    cache lives."""
    while True:
        await trio.sleep(MEASURE_SECONDS)
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
    for pack in sorted(store.blocks.packs.sizes, key=lambda pack: (store.budget.kept(pack), pack)):
        sections = await threads.run_sync(list, store.blocks.packs.sections(pack))
        if store.budget.kept(pack):
            store.blocks.packs.pending.update((cids.multihash(cid), place) for cid, place in sections)
        else:
            _take(store, sections)
        if len(store.blocks.packs.pending) >= ROWS:
            batch, statements = store.blocks.packs.unwritten()
            with contextlib.suppress(StoreFailed, Damaged):
                await threads.run_sync(store.blocks.index.write, statements)
                store.blocks.packs.written(batch)
    store.blocks.index.anew = False
    store.blocks.packs_indexed.set()


def uses(store: Store) -> list[tuple[Key | str, float, bool]]:
    """(key, last use, whether it was used again) of all that ARC holds, as `take_up` reads it. Times grow
    with ARC's order."""
    out: list[tuple[Key | str, float, bool]] = [(IN_ORDER, 0.0, False)]
    last, was_frequent = 0.0, False
    for key in store.budget.arc:
        frequent = store.budget.arc.frequent(key)
        entry = None if isinstance(key, int) else store.staging.entries.get(key)
        if frequent != was_frequent:  # the second list begins
            last, was_frequent = 0.0, frequent
        # of a pack only its place is known
        last = max(last + 1e-6, staging.to_wall(entry.last_used) if entry else 0.0)
        out.append((key, last, frequent))
    return out


async def close(store: Store) -> None:
    """Names what is whole, and writes what is pending and in which order things were used."""
    for entry in list(store.staging.entries.values()):
        if entry.all_proved():
            await store.finish(entry)
    await flush(store)
    statements: Statements = [
        ("DELETE FROM uses", [()]),
        ("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", uses(store)),
    ]
    try:
        await threads.run_sync(store.blocks.index.write, statements)
    except (StoreFailed, Damaged) as exc:
        log.warning("%s: the order of use is not kept: %s", store.blocks.index.path, exc)
    _close_files(store)


def _close_files(store: Store) -> None:
    store.blocks.packs.close()
    store.blocks.index.close()


def close_folders(store: Store) -> None:
    """After the last task of the store: a descriptor that is closed too early may be another file's by
    then."""
    store.close_lingering()
    for each in (store.blocks.packs, store.staging, store.pin_records):
        each.folder.close()
