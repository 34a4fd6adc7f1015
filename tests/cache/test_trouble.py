"""Trouble with the disk costs speed and is reported, but no read fails."""

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import recovery
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf
from tests.cache.standin import Chain, flip, make_file, random_bytes, staged, staged_bytes
from tests.cache.test_budget import own_filesystem
from tests.cache.test_pinset import read

MIB = 1 << 20
BUDGET = 64 * MIB


@contextlib.contextmanager
def own_mounts(store: Path) -> Iterator[list[Path]]:
    """A context manager in which the folders of the content are separate mounts, so that they can become
    read-only."""
    folders = [store / "staging", store / "packs"]
    for folder in folders:
        folder.mkdir(0o700)
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    (store / "format").write_text("ipfsfuse cache 3\n")
    try:
        yield folders
    finally:
        for folder in folders:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folders: Sequence[Path]) -> Iterator[None]:
    """A context manager in which `folders` are read-only, as on a disk that failed. No file in them may be
    open."""
    for folder in folders:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    yield
    for folder in folders:
        subprocess.run(["mount", "-o", "remount,bind,rw", str(folder)], check=True)


def blocks(chain: Chain, count: int) -> list[FileRef]:
    return [FileRef(chain.add(random_bytes(20_000, 1000 + number)), 20_000) for number in range(count)]


@pytest.mark.logs("reads go on without the cache", "the order of use is not kept")
def test_reads_go_on_when_the_disk_is_full(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", 2 * MIB) as folder:

        async def main() -> None:
            chain = Chain()
            files = [make_file(chain, MIB, seed=seed) for seed in range(4)]
            async with PinsetCache.open(folder, chain, BUDGET) as cache:
                with contextlib.suppress(OSError):
                    (folder / "of-another-program").write_bytes(bytes(2 * MIB))
                for file, leaves, content in files:
                    assert await read(cache, file, leaves) == content
                for small in blocks(chain, 20):
                    await cache.reader.leaf(small, Leaf(small.cid, 0, small.size))
                assert "No space left on device" in cache.trouble
                assert cache.statistics().trouble == cache.trouble
                for file, leaves, content in files:
                    assert await read(cache, file, leaves) == content

        trio.run(main)


@pytest.mark.logs("reads go on without the cache")
def test_reads_go_on_while_the_disk_is_read_only_and_staging_resumes(tmp_path: Path) -> None:
    with own_filesystem(tmp_path / "disk", 32 * MIB) as folder, own_mounts(folder) as mounts:

        async def main() -> None:
            chain = Chain()
            staged, staged_leaves, staged_content = make_file(chain, MIB, seed=1)
            file, leaves, content = make_file(chain, MIB, seed=2)
            async with PinsetCache.open(folder, chain, BUDGET) as cache:
                assert await read(cache, staged, staged_leaves) == staged_content
                with read_only(mounts):
                    assert await read(cache, file, leaves) == content
                    assert "Read-only file system" in cache.trouble
                    chain.asked.clear()
                    assert await read(cache, staged, staged_leaves) == staged_content
                    assert chain.asked == []
                    await cache.store.evict(staged.cid)
                    assert staged_bytes(cache, staged.cid) == 0
                    assert cache.statistics().used > MIB  # it could not be removed, so it still counts
                cache.store.backoff._until = 0  # as if its five seconds were over
                assert await read(cache, file, leaves) == content
                assert cache.trouble == ""
                assert staged_bytes(cache, file.cid) >= MIB

        trio.run(main)


@pytest.mark.logs("reads go on without the cache", "the order of use is not kept")
def test_reads_go_on_after_the_cache_folder_is_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, MIB, seed=1)
        async with PinsetCache.open(tmp_path / "cache", chain, BUDGET) as cache:
            assert await read(cache, file, leaves) == content
            await cache.reader.block(file.cid)
            shutil.rmtree(tmp_path / "cache")
            assert await read(cache, file, leaves) == content
            assert await cache.reader.block(file.cid) == chain.blocks[cids.multihash(file.cid)]
            for small in blocks(chain, 3):
                await cache.reader.leaf(small, Leaf(small.cid, 0, small.size))
            assert "No such file or directory" in cache.trouble

    (tmp_path / "cache").mkdir()
    trio.run(main)


