"""A start on a large cache: reads are served while the content of an earlier run is still being counted.
Nothing new is staged until all is counted."""

import contextlib
import hashlib
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.budget import Key
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import recovery
from ipfsfuse.cache.store.index import Index
from ipfsfuse.cache.store.staging import PART, Staging, StagingEntry
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from tests.cache.standin import Chain, make_file, random_bytes, staged_items
from tests.cache.test_budget import taken

BUDGET = 64 << 20
FILES = 40
PARTS = 5
"""How many of the files are not complete."""

Made = tuple[FileRef, list[Leaf], bytes]


class SlowDisk:
    """A disk whose scan waits for `go` after the first staging files, and then fails `failures` times."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.failures = 0
        scan = Staging.scan

        def slowly(staging: Staging) -> Iterator[StagingEntry]:
            for number, entry in enumerate(scan(staging)):
                if number >= 2:
                    self.go.wait(10)
                    self.go.set()  # so that a failed test ends at once
                    if self.failures:
                        self.failures -= 1
                        raise OSError(5, "Input/output error")
                yield entry

        patch.setattr(Staging, "scan", slowly)
        patch.setattr(recovery, "AT_FIRST", 2)
        patch.setattr(recovery, "LOOKED_AT_TOGETHER", 7)
        patch.setattr(recovery, "RETRY", 0.01)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SlowDisk]]:
    made: list[SlowDisk] = []

    def make() -> SlowDisk:
        made.append(SlowDisk(monkeypatch))
        return made[-1]

    yield make
    for each in made:
        each.go.set()


def bytes_of_content(folder: Path) -> int:
    """Bytes on disk without the index, which grows with each note in it."""
    return taken(folder / "staging") + taken(folder / "packs")


async def filled(folder: Path, chain: Chain) -> tuple[list[Made], Cid]:
    """Stages what an earlier run left: FILES files, the first PARTS of them without their last leaf, and a
    small block."""
    files = [make_file(chain, 200_000 + number, seed=number) for number in range(FILES)]
    async with PinsetCache.open(folder, chain, BUDGET) as cache:
        for number, (file, leaves, _content) in enumerate(files):
            for leaf in leaves[:-1] if number < PARTS else leaves:
                await cache.reader.leaf(file, leaf)
            cache.reader.opened(file)
        small = chain.add(random_bytes(1000, 1000))
        await cache.reader.block(small)
    chain.asked.clear()
    return files, small


def test_staged_content_is_read_and_nothing_new_is_staged_until_all_is_counted(
    tmp_path: Path, disk: Callable[[], SlowDisk]
) -> None:
    async def main() -> None:
        chain = Chain()
        files, small = await filled(tmp_path, chain)
        before = bytes_of_content(tmp_path)
        new, new_leaves, new_content = make_file(chain, 300_000, seed=100)
        slow = disk()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for number, (file, leaves, content) in enumerate(files[::2]):
                for leaf in leaves[:-1] if 2 * number < PARTS else leaves:
                    got = await cache.reader.leaf(file, leaf)
                    assert bytes(got) == content[leaf.offset : leaf.offset + leaf.size]
            assert await cache.reader.block(small) == random_bytes(1000, 1000)
            assert chain.asked == []
            for leaf in new_leaves:
                got = await cache.reader.leaf(new, leaf)
                assert bytes(got) == new_content[leaf.offset : leaf.offset + leaf.size]
            assert (await cache.reader.leaf(files[0][0], files[0][1][-1])) == files[0][2][-3392:]
            await cache.reader.block(chain.add(random_bytes(1000, 1001)))
            cache.reader.opened(files[-1][0])
            assert not cache.statistics().counted
            assert "is being counted" in cache.trouble
            assert bytes_of_content(tmp_path) == before
            slow.go.set()
            with trio.fail_after(30):
                assert len(await cache.store.listed()) == FILES
            assert cache.statistics().counted
            assert not cache.trouble
            assert taken(tmp_path) <= cache.statistics().used <= BUDGET
            assert sum(map(cache.store.budget.size, cache.store.staging.entries)) >= FILES * 200_000
            assert cache.store.budget.arc.frequent(files[-1][0].cid), "it was used again during the count"
            assert list(cache.store.budget.arc)[-1] == files[-1][0].cid
            chain.asked.clear()
            for _ in range(2):
                for leaf in new_leaves:
                    await cache.reader.leaf(new, leaf)
            assert len(chain.asked) == len(new_leaves)
            assert cache.store.staging.entries[new.cid].whole()

    trio.run(main)


def test_the_order_of_use_does_not_depend_on_how_many_files_are_scanned_together(
    tmp_path: Path, disk: Callable[[], SlowDisk]
) -> None:
    async def main() -> None:
        chain = Chain()
        files, _small = await filled(tmp_path, chain)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for file, _leaves, _content in files[10:30:3]:
                cache.reader.opened(file)
            at_once = list(cache.store.budget.arc)
        disk().go.set()
        for _ in range(2):
            async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
                await cache.store.budget.counted.wait()
                assert list(cache.store.budget.arc) == at_once
                assert next(kept.cid for kept in staged_items(cache)) == files[28][0].cid

    trio.run(main)


def test_a_mount_that_ends_before_all_is_counted_keeps_the_order_of_use(
    tmp_path: Path, disk: Callable[[], SlowDisk]
) -> None:
    async def main() -> None:
        chain = Chain()
        await filled(tmp_path, chain)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            order = list(cache.store.budget.arc)
        slow = disk()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            threading.Timer(0.2, slow.go.set).start()  # the thread that scans can't be cancelled
            assert not cache.statistics().counted
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.store.budget.counted.wait()
            assert list(cache.store.budget.arc) == order

    trio.run(main)


@pytest.mark.logs("can't be counted")
def test_a_smaller_budget_evicts_content_once_all_is_counted(
    tmp_path: Path, disk: Callable[[], SlowDisk]
) -> None:
    async def main() -> None:
        chain = Chain()
        await filled(tmp_path, chain)
        before = bytes_of_content(tmp_path)
        slow = disk()
        async with PinsetCache.open(tmp_path, chain, 4 << 20) as cache:
            await recovery.measure(cache.store)
            await cache.store.budget.resize(3 << 20)
            assert bytes_of_content(tmp_path) == before
            slow.failures = 2  # a scan that fails is repeated
            slow.go.set()
            with trio.fail_after(30):
                await cache.store.budget.counted.wait()
                await recovery.measure(cache.store)
            assert taken(tmp_path) <= 3 << 20
            assert not slow.failures

    trio.run(main)


def test_without_an_index_the_packs_are_read_once_all_is_counted(
    tmp_path: Path, disk: Callable[[], SlowDisk]
) -> None:
    async def main() -> None:
        chain = Chain()
        _files, small = await filled(tmp_path, chain)
        (tmp_path / "index.sqlite").unlink()
        slow = disk()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            slow.go.set()
            with trio.fail_after(30):
                await cache.store.blocks.packs_indexed.wait()
            assert cache.store.blocks.locate(small) is not None
            await cache.reader.block(small)
            assert chain.asked == []

    trio.run(main)


@pytest.mark.logs("what belongs to that pin is looked for")
@pytest.mark.parametrize("damaged", [False, True])
def test_pinned_content_stays_pinned_while_the_cache_is_counted_and_later(
    tmp_path: Path, disk: Callable[[], SlowDisk], damaged: bool
) -> None:
    async def main() -> None:
        chain = Chain()
        _files, _small = await filled(tmp_path, chain)
        raw = chain.add(random_bytes(200_000, 50))
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache, cache.pinned.pin(raw) as pinning:
            await pinning.file(FileRef(raw, 200_000))
            await cache.reader.leaf(FileRef(raw, 200_000), Leaf(raw, 0, 200_000))
        if damaged:
            text = '{"bytes": 1e999, "files": [], "packs": []}'
            (tmp_path / "pinned" / cids.text(raw)).write_text(text)
        slow = disk()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            freed: list[int] = []

            async def evict() -> None:
                freed.append(await cache.store.evict())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(evict)
                await trio.sleep(0.05)
                assert not freed
                slow.go.set()
            await trio.testing.wait_all_tasks_blocked(0.05)
            await cache.store.evict()
            assert list(cache.store.staging.entries) == [raw]
            assert cache.statistics().pinned >= 200_000
            assert cache.statistics().pinned_lost == 0
        assert [path.name for path in (tmp_path / "staging").iterdir()] == [cids.text(raw)]

    trio.run(main)


def test_files_that_are_evicted_or_renamed_during_the_count_are_counted_correctly(
    tmp_path: Path, disk: Callable[[], SlowDisk]
) -> None:
    async def main() -> None:
        chain = Chain()
        files, _small = await filled(tmp_path, chain)
        (tmp_path / "staging" / (cids.text(files[-1][0].cid) + PART)).write_bytes(b"beside its whole file")
        slow = disk()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            store = cache.store
            gone, renamed = files[20][0], files[21][0]
            assert await store.has_leaf(gone, files[20][1][0])
            await store.budget.evict(gone.cid)
            assert not await store.has_leaf(gone, files[20][1][0])
            assert await store.has_leaf(renamed, files[21][1][0])
            slow.go.set()
            with trio.fail_after(30):
                await store.budget.counted.wait()
            assert gone.cid not in store.staging.entries
            assert gone.cid not in store.budget.arc
            assert len(store.staging.entries) == len(store.budget.arc) - 1 == FILES - 1
        names = {path.name for path in (tmp_path / "staging").iterdir()}
        assert len(names) == FILES - 1
        assert sum(name.endswith(PART) for name in names) == PARTS

    trio.run(main)


@pytest.mark.parametrize(
    ("prefix", "digest", "count"),
    [(b"\x12\x20", hashlib.sha256, 30_000), (b"\x13\x40", hashlib.sha512, 50_000)],
    ids=["sha2-256", "sha2-512"],
)
def test_the_order_of_use_that_is_written_at_the_end_fits_the_budget(
    tmp_path: Path, prefix: bytes, digest: Callable[[bytes], "hashlib._Hash"], count: int
) -> None:
    """The order of use takes 2 or 5 MB of the index here, and the cache is full."""
    folder, page = tmp_path / "staging", bytes(4096)
    folder.mkdir(mode=0o700)
    for number in range(count):
        name = cids.text(cids.make(cids.RAW, prefix + digest(b"%d" % number).digest()))
        (folder / name).write_bytes(page)
        (folder / name).chmod(0o600)

    async def main() -> int:
        async with PinsetCache.open(tmp_path, Chain(), 1 << 30) as cache:
            await cache.store.budget.counted.wait()
            await cache.store.budget.resize(cache.store.budget.used)
            return cache.store.budget.limit

    budget = trio.run(main)
    assert taken(tmp_path) <= budget
    assert len(list(folder.iterdir())) > 0.9 * count, "few files are evicted for it"


def rows_of_uses(folder: Path) -> dict[object, tuple[float, int]]:
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as database:
        found = database.execute("SELECT key, last, frequent FROM uses").fetchall()
    return {key: (last, frequent) for key, last, frequent in found}


def order_of(cache: PinsetCache) -> tuple[list[Key], list[Key]]:
    arc = cache.store.budget.arc
    return list(arc.used_once()), list(arc.used_again())


def make_staging_files(folder: Path, count: int) -> list[FileRef]:
    """Files of which an earlier run left one page each."""
    (folder / "staging").mkdir(mode=0o700)
    made = []
    for number in range(count):
        made.append(FileRef(cids.make(cids.RAW, b"\x12\x20" + number.to_bytes(32, "big")), 100_000))
        path = folder / "staging" / (cids.text(made[-1].cid) + PART)
        path.write_bytes(bytes(4096))
        os.truncate(path, 100_000)
        path.chmod(0o600)
    return made


def test_an_unmount_writes_only_the_changes_in_the_order_of_use(tmp_path: Path) -> None:
    """To write a row for each of a million staging files takes 9 s."""

    async def main() -> None:
        files = make_staging_files(tmp_path, 1000)
        async with PinsetCache.open(tmp_path, Chain(), BUDGET):
            pass
        before = rows_of_uses(tmp_path)
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            for number in (7, 3, 900):
                cache.reader.opened(files[number])
            await cache.store.evict(files[20].cid)
            order = order_of(cache)
        after = rows_of_uses(tmp_path)
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert changed == {files[number].cid for number in (7, 3, 900, 20)}
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            assert order_of(cache) == order

    trio.run(main)


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_use_is_exact_after_many_unmounts(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the unmounts, files are used, evicted, pinned, read again or staged anew, and the clock is
    set."""
    monkeypatch.setattr(recovery, "FEWEST_TOGETHER", 3)
    dice = random.Random(seed)
    all_written: list[bool] = []
    clear_uses = Index.clear_uses
    monkeypatch.setattr(Index, "clear_uses", lambda index: all_written.append(True) or clear_uses(index))

    async def main() -> None:
        chain = Chain()
        files = make_staging_files(tmp_path, 300)
        order: tuple[list[Key], list[Key]] | None = None
        for run in range(12):
            shift = dice.choice([0, 0, 0, -3600, 86_400])
            with monkeypatch.context() as patch:
                now = time.time
                patch.setattr(time, "time", lambda now=now, shift=shift: now() + shift)
                async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
                    if order is not None:
                        assert order_of(cache) == order
                    budget, pinned = cache.store.budget, list[Key]()
                    for _ in range(dice.choice([0, 5, 5, 40, 400])):
                        file = dice.choice(files)
                        match dice.randrange(8):
                            case 0:
                                await cache.store.evict(file.cid)
                            case 1:
                                budget.protect(file.cid)
                                pinned.append(file.cid)
                            case 2 if pinned:
                                budget.unprotect(pinned.pop())
                            case 3:
                                budget.arc.refresh(file.cid)
                            case 4 if run > 2:
                                await cache.reader.block(chain.add(random_bytes(100, dice.randrange(10**6))))
                            case 5:
                                leaf = Leaf(file.cid, 0, 4096)
                                await cache.store.put_leaves(file, [leaf], [bytes(4096)], "memory")
                            case _:
                                cache.reader.opened(file)
                    for key in pinned:
                        budget.unprotect(key)
                    order = order_of(cache)
                    all_written.append(False)
            assert set(rows_of_uses(tmp_path)) == {*order[0], *order[1], recovery.IN_ORDER}

    trio.run(main)
    ways = list(zip(all_written, [*all_written[1:], False], strict=True))
    assert (False, True) in ways, "some unmounts write all rows"
    assert (False, False) in ways[:-1], "other unmounts write only the changes"


def test_a_new_file_that_was_exempt_from_eviction_counts_as_a_new_row(tmp_path: Path) -> None:
    """If its row is taken for an old one, the last eviction makes no room for it."""
    files = make_staging_files(tmp_path, 20)
    new = cids.make(cids.RAW, b"\x12\x20" + b"\xff" * 32)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            budget = cache.store.budget
            budget.arc.admit(new, 4096)
            for cid in (new, files[7].cid):
                budget.protect(cid)
                budget.unprotect(cid)
            assert (budget.arc.changes.came, budget.arc.changes.left) == ({new}, set())
            assert budget.arc.changes.moved == {new, files[7].cid}
            budget.remove(new)

    trio.run(main)
