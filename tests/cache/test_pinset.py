"""Reading through the cache: what is fetched, what is read back, and that all of it is proved."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.dag.unixfs import Type, UnixFS, encode
from ipfsfuse.errors import Malformed, NotALeaf, Unavailable
from tests.cache.standin import Chain, make_file, random_bytes

BUDGET = 64 << 20
KIB = 1 << 10
MIB = 1 << 20


class Recorder:
    """Pins that remember what was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Cid]] = []

    def add(self, cid: Cid) -> None:
        self.asked.append(("add", cid))

    def remove(self, cid: Cid) -> None:
        self.asked.append(("remove", cid))

    def state(self, cid: Cid) -> str:
        return "cache" if ("add", cid) in self.asked else ""


async def read(cache: PinsetCache, file: FileRef, leaves: Sequence[Leaf]) -> bytes:
    return b"".join([bytes(await cache.leaf(file, leaf)) for leaf in leaves])


@pytest.mark.parametrize("dag_pb", [False, True])
@pytest.mark.parametrize("chunk", [64 * KIB, 70_001])
def test_what_was_read_once_is_read_from_the_disk_across_a_restart(tmp_path: Path, dag_pb: bool, chunk: int) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, 3 * MIB + 5, chunk, dag_pb=dag_pb)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.block(file.cid)
            assert await read(cache, file, leaves) == content
            assert len(chain.asked) == len(leaves) + 1
            assert await read(cache, file, leaves) == content
            await cache.block(file.cid)
            assert len(chain.asked) == len(leaves) + 1
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await read(cache, file, leaves) == content
            await cache.block(file.cid)
            assert len(chain.asked) == len(leaves) + 1
            (kept,) = cache.kept()
            assert (kept.cid, kept.size, kept.complete) == (file.cid, file.size, True)
            assert kept.staged == cache.staged_bytes(file.cid) >= file.size

    trio.run(main)
    assert [item.name for item in (tmp_path / "files").iterdir()] == [cids.text(file.cid)]