def test_files_are_staged_after_a_user_removed_a_staging_file(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        removed, other = make_file(chain, MIB, seed=1), make_file(chain, MIB, seed=2)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for file, leaves, content in (removed, other, removed):
                assert await read(cache, file, leaves) == content
                if file is removed[0]:
                    (tmp_path / "staging" / cids.text(file.cid)).unlink(missing_ok=True)
            for file, leaves, content in (removed, other, removed):
                assert await read(cache, file, leaves) == content
            assert not cache.trouble
            assert len(staged(tmp_path, "staging")) == 2

    trio.run(main)


@pytest.mark.logs(
    "can't be made: No such file", "can't be opened: No such file", "reads go on without the cache"
)
def test_without_a_folder_reads_go_on_and_nothing_is_made(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, MIB, seed=1)
        async with PinsetCache.open(tmp_path / "missing", chain, BUDGET) as cache:
            assert await read(cache, file, leaves) == content
            (small,) = blocks(chain, 1)
            await cache.reader.leaf(small, Leaf(small.cid, 0, small.size))
            assert "No such file" in cache.trouble
        assert not (tmp_path / "missing").exists()

    trio.run(main)


@pytest.mark.logs("is damaged", "wrong bytes in the cache")
@pytest.mark.parametrize("how", ["overwritten", "cut", "other"])
def test_a_damaged_index_is_set_aside_and_filled_from_the_packs(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        chain = Chain()
        small = blocks(chain, 400)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for one in small:
                await cache.reader.block(one.cid)
        damage(tmp_path / "index.sqlite", how)
        chain.asked.clear()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for one in small:
                assert len(await cache.reader.block(one.cid)) == one.size
            with trio.fail_after(10):
                while not (tmp_path / "index.malformed").exists() or cache.store.blocks.index.anew:
                    await trio.sleep(0.01)
                    await cache.reader.block(small[0].cid)
            chain.asked.clear()
            for one in small:
                assert len(await cache.reader.block(one.cid)) == one.size
            assert chain.asked == []

    trio.run(main)


@pytest.mark.logs("reads go on without the cache")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTDIR])
def test_reads_go_on_if_the_index_can_not_be_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A fake `lstat` fails: EIO and ESTALE can't be caused here."""
    real, failed = os.lstat, 0

    def lstat(path: str | Path, **more: int) -> os.stat_result:
        nonlocal failed
        if "index" in str(path):
            failed += 1
            raise OSError(number, os.strerror(number))
        return real(path, **more)

    async def main() -> None:
        chain = Chain()
        file, leaves, content = make_file(chain, MIB, seed=1)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            monkeypatch.setattr(os, "lstat", lstat)
            monkeypatch.setattr(os, "stat", lstat)
            assert await read(cache, file, leaves) == content
            for small in blocks(chain, 3):
                await cache.reader.block(small.cid)
            with trio.fail_after(10):
                while not failed:  # noqa: ASYNC110 - rows are written, and the index is measured, a second later
                    await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert await read(cache, file, leaves) == content

    trio.run(main)


