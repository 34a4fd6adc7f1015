"""Pins, and fsck."""

import errno
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.budget import Key
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.records import PinRecord, PinRecords
from ipfsfuse.cache.store.staging import Staging, StagingEntry
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, file_layout, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Leaf
from ipfsfuse.dag.traversal import Walk
from ipfsfuse.dag.unixfs import Type, UnixFS, encode
from ipfsfuse.errors import StoreFailed, Unavailable, UsageError
from tests.cache.standin import Chain, flip, make_file, random_bytes, staged, staged_items

MIB = 1 << 20
BUDGET = 16 * MIB


def file_node(chain: Chain, size: int, seed: int) -> Cid:
    """A file of raw leaves below a real root."""
    _ref, leaves, _content = make_file(chain, size, 1 << 17, seed)
    sizes = [leaf.size for leaf in leaves]
    links = [dagpb.Link(leaf.cid, b"", leaf.size) for leaf in leaves]
    return chain.add(dagpb.encode(links, encode(UnixFS(Type.FILE, None, size, sizes))), cids.DAG_PB)


def directory(chain: Chain, children: dict[str, Cid]) -> Cid:
    links = [dagpb.Link(cid, name.encode(), 0) for name, cid in sorted(children.items())]
    return chain.add(dagpb.encode(links, encode(UnixFS(Type.DIRECTORY))), cids.DAG_PB)


def tree(chain: Chain, files: int, seed: int, size: int = MIB) -> Cid:
    """A directory of `files` files, a small one and a directory below."""
    small = chain.add(random_bytes(5000, seed))
    below = directory(chain, {"small": small})
    return directory(
        chain,
        {"below": below}
        | {f"file {number}": file_node(chain, size, seed + number) for number in range(files)},
    )


async def drive(cache: PinsetCache, walk: Walk[list[Leaf]]) -> list[Leaf]:
    try:
        wanted = next(walk)
        while True:
            wanted = walk.send([nodes.parse(cid, await cache.reader.block(cid)) for cid in wanted])
    except StopIteration as end:
        return list(end.value)


async def read_all(cache: PinsetCache, cid: Cid, pin: bool = False) -> None:
    """Reads a whole tree, and pins it if asked, as the command does."""
    if pin:
        async with cache.pinned.pin(cid) as pinning:
            await _read(cache, cid, pinning.file)
    else:
        await _read(cache, cid, None)


async def _read(cache: PinsetCache, cid: Cid, each: object) -> None:
    node = nodes.parse(cid, await cache.reader.block(cid))
    if isinstance(node, Directory):
        for link in node.links:
            await _read(cache, link.cid, each)
    elif isinstance(node, File):
        ref = FileRef(cids.canonical(cid), node.size)
        if callable(each):
            await each(ref)
        for leaf in await drive(cache, file_layout.leaves(node, 0, node.size)):
            await cache.reader.leaf(ref, leaf)


async def churn(cache: PinsetCache, chain: Chain) -> None:
    """Reads other content of four times the budget."""
    for seed in range(500, 500 + 4 * BUDGET // (2 * MIB)):
        ref, leaves, _content = make_file(chain, 2 * MIB, 1 << 18, seed)
        for leaf in leaves:
            await cache.reader.leaf(ref, leaf)
        for number in range(20):
            await cache.reader.block(chain.add(random_bytes(20_000, 10_000 + 100 * seed + number)))


async def fetches(cache: PinsetCache, chain: Chain, cid: Cid) -> int:
    """Reads a whole tree, and returns how many blocks the sources were asked for."""
    chain.asked.clear()
    await read_all(cache, cid)
    return len(chain.asked)


def test_pinned_content_is_not_evicted_until_it_is_unpinned_even_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        kept = tree(chain, 3, seed=100)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, kept, pin=True)
            assert kept in [cid for cid, _spelling in cache.named_roots()]
            await churn(cache, chain)
            assert await fetches(cache, chain, kept) == 0
            assert cache.statistics().pinned > 3 * MIB
            assert {one.pinned for one in staged_items(cache)} == {"user", ""}
            await cache.store.evict()
            assert await fetches(cache, chain, kept) == 0
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await churn(cache, chain)
            assert await fetches(cache, chain, kept) == 0
            assert cache.statistics().used <= BUDGET
            await cache.pinned.unpin(kept)
            assert cache.statistics().pinned == 0
            await cache.store.evict()
            assert await fetches(cache, chain, kept) > 20
            with pytest.raises(UsageError, match="is not pinned"):
                await cache.pinned.unpin(kept)

    trio.run(main)


