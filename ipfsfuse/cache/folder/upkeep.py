"""The store's life: what an earlier run left is taken up at the start, and the index is written behind the reads.

Concurrency: `take_up` blocks and runs before anything else; `write_behind` is one task.
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
from ipfsfuse.cache.folder.blocks import Place
from ipfsfuse.cache.folder.disk import ROWS
from ipfsfuse.cache.folder.hold import as_store_failed
from ipfsfuse.cache.folder.index import Damaged, Statements
from ipfsfuse.cache.folder.store import Store
from ipfsfuse.cache.room import Key
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT = 1.0
"""Seconds that rows may wait to be written: a crash loses none, the packs tell them again."""
MAX_PENDING = 50_000
"""Rows kept in memory while the disk takes none; then the oldest are dropped."""
INDEX_MARGIN = 1 << 20
"""Bytes that the index may grow between two looks at it, at most an eighth of the budget."""


async def open_store(folder: Path, budget: int, nursery: trio.Nursery, pins: Pins | None) -> Store:
    """The store in `folder`, with what lies there taken up, and within its budget. Raises StoreFailed."""

    def make() -> Store:
        with as_store_failed(f"the cache folder {folder} can't be used"), _no_collections():
            store = Store(folder, budget, nursery, pins)
            take_up(store)
            return store

    store = await trio.to_thread.run_sync(make)
    await measure_index(store)
    return store


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """What is made meanwhile lives as long as the cache: looking through it for garbage, again and again while there is
    more and more of it, takes a sixth of a start, and later stops every read for a tenth of a second (of 160,000 files)."""
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def take_up(store: Store) -> None:
    """Takes up what lies in the folder, last used last, so that what ARC gives back first is what it would have."""
    recency = dict(_rows(store, "SELECT key, last, frequent FROM uses", lambda key, last, frequent: (key, (float(last), bool(frequent)))))
    found: list[tuple[float, bool, Key, int]] = []
    for entry in store.staging.scan():
        last, frequent = recency.get(entry.cid, (0.0, False))
        entry.last_used = max(last, entry.last_used)
        store.staging.entries[entry.cid] = entry
        entry.charged = store.staging.charge(entry)
        found.append((entry.last_used, frequent, entry.cid, entry.charged))
    for pack, info in store.packs.scan():
        store.packs.sizes[pack] = info.st_size
        store.packs.last = max(store.packs.last, pack)
        last, frequent = recency.get(pack, (0.0, False))
        found.append((max(last, info.st_mtime), frequent, pack, info.st_blocks * 512 + store.staging.unit))
    for _last, frequent, key, size in sorted(found, key=lambda item: item[0]):
        store.room.arc.restore(key, size, frequent)
    indexed = dict(_rows(store, "SELECT pack, indexed FROM packs", lambda pack, size: (int(pack), int(size))))
    gone = [pack for pack in indexed if pack not in store.packs.sizes]
    if gone:  # deleted before the index was told: their numbers are not used again until it has been
        store.packs.last = max(store.packs.last, *gone)
        store.statements = [("DELETE FROM packs WHERE pack = ?", [(pack,)]) for pack in gone]
        store.write_later("DELETE FROM blocks WHERE pack NOT IN (SELECT pack FROM packs)", ())
    _rows(store, "SELECT cid FROM pins", cids.decode)  # only whether they can be read: then all or none are kept
    for _pin, kept in _rows(store, "SELECT pin, key FROM pinned", pinned_row):
        store.room.keep(kept)
    if not store.index.anew:
        _read_tails(store, indexed)


def pinned_row(pin: bytes, name: str) -> tuple[Cid, Key]:
    """(the pin, something that it keeps) of a row. Raises NotACid, ValueError or TypeError for what is neither."""
    return cids.decode(pin), int(name) if name.isdecimal() else cids.parse(name)


def _rows(store: Store, sql: str, read: Callable[..., T]) -> Sequence[T]:
    try:
        return store.index.rows(sql, read)
    except Damaged as exc:
        store.index.replace(str(exc))
        return ()


def _read_tails(store: Store, indexed: Mapping[int, int]) -> None:
    """Rows that a crash kept from being written are read from the packs, behind the bytes that are `indexed`."""
    for pack, size in store.packs.sizes.items():
        if indexed.get(pack, 0) < size:
            _take(store, store.packs.sections(pack, indexed.get(pack, 0)))


def _take(store: Store, sections: Iterable[tuple[Cid, Place]]) -> None:
    for cid, place in sections:
        store.packs.pending.setdefault(cids.multihash(cid), place)


async def write_behind(store: Store) -> None:
    """Writes rows as they come, for as long as the cache lives."""
    if store.index.anew:
        await _read_packs(store)
    while True:
        await store.changed.wait()
        with trio.move_on_after(WAIT):
            await store.much_changed.wait()
        store.changed, store.much_changed = trio.Event(), trio.Event()
        await flush(store)


async def flush(store: Store) -> None:
    """Writes all that is pending; what can't be written stays pending."""
    with trio.CancelScope(shield=True):  # what was taken to be written is written, whoever asked for it
        async with store.telling:
            await _flush(store)