def test_a_part_is_kept_as_a_part_and_goes_on_where_it_was(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.leaf(file, leaves[3])
            await cache.leaf(file, leaves[9])
        assert [item.name for item in (tmp_path / "files").iterdir()] == [cids.text(file.cid) + ".part"]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert not cache.kept()[0].complete
            assert await read(cache, file, leaves) == content
            assert len(chain.asked) == len(leaves)

    trio.run(main)


def test_a_hundred_readers_of_a_cold_file_ask_for_each_block_once(tmp_path: Path) -> None:
    chain = Chain()
    chain.delay = 0.001
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache, trio.open_nursery() as nursery:

            async def reader() -> None:
                await cache.block(file.cid)
                assert await read(cache, file, leaves) == content

            for _ in range(100):
                nursery.start_soon(reader)

    trio.run(main)
    assert sorted(chain.asked) == sorted([file.cid, *(leaf.cid for leaf in leaves)])


def test_what_is_read_in_place_is_not_staged_again(tmp_path: Path) -> None:
    chain = Chain(in_place=True)
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        pins = Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            await cache.block(file.cid)
            assert await read(cache, file, leaves) == content
            got: dict[int, bytes] = {}
            await cache.ahead(file, leaves, lambda leaf, data: got.__setitem__(leaf.offset, bytes(data)))
            assert b"".join(got[leaf.offset] for leaf in leaves) == content
            assert list(cache.kept()) == []
            assert cache.staged_bytes(file.cid) == 0
            assert pins.asked == []

    trio.run(main)
    assert not list((tmp_path / "files").iterdir())
    assert not list((tmp_path / "packs").iterdir())


def test_ahead_asks_for_one_run_of_what_is_missing_and_hands_over_all_of_it_once(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.leaf(file, leaves[5])
            got: list[tuple[Leaf, bytes]] = []
            await cache.ahead(file, leaves, lambda leaf, data: got.append((leaf, bytes(data))))
            assert [run.leaves for run in chain.runs] == [[*leaves[:5], *leaves[6:]]]
            assert b"".join(data for _leaf, data in sorted(got, key=lambda item: item[0].offset)) == content
            asked = len(chain.asked)
            await cache.ahead(file, leaves)
            assert await read(cache, file, leaves) == content
            assert (len(chain.runs), len(chain.asked)) == (1, asked)

    trio.run(main)


def test_a_leaf_that_stands_many_times_in_a_file_is_asked_for_once(tmp_path: Path) -> None:
    chain = Chain()
    zeros = chain.add(bytes(64 * KIB))
    leaves = [Leaf(zeros, 64 * KIB * number, 64 * KIB) for number in range(16)]
    file = FileRef(chain.add(b"root", cids.DAG_PB), MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            got: list[int] = []
            await cache.ahead(file, leaves, lambda leaf, data: got.append(leaf.offset))
            assert sorted(got) == [leaf.offset for leaf in leaves]
            assert await read(cache, file, leaves) == bytes(MIB)
            assert chain.asked == [zeros]

    trio.run(main)


def test_ahead_raises_nothing_and_who_reads_hears(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    del chain.blocks[cids.multihash(leaves[2].cid)]

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            got: list[Leaf] = []
            await cache.ahead(file, leaves, lambda leaf, data: got.append(leaf))
            assert leaves[0] in got
            assert leaves[2] not in got
            with pytest.raises(Unavailable):
                await cache.leaf(file, leaves[2])
            await cache.leaf(file, leaves[3])

    trio.run(main)


def test_a_stalled_leaf_fails_at_its_deadline_and_delays_no_other(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    chain.stalled.add(leaves[1].cid)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET, deadline=7) as cache, trio.open_nursery() as nursery:
            ended: list[str] = []

            async def stalled() -> None:
                with pytest.raises(Unavailable):
                    await cache.leaf(file, leaves[1])
                ended.append("stalled")

            nursery.start_soon(stalled)
            await wait_all_tasks_blocked()
            await cache.leaf(file, leaves[0])
            clock.jump(6.9)
            await wait_all_tasks_blocked()
            assert ended == []
            clock.jump(0.2)
            await wait_all_tasks_blocked()
            assert ended == ["stalled"]
            await stalled()  # remembered: no time passes here

    clock = MockClock()  # time stands still, but for its jumps
    trio.run(main, clock=clock)


def test_the_last_cancelled_reader_cancels_its_request(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    chain.stalled.add(leaves[0].cid)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cache.leaf, file, leaves[0])
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await wait_all_tasks_blocked()
            assert chain.cancelled == [leaves[0].cid]
            assert list(cache.kept()) == []

    trio.run(main)


@pytest.mark.logs("wrong bytes in the cache")
def test_a_wrong_leaf_is_fetched_again_in_the_same_read(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.block(file.cid)
            await read(cache, file, leaves)
        flip(tmp_path / "files" / cids.text(file.cid), leaves[4].offset + 100)
        flip(next((tmp_path / "packs").iterdir()), 60)
        chain.asked.clear()
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await read(cache, file, leaves) == content
            assert await cache.block(file.cid) == chain.blocks[cids.multihash(file.cid)]
            assert chain.asked == [leaves[4].cid, file.cid]
            assert await read(cache, file, leaves) == content
            assert len(chain.asked) == 2

    trio.run(main)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_leaf_that_content_cannot_prove_is_kept_whole(tmp_path: Path) -> None:
    """Its envelope is right, and none that is tried: it carries a mode."""
    chain = Chain()
    data = random_bytes(100 * KIB, 1)
    size = varint.put(len(data))
    message = b"\x08\x02\x12" + size + data + b"\x18" + size + b"\x38\xa4\x03"
    odd = b"\x0a" + varint.put(len(message)) + message
    leaf = Leaf(chain.add(odd, cids.DAG_PB), 0, len(data))
    file = FileRef(chain.add(b"root", cids.DAG_PB), 3 * len(data))

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert bytes(await cache.leaf(file, leaf)) == data
            assert bytes(await cache.leaf(file, leaf)) == data
            assert chain.asked == [leaf.cid]
            assert not list((tmp_path / "files").iterdir())

    trio.run(main)


def test_a_file_that_lies_about_a_leaf_spoils_no_other(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, MIB)
    liar = FileRef(chain.add(b"liar", cids.DAG_PB), MIB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for _ in range(2):
                with pytest.raises(Malformed, match="and its parent says 5"):
                    await cache.leaf(liar, Leaf(leaves[0].cid, 0, 5))
            assert await read(cache, file, leaves) == content
            assert cache.staged_bytes(liar.cid) == 0

    trio.run(main)


def test_an_interior_node_taken_for_a_leaf_is_told_apart(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)
    links = [dagpb.Link(leaf.cid, b"", leaf.size) for leaf in leaves[:2]]
    sizes = [leaf.size for leaf in leaves[:2]]
    node = chain.add(dagpb.encode(links, encode(UnixFS(Type.FILE, None, sum(sizes), sizes))), cids.DAG_PB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for _ in range(2):
                with pytest.raises(NotALeaf):
                    await cache.leaf(file, Leaf(node, 0, sum(sizes)))
            assert chain.asked == [node]

    trio.run(main)


def test_small_files_and_identity_blocks_make_no_files(tmp_path: Path) -> None:
    chain = Chain()
    small = [chain.add(random_bytes(2000, number)) for number in range(500)]
    inline = cids.make(cids.RAW, b"\x00\x05hello")

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for cid in small:
                assert await cache.leaf(FileRef(cid, 2000), Leaf(cid, 0, 2000)) == chain.blocks[cids.multihash(cid)]
            assert await cache.block(inline) == b"hello"
            assert await cache.leaf(FileRef(inline, 5), Leaf(inline, 0, 5)) == b"hello"
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            for cid in small:
                await cache.block(cid)
            assert chain.asked == small
            assert cache.staged_bytes(small[0]) == 2000

    trio.run(main)
    assert not list((tmp_path / "files").iterdir())
    packs = list((tmp_path / "packs").iterdir())
    assert len(packs) <= 3
    assert sum(pack.stat().st_blocks * 512 for pack in packs) + os.stat(tmp_path / "index.sqlite").st_size < 1.3 * 500 * 2000


def test_a_raw_block_of_a_mebibyte_is_staged_once_as_the_file_it_is(tmp_path: Path) -> None:
    chain = Chain()
    data = random_bytes(MIB, 3)
    cid = chain.add(data)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert await cache.block(cid) == data
            assert await cache.leaf(FileRef(cid, MIB), Leaf(cid, 0, MIB)) == data
            assert await cache.block(cid) == data
            assert chain.asked == [cid]
            assert not list((tmp_path / "packs").iterdir())

    trio.run(main)


def test_pins_are_asked_for_when_a_file_is_staged_and_let_go_when_it_leaves(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, _content = make_file(chain, MIB)

    async def main() -> None:
        pins = Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            await read(cache, file, leaves)
            cache.opened(file)
            assert cache.kept()[0].pinned == "cache"
            assert await cache.evict(file.cid) >= MIB
            await cache.leaf(file, leaves[0])
            assert [verb for verb, cid in pins.asked if cid == file.cid] == ["add", "add", "remove", "add"]

    trio.run(main)


def test_small_files_are_pinned_when_opened_and_let_go_with_their_pack(tmp_path: Path) -> None:
    chain = Chain()
    cid = chain.add(random_bytes(3000, 1))

    async def main() -> None:
        pins = Recorder()
        async with PinsetCache.open(tmp_path, chain, BUDGET, pins=pins) as cache:
            cache.opened(FileRef(cid, 3000))
            assert pins.asked == []  # nothing is known to have come from a node
            await cache.block(cid)
            cache.opened(FileRef(cid, 3000))
            await cache.evict()
            assert pins.asked == [("add", cid), ("remove", cid)]

    trio.run(main)


def test_names_in_the_root_are_listed_as_first_spelled_while_staged(tmp_path: Path) -> None:
    chain = Chain()
    block = chain.add(b"a directory", cids.DAG_PB)
    gone = chain.add(b"never read", cids.DAG_PB)

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            await cache.block(block)
            cache.note_root(block, "first")
            cache.note_root(block, "second")
            cache.note_root(gone, "gone")
            assert list(cache.named_roots()) == [(block, "first")]
        async with PinsetCache.open(tmp_path, chain, BUDGET) as cache:
            assert list(cache.named_roots()) == [(block, "first")]
            await cache.evict()
            assert list(cache.named_roots()) == []

    trio.run(main)


def test_an_error_in_the_body_comes_out_as_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(KeyError, match="mine"):
            async with PinsetCache.open(tmp_path, Chain(), BUDGET):
                raise KeyError("mine")

    trio.run(main)