def test_readers_of_the_index_never_wait_for_its_writer(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        (small,) = blocks(chain, 1)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.block(small.cid)
            await recovery.flush(cache.store)
            index = cache.store.blocks.index
            index._writer.execute("BEGIN IMMEDIATE")
            index._writer.execute("DELETE FROM blocks")
            began = trio.current_time()
            assert cache.store.blocks.locate(small.cid) is not None
            assert (await cache.store.blocks.count()).blocks == 1
            assert trio.current_time() - began < 4  # SQLite waits 5 seconds for a locked database
            index._writer.execute("ROLLBACK")
            assert not (tmp_path / "index.sqlite-shm").exists()

    trio.run(main)


def test_a_pack_number_that_the_index_still_knows_is_not_used_again(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        small = blocks(chain, 100)
        for _ in range(2):
            async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
                for one in small:
                    assert staged_bytes(cache, one.cid) == 0
                for one in reversed(small):
                    await cache.reader.block(one.cid)
            for path in staged(tmp_path, "packs"):
                path.unlink()

    trio.run(main)


@pytest.mark.logs("is damaged")
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE uses SET last = 'soon'",
        "UPDATE packs SET indexed = 'all'",
        "UPDATE roots SET cid = X'ff'",
        "UPDATE blocks SET at = X'01'",
        "UPDATE blocks SET at = -5",
        "UPDATE blocks SET size = 1152921504606846976",
    ],
)
def test_a_damaged_row_of_the_index_prevents_neither_a_start_nor_a_read(
    tmp_path: Path, statement: str
) -> None:
    async def main() -> None:
        chain = Chain()
        (one,) = blocks(chain, 1)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            cache.names.note(one.cid, "as-spelled")
            async with cache.pinned.pin(one.cid):
                await cache.reader.block(one.cid)
        with contextlib.closing(sqlite3.connect(tmp_path / "index.sqlite")) as database, database:
            assert database.execute(statement).rowcount > 0
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert len(await cache.reader.block(one.cid)) == one.size
            assert cache.statistics().pinned >= one.size
            assert one.cid in [cid for cid, _spelling in cache.named_roots()]
            await cache.fsck()

    trio.run(main)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "overwritten":
        path.write_bytes(data[:100] + random_bytes(len(data) - 100, 1))
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(b"this is no database\n" * 1000)


@pytest.mark.logs("wrong bytes in the cache", "is damaged")
def test_ten_thousand_bit_flips_give_no_wrong_byte_and_are_mended_by_new_fetches(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        files = [
            make_file(chain, MIB, chunk, seed, dag_pb)
            for seed, (chunk, dag_pb) in enumerate([(1 << 16, False), (30_011, True)] * 4)
        ]
        small = blocks(chain, 100)
        dice = random.Random(1)
        flips = 0
        while flips < 10_000:
            async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
                asked = list[int]()
                for _ in range(2):
                    for file, leaves, content in files:
                        assert await read(cache, file, leaves) == content
                    for one in small:
                        assert await cache.reader.block(one.cid) == chain.blocks[cids.multihash(one.cid)]
                    asked.append(len(chain.asked))
                    chain.asked.clear()
                assert asked[0] > 200 or not flips, "what was wrong is fetched again"
                assert asked[1] == 0, "and then it is read from the disk"
            paths = staged(tmp_path, "staging") + staged(tmp_path, "packs")
            sizes = [path.stat().st_size for path in paths]
            for path in dice.choices(paths, sizes, k=1250):
                flip(path, dice.randrange(path.stat().st_size))
                flips += 1

    trio.run(main)


def test_a_file_with_an_impossible_claimed_size_does_not_stop_the_staging_of_others(
    tmp_path: Path,
) -> None:
    """The author of a file can claim any size. If the file can't be staged, the disk is not at fault."""
    chain = Chain()
    file, leaves, content = make_file(chain, 2 * MIB)
    claimed, its_leaves, its_content = make_file(chain, 3 * MIB, seed=1)
    huge = FileRef(claimed.cid, 1 << 62)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await read(cache, huge, its_leaves[:8]) == its_content[: 8 << 16]
            assert await read(cache, file, leaves) == content
            assert staged_bytes(cache, huge.cid) == 0
            assert staged_bytes(cache, file.cid) >= 2 * MIB
            assert cache.store.backoff.reason == ""
            assert not list((cache.store.staging.path).glob(f"{cids.text(huge.cid)}*"))

    trio.run(main)