def test_unpinning_one_of_two_pins_keeps_the_content_that_they_share(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        shared = tree(chain, 2, seed=100)
        one = directory(chain, {"shared": shared, "own": chain.add(random_bytes(3000, 1))})
        two = directory(chain, {"shared": shared, "own": chain.add(random_bytes(3000, 2))})
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, one, pin=True)
            await read_all(cache, two, pin=True)
            await cache.pinned.unpin(two)
            await churn(cache, chain)
            assert await fetches(cache, chain, one) == 0
            await read_all(cache, one, pin=True)  # to pin it again does no harm
            await churn(cache, chain)
            assert await fetches(cache, chain, one) == 0

    trio.run(main)


def test_a_pin_larger_than_the_budget_is_refused_with_the_sizes_and_pins_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        large = tree(chain, 20, seed=100)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            with pytest.raises(
                StoreFailed,
                match=f"can't be pinned: of the budget of {BUDGET} bytes 0 are pinned already, .* raise "
                "--budget",
            ):
                await read_all(cache, large, pin=True)
            assert cache.statistics().pinned == 0
            assert cache.statistics().used <= BUDGET
            await churn(cache, chain)
            small = tree(chain, 2, seed=300)
            await read_all(cache, small, pin=True)

    trio.run(main)


def test_a_pin_that_fails_pins_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        root = tree(chain, 2, seed=100)
        del chain.blocks[cids.multihash(chain.add(random_bytes(5000, 100)))]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            with pytest.raises(Unavailable):
                await read_all(cache, root, pin=True)
            assert cache.statistics().pinned == 0
            assert list(cache.named_roots()) == []

    trio.run(main)