async def _flush(store: Store) -> None:
    if store.damaged is not None:
        await replace_index(store, store.damaged)
    batch, statements = store.packs.unwritten()
    others, store.statements = store.statements, []
    try:
        await trio.to_thread.run_sync(store.index.write, [*statements, *others])
    except StoreFailed as exc:
        store.index_failed(exc)
        store.statements = others[-MAX_PENDING:] + store.statements
        for key in list(store.packs.pending)[:-MAX_PENDING]:
            del store.packs.pending[key]
    except Damaged as exc:
        store.statements = others + store.statements
        await replace_index(store, exc)
    else:
        store.packs.written(batch)
        await measure_index(store)


async def measure_index(store: Store) -> None:
    """Counts the index, the folders themselves, and what the index may grow before the next time."""
    size = store.index.disk() + store.folders_disk()
    await store.room.set_overhead(size + min(INDEX_MARGIN, store.room.budget // 8))


async def replace_index(store: Store, why: Damaged) -> None:
    """A new index, filled from the packs."""
    try:
        store.index.replace(str(why))
    except (StoreFailed, Damaged, OSError) as exc:
        store.trouble.note(str(store.index.path), exc)
        return
    finally:
        store.damaged = None
    await _read_packs(store)


async def _read_packs(store: Store) -> None:
    for pack in sorted(store.packs.sizes):
        _take(store, await trio.to_thread.run_sync(list, store.packs.sections(pack)))
        if len(store.packs.pending) >= ROWS:
            batch, statements = store.packs.unwritten()
            with contextlib.suppress(StoreFailed, Damaged):
                await trio.to_thread.run_sync(store.index.write, statements)
                store.packs.written(batch)
    store.index.anew = False


def uses(store: Store) -> list[tuple[Key, float, bool]]:
    """(key, last use, whether it was used again) of all that ARC holds, as `take_up` reads it."""
    now, out = time.time(), []
    for order, key in enumerate(store.room.arc):
        entry = None if isinstance(key, int) else store.staging.entries.get(key)
        out.append((key, entry.last_used if entry else now + order * 1e-6, store.room.arc.frequent(key)))
    return out


async def close(store: Store) -> None:
    """Names what is whole, and writes what is pending and in which order things were used."""
    for entry in list(store.staging.entries.values()):
        if entry.all_proved():
            await store.finish(entry)
    await flush(store)
    statements: Statements = [("DELETE FROM uses", [()]), ("INSERT OR REPLACE INTO uses VALUES (?, ?, ?)", uses(store))]
    try:
        await trio.to_thread.run_sync(store.index.write, statements)
    except (StoreFailed, Damaged) as exc:
        log.warning("%s: the order of use is not kept: %s", store.index.path, exc)
    store.packs.close()
    store.index.close()
