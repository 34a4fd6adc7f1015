"""Each kind of content in the cache: how it is staged, verified, pinned and listed."""

import os
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, varint
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.dag.unixfs import Type, UnixFS, encode
from ipfsfuse.errors import Malformed, NotALeaf
from tests.cache.standin import Chain, Recorder, flip, make_file, random_bytes, staged_bytes, staged_items
from tests.cache.test_pinset import read

BUDGET = 64 << 20
KIB = 1 << 10
MIB = 1 << 20


@pytest.mark.logs("wrong bytes in the cache")
def test_a_wrong_leaf_is_fetched_again_in_the_same_read(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.block(file.cid)
            await read(cache, file, leaves)
        flip(tmp_path / "staging" / cids.text(file.cid), leaves[4].offset + 100)
        flip(next((tmp_path / "packs").iterdir()), 60)
        chain.asked.clear()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await read(cache, file, leaves) == content
            assert await cache.reader.block(file.cid) == chain.blocks[cids.multihash(file.cid)]
            assert chain.asked == [leaves[4].cid, file.cid]
            assert await read(cache, file, leaves) == content
            assert len(chain.asked) == 2

    trio.run(main)


def test_a_leaf_that_its_content_can_not_prove_is_kept_as_a_whole_block(tmp_path: Path) -> None:
    """Its block is correct, but has a mode, so that it can't be made again from the content alone."""
    chain = Chain()
    data = random_bytes(100 * KIB, 1)
    size = varint.put(len(data))
    message = b"\x08\x02\x12" + size + data + b"\x18" + size + b"\x38\xa4\x03"
    odd = b"\x0a" + varint.put(len(message)) + message
    leaf = Leaf(chain.add(odd, cids.DAG_PB), 0, len(data))
    file = FileRef(chain.add(b"root", cids.DAG_PB), 3 * len(data))

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert bytes(await cache.reader.leaf(file, leaf)) == data
            assert bytes(await cache.reader.leaf(file, leaf)) == data
            assert chain.asked == [leaf.cid]
            assert not list((tmp_path / "staging").iterdir())

    trio.run(main)


def test_a_file_that_states_a_wrong_leaf_size_does_not_harm_other_files(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)
    wrong = FileRef(chain.add(b"liar", cids.DAG_PB), MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for _ in range(2):
                with pytest.raises(Malformed, match="but its parent states 5"):
                    await cache.reader.leaf(wrong, Leaf(leaves[0].cid, 0, 5))
            assert await read(cache, file, leaves) == content
            assert staged_bytes(cache, wrong.cid) == 0

    trio.run(main)


def test_an_interior_node_is_not_read_as_a_leaf(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    links = [dagpb.Link(leaf.cid, b"", leaf.size) for leaf in leaves[:2]]
    sizes = [leaf.size for leaf in leaves[:2]]
    node = chain.add(dagpb.encode(links, encode(UnixFS(Type.FILE, None, sum(sizes), sizes))), cids.DAG_PB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for _ in range(2):
                with pytest.raises(NotALeaf):
                    await cache.reader.leaf(file, Leaf(node, 0, sum(sizes)))
            assert chain.asked == [node]

    trio.run(main)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_own_bytes_of_an_interior_node_are_not_taken_for_its_whole_content(
    tmp_path: Path, in_place: bool
) -> None:
    """Its parent states the size of its own bytes, but it also has children."""
    chain = Chain(in_place)
    own, (file, leaves, _content) = random_bytes(100_000, 1), make_file(chain, MIB)
    first = leaves[0]
    node = chain.add(
        dagpb.encode(
            [dagpb.Link(first.cid, b"", first.size)],
            encode(UnixFS(Type.FILE, own, len(own) + first.size, [first.size])),
        ),
        cids.DAG_PB,
    )

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            came: list[Leaf] = []
            await cache.reader.ahead(file, [Leaf(node, 0, len(own))], lambda leaf, _data: came.append(leaf))
            assert not came
            for early in (True, False):
                with pytest.raises(NotALeaf):
                    await cache.reader.leaf(file, Leaf(node, 0, len(own)), early=early)
                assert await cache.reader.leaf(file, Leaf(node, 0, len(own), True)) == own

    trio.run(main)


def test_small_files_and_inline_files_get_no_staging_files(tmp_path: Path) -> None:
    chain = Chain()
    small = [chain.add(random_bytes(2000, number)) for number in range(500)]
    inline = cids.make(cids.RAW, b"\x00\x05hello")

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for cid in small:
                assert (
                    await cache.reader.leaf(FileRef(cid, 2000), Leaf(cid, 0, 2000))
                    == chain.blocks[cids.multihash(cid)]
                )
            assert await cache.reader.block(inline) == b"hello"
            assert await cache.reader.leaf(FileRef(inline, 5), Leaf(inline, 0, 5)) == b"hello"
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for cid in small:
                await cache.reader.block(cid)
            assert chain.asked == small
            assert staged_bytes(cache, small[0]) == 2000

    trio.run(main)
    assert not list((tmp_path / "staging").iterdir())
    packs = list((tmp_path / "packs").iterdir())
    assert len(packs) <= 3
    assert (
        sum(pack.stat().st_blocks * 512 for pack in packs) + os.stat(tmp_path / "index.sqlite").st_size
        < 1.3 * 500 * 2000
    )


def test_a_raw_block_of_a_mebibyte_is_staged_once_as_a_file(tmp_path: Path) -> None:
    chain = Chain()
    data = random_bytes(MIB, 3)
    cid = chain.add(data)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await cache.reader.block(cid) == data
            assert await cache.reader.leaf(FileRef(cid, MIB), Leaf(cid, 0, MIB)) == data
            assert await cache.reader.block(cid) == data
            assert chain.asked == [cid]
            assert not list((tmp_path / "packs").iterdir())

    trio.run(main)


def test_a_file_is_held_at_the_node_when_it_is_staged_and_released_when_it_is_evicted(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)

    async def main() -> None:
        pins = Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            await read(cache, file, leaves)
            cache.reader.opened(file)
            assert staged_items(cache)[0].pinned == "cache"
            assert await cache.store.evict(file.cid) >= MIB
            await cache.reader.leaf(file, leaves[0])
            assert [verb for verb, cid in pins.asked if cid == file.cid] == ["add", "remove", "add"]

    trio.run(main)


def test_a_small_file_is_held_at_the_node_when_it_is_opened_and_released_with_its_pack(
    tmp_path: Path,
) -> None:
    chain = Chain()
    cid = chain.add(random_bytes(3000, 1))

    async def main() -> None:
        pins = Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            cache.reader.opened(FileRef(cid, 3000))
            assert pins.asked == []  # it is not known whether a node has it
            await cache.reader.block(cid)
            cache.reader.opened(FileRef(cid, 3000))
            await cache.store.evict()
            assert pins.asked == [("add", cid), ("remove", cid)]

    trio.run(main)


def test_names_in_the_root_are_listed_as_first_spelled_while_they_are_staged(tmp_path: Path) -> None:
    chain = Chain()
    block = chain.add(b"a directory", cids.DAG_PB)
    gone = chain.add(b"never read", cids.DAG_PB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.reader.block(block)
            cache.names.note(block, "first")
            cache.names.note(block, "second")
            cache.names.note(gone, "gone")
            assert list(cache.named_roots()) == [(block, "first")]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert list(cache.named_roots()) == [(block, "first")]
            await cache.store.evict()
            assert list(cache.named_roots()) == []

    trio.run(main)


def test_an_error_in_the_body_is_raised_unchanged(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(KeyError, match="mine"):
            async with PinsetCache.open(tmp_path, Chain(), BUDGET):
                raise KeyError("mine")

    trio.run(main)