@pytest.mark.logs("reads go on without the cache")
def test_a_pin_fails_if_a_write_failed_even_if_the_disk_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a file with a hole would be pinned."""

    async def pin(cache: PinsetCache, cid: Cid) -> None:
        async with cache.pinned.pin(cid) as pinning:
            file = _file(cid, await cache.reader.block(cid))
            ref = FileRef(cid, file.size)
            await pinning.file(ref)
            for leaf in await drive(cache, file_layout.leaves(file, 0, file.size)):
                await cache.reader.leaf(ref, leaf)
                cache.store.backoff._until = 0  # as if its five seconds were over
            assert not cache.store.backoff.reason

    async def main() -> None:
        chain = Chain()
        cid = file_node(chain, MIB, 100)
        write = Staging.write

        def fail(
            staging: Staging, entry: StagingEntry, offset: int, parts: Sequence[bytes | memoryview]
        ) -> tuple[int, OSError | None]:
            if offset == 3 << 17:
                return 0, OSError(errno.EIO, "Input/output error")
            return write(staging, entry, offset, parts)

        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            with monkeypatch.context() as patch:
                patch.setattr(Staging, "write", fail)
                with pytest.raises(StoreFailed, match="can't be pinned: not all of it could be written"):
                    await pin(cache, cid)
            assert not cache.pinned.roots
            await pin(cache, cid)
            chain.asked.clear()
            await cache.store.evict()
            assert await fetches(cache, chain, cid) == 0

    trio.run(main)


@pytest.mark.logs("wrong bytes in the cache")
def test_fsck_finds_and_mends_everything_that_is_wrong(tmp_path: Path) -> None:
    async def main() -> None:
        chain = Chain()
        root = tree(chain, 3, seed=100)
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, root)
        for path in staged(tmp_path, "staging"):
            for leaf in (1, 4):
                flip(path, leaf * (1 << 17) + 77)
        flip(staged(tmp_path, "packs")[0], 200)
        progress: list[tuple[int, int]] = []

        async def note_progress(done: int, total: int) -> None:
            progress.append((done, total))

        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            report = await cache.fsck(note_progress)
            assert (report.files, report.wrong, report.mended, report.unproved) == (3, 7, 7, 0)
            assert report.blocks == 3 * 8 + 6
            assert report.bytes > 3 * MIB
            assert progress == sorted(progress)
            assert progress[-1][0] <= progress[-1][1]
            report = await cache.fsck()
            assert (report.wrong, report.mended) == (0, 0)
            assert await fetches(cache, chain, root) == 0

    trio.run(main)


@pytest.mark.logs("wrong bytes in the cache")
def test_fsck_without_sources_sets_aside_what_is_wrong_and_keeps_what_it_can_not_verify(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        chain = Chain()
        root = tree(chain, 1, seed=100)
        lone, lone_leaves, lone_content = file_node(chain, MIB, 200), *make_file(chain, MIB, 1 << 17, 200)[1:]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await read_all(cache, root)
            ref = FileRef(lone, MIB)
            for leaf in await drive(
                cache, file_layout.leaves(_file(lone, await cache.reader.block(lone)), 0, MIB)
            ):
                await cache.reader.leaf(ref, leaf)
            location = cache.store.blocks.locate(lone)
            assert location is not None
        damaged, damaged_leaves = file_node(chain, MIB, 100), make_file(chain, MIB, 1 << 17, 100)[1]
        flip(tmp_path / "packs" / f"{location.pack}.pack", location.at)
        flip(tmp_path / "staging" / cids.text(damaged), 77)
        async with PinsetCache.open(tmp_path, Chain(), BUDGET) as cache:
            report = await cache.fsck()
            assert (report.files, report.wrong, report.mended, report.unproved) == (2, 2, 0, 1)
            wrong = cids.text(damaged_leaves[0].cid)
            assert report.lost == [cids.text(lone), f"{wrong} at 0 in {cids.text(damaged)}"]
            assert cache.store.blocks.locate(lone) is None
            there = [await cache.store.has_leaf(FileRef(damaged, MIB), leaf) for leaf in damaged_leaves]
            assert there == [False] + [True] * 7
            got = [bytes(await cache.reader.leaf(ref, leaf)) for leaf in lone_leaves]
            assert b"".join(got) == lone_content

    trio.run(main)


def _file(cid: Cid, block: bytes) -> File:
    node = nodes.parse(cid, block)
    assert isinstance(node, File)
    return node


@pytest.mark.logs("what belongs to that pin is looked for")
def test_no_flipped_bit_in_the_record_of_a_pin_changes_what_is_pinned(tmp_path: Path) -> None:
    """A CID or a number with a flipped bit is a different one. Then a pinned file could be evicted."""
    records = PinRecords(tmp_path / "pinned")
    chain = Chain()
    root, files = chain.add(b"root", cids.DAG_PB), [chain.add(b"%d" % number) for number in range(2)]
    keys = frozenset[Key]([*files, 12, 7])
    records.write(root, PinRecord(12_345, keys))
    (path,) = staged(tmp_path, "pinned")
    before = path.read_bytes()
    unknown = 0
    for bit in range(8 * len(before)):
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found = records.load()[root].keys
        assert found in (None, keys), flipped
        unknown += found is None
    assert unknown > 4 * len(before)
    for other in (b"5", b"[]", b'"text"', b"null"):
        path.write_bytes(other)
        assert records.load() == {root: PinRecord(0, None)}
    path.write_bytes(before)
    assert records.load() == {root: PinRecord(12_345, keys)}
    records.folder.close()


def test_a_record_of_a_pin_that_an_older_version_wrote_is_read(tmp_path: Path) -> None:
    records = PinRecords(tmp_path / "pinned")
    root = Chain().add(b"root", cids.DAG_PB)
    text = {"cid": cids.text(root), "bytes": 5, "files": [], "packs": [3], "pinned": "2026-01-01T00:00:00Z"}
    (tmp_path / "pinned" / cids.text(root)).write_text(json.dumps(text) + "\n")
    assert records.load() == {root: PinRecord(5, frozenset({3}))}
    records.folder.close()
