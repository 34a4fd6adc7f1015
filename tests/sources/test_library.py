"""The library: a process reads what another one adds, and a removal frees the space that no other root
needs."""

import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf, Link
from ipfsfuse.errors import BlockTooLarge, IpfsFuseError, NotFound, NotHere, StoreFailed
from ipfsfuse.importer.cars import library_damage
from ipfsfuse.sources.base import LeafRange
from ipfsfuse.sources.local import library_compaction
from ipfsfuse.sources.local.in_place import LibrarySource
from ipfsfuse.sources.local.library import Library, NewRoot
from ipfsfuse.structures import Buffer
from tests.sources.libraries import add, dag, multihash, packs, parent, raw
from tests.sources.streamed import give_each


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def test_added_blocks_can_be_read(library: Library) -> None:
    blocks = dag(range(20))
    assert add(library, blocks) == 21
    assert [library.block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    assert list(library.roots()) == [blocks[-1][0]]
    (entry,) = library.entries()
    assert (entry.name, entry.size) == ("thing", sum(len(block) for _cid, block in blocks))


def test_a_second_add_of_the_same_content_adds_nothing(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    before = {path: path.read_bytes() for path in library.folder.rglob("*") if path.is_file()}
    assert add(library, blocks, "other name") == 0
    assert {path: path.read_bytes() for path in library.folder.rglob("*") if path.is_file()} == before


def test_duplicates_within_an_add_are_stored_once(library: Library) -> None:
    blocks = [raw(1)] * 50 + [raw(2)]
    assert add(library, blocks) == 2


def test_removing_the_only_root_frees_all_space(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    library.remove(blocks[-1][0])
    assert packs(library) == {}
    assert list(library.roots()) == []
    with pytest.raises(NotFound):
        library.remove(blocks[-1][0])


def test_a_root_is_removed_by_any_spelling_of_its_cid(library: Library) -> None:
    leaf = raw(1)
    block = dagpb.encode([Link(leaf[0], b"", 1000)], b"\x08\x01")
    root = Cid(multihash(block))
    add(library, [leaf, (root, block)])
    assert list(library.roots()) == [root]
    library.remove(cids.canonical(root))
    assert list(library.roots()) == []


def test_removal_keeps_blocks_that_another_root_shares(library: Library) -> None:
    first, second = dag(range(20)), dag([*range(5), 100, 101])
    add(library, first)
    assert add(library, second) == 3  # two leaves and the root: the rest is there
    size = sum(packs(library).values())
    library.remove(first[-1][0])
    assert [library.block(cid) for cid, _block in second] == [block for _cid, block in second]
    assert sum(packs(library).values()) < size - 12 * 1000
    with pytest.raises(NotHere):
        library.block(first[10][0])
    library.remove(second[-1][0])
    assert packs(library) == {}


def test_a_root_that_is_part_of_another_one_survives_its_removal(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    add(library, [blocks[3]])
    assert len(packs(library)) == 1
    library.remove(blocks[-1][0])
    assert library.block(blocks[3][0]) == blocks[3][1]
    assert list(library.roots()) == [blocks[3][0]]


def test_an_abandoned_add_leaves_no_trace(library: Library) -> None:
    add(library, dag(range(3)))
    before = packs(library)
    with library.open_writer() as writer:
        writer.put(*raw(77))
    assert packs(library) == before
    assert len(library.roots()) == 1


def test_files_are_private(library: Library) -> None:
    add(library, dag(range(3)))
    for path in [library.folder, *library.folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(StoreFailed, match="may be written by others"):
        Library(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(StoreFailed, match="another user"):
        Library(folder)


def test_the_source_gets_blocks_and_streams_ranges(library: Library) -> None:
    small, large = dag(range(300)), dag([1000, 1001, 1002], 1 << 20)
    add(library, small)
    add(library, large)
    leaves = [
        Leaf(cid, index, len(block))
        for index, (cid, block) in enumerate([*small[:-1], raw(9999), *large[:-1]])
    ]
    got: dict[int, Buffer] = {}

    async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
        assert got.keys().isdisjoint(range(index, index + len(blocks)))
        got.update(enumerate(blocks, index))

    async def main() -> None:
        source = LibrarySource(library)
        assert await source.get(large[0][0]) == large[0][1]
        with pytest.raises(NotHere):
            await source.get(raw(9999)[0])
        await give_each(source.stream(LeafRange(small[-1][0], 1, leaves)), deliver)
        assert list(source.roots()) == [small[-1][0], large[-1][0]]
        await source.aclose()

    trio.run(main)
    expected = dict(enumerate(block for _cid, block in [*small[:-1], raw(9999), *large[:-1]]))
    del expected[300]
    assert got == expected


@pytest.mark.parametrize("bytes_first", [False, True])
def test_a_block_that_is_linked_as_raw_and_as_a_node_keeps_all_below_it(
    library: Library, bytes_first: bool
) -> None:
    unneeded, leaf = dag(range(100, 140)), raw(1)
    node = parent([leaf])
    as_bytes = (cids.make(cids.RAW, cids.multihash(node[0])), node[1])
    root = parent([as_bytes, node] if bytes_first else [node, as_bytes])
    with library.open_writer() as writer:
        for cid, block in [*unneeded, leaf, node, root]:
            writer.put(cid, block)
        writer.commit([NewRoot(root[0], "kept", 1), NewRoot(unneeded[-1][0], "unneeded", 1)])
    library.remove(unneeded[-1][0])
    fresh = Library(library.folder)
    assert fresh.packs.find(cids.multihash(unneeded[0][0])) is None, "the pack was rewritten"
    assert [fresh.block(cid) for cid, _block in (root, node, leaf)] == [root[1], node[1], leaf[1]]
    fresh.close()


def test_many_small_packs_become_one(library: Library) -> None:
    everything = [dag([10 * number, 10 * number + 1, 5]) for number in range(library_compaction.MANY + 3)]
    reader = Library(library.folder)
    for blocks in everything:
        add(library, blocks)
        assert reader.block(blocks[0][0]) == blocks[0][1]
    library.remove(everything[1][-1][0])
    library.tidy()
    assert len(packs(library)) == 1
    del everything[1]
    for fresh in (Library(library.folder), reader):
        for blocks in everything:
            assert [fresh.block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    for blocks in everything:
        library.remove(blocks[-1][0])
    assert packs(library) == {}


@pytest.mark.parametrize("number", ["1e999", "NaN", "-1", "1" + "0" * 400, "1" + "0" * 5000, '"x"', "null"])
@pytest.mark.parametrize("key", ["size", "added"])
def test_a_root_with_an_impossible_number_is_ignored_and_others_are_listed(
    library: Library, key: str, number: str
) -> None:
    add(library, [raw(1)])
    ours = {path.name for path in (library.folder / "roots").iterdir()}
    add(library, [raw(2)])
    (other,) = (path for path in (library.folder / "roots").iterdir() if path.name not in ours)
    fields = json.loads(other.read_text())
    other.write_text(json.dumps(fields | {key: "HERE"}).replace('"HERE"', number))
    assert list(library.roots()) == [raw(1)[0]]


def test_packs_that_a_damaged_root_needs_are_not_removed(library: Library) -> None:
    """Before this was mended, the next `add` or `rm` removed all packs that no readable root named."""
    blocks = dag(range(20))
    add(library, blocks)
    (path,) = (library.folder / "roots").iterdir()
    path.write_text(path.read_text()[:20])
    add(library, [raw(1)])
    with pytest.raises(StoreFailed, match="add its content again"):
        library.compact()
    assert [Library(library.folder).block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    add(library, blocks)
    assert library.compact()
    assert set(library.roots()) == {blocks[-1][0], raw(1)[0]}


def test_no_flipped_bit_in_a_root_loses_a_pack(library: Library) -> None:
    """A flipped bit may make a root name another pack. Its own pack must not seem unused then."""
    blocks = dag(range(3))
    add(library, blocks)
    (path,) = (library.folder / "roots").iterdir()
    before, packs_before = path.read_bytes(), packs(library)
    refusals = 0
    for bit in range(8 * len(before)):
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            library.compact()
        except StoreFailed as exc:
            assert "add its content again" in str(exc)
            refusals += 1
        assert packs(library) == packs_before, flipped
    (name,) = packs_before
    assert refusals > 8 * len(name)


@pytest.mark.logs("was not given back")
def test_an_add_repairs_a_root_that_names_a_missing_pack(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    (path,) = (library.folder / "roots").iterdir()
    (name,) = packs(library)
    other = name[:-5] + ("0" if name[-5] != "0" else "1") + ".car"
    path.write_text(path.read_text().replace(name, other))
    add(library, [raw(100)])
    library.remove(raw(100)[0])
    assert [Library(library.folder).block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
    assert [reason for _path, reason in library_damage(library, lambda _done: None)] == [
        f"{path} names the pack {other}, which is not there: add its content again, or remove this root"
    ]
    add(library, blocks)
    assert [entry.packs for entry in library.entries()] == [(name,)]
    assert library.compact()
    assert list(library_damage(library, lambda _done: None)) == []


def test_packs_that_another_process_merges_meanwhile_are_not_damage(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_compaction, "MANY", 2)
    add(library, dag(range(3)))
    before = library.entries()
    add(library, dag(range(10, 13)))
    assert Library(library.folder).compact()
    monkeypatch.setattr(library, "entries", lambda: before)
    assert list(library_damage(library, lambda _done: None)) == []


def test_an_add_that_fails_leaves_a_damaged_root_where_it_is(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before this was mended, it removed the damaged root, and the next `add` removed the packs that the root
    needed."""
    blocks = dag(range(20))
    add(library, blocks)
    (path,) = (library.folder / "roots").iterdir()
    path.write_text(path.read_text()[:20])

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ipfsfuse.sources.local.library.write_root", full)
        with pytest.raises(StoreFailed, match="No space"):
            add(library, blocks)
    add(library, [raw(100)])
    with pytest.raises(StoreFailed, match="add its content again"):
        library.compact()
    assert [Library(library.folder).block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]


@pytest.mark.logs("had wrong bytes")
@pytest.mark.parametrize("damaged", ["content", "head"])
def test_adding_content_again_repairs_a_damaged_pack(library: Library, damaged: str) -> None:
    """The log advises this. Before this was mended, the library did not store the block again, or refused the
    add."""
    blocks = dag(range(20))
    add(library, blocks)
    (name,) = packs(library)
    pack, (cid, block) = library.folder / name, blocks[3]
    lost = block if damaged == "content" else cid
    data = pack.read_bytes()
    pack.write_bytes(data.replace(lost, lost[:-1] + bytes([lost[-1] ^ 1]), 1))
    add(library, blocks)
    assert [Library(library.folder).block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]


@pytest.mark.logs("space was not given back")
def test_no_flipped_bit_before_a_block_fails_an_add_or_removal_or_loses_another_block(
    library: Library,
) -> None:
    """Before this was mended, a wrong length of a section made both fail after they were done."""
    kept, removed = dag(range(3), 40), dag(range(10, 13), 40)
    with library.open_writer() as writer:
        for cid, block in (*removed, *kept):
            writer.put(cid, block)
        writer.commit([NewRoot(blocks[-1][0], "thing", 1) for blocks in (kept, removed)])
    (name,) = packs(library)
    pack, root = library.folder / name, library.folder / "roots" / cids.text(removed[-1][0])
    before, root_before = pack.read_bytes(), root.read_bytes()
    starts = [before.index(cid) - 1 for cid, _block in (*removed, *kept)]
    for at in (*starts, starts[-1] + 1, starts[-1] + 3):
        for bit in range(8):
            flipped = bytearray(before)
            flipped[at] ^= 1 << bit
            pack.unlink()
            pack.write_bytes(flipped)
            pack.chmod(0o600)
            root.write_bytes(root_before)
            readable_before = readable(library.folder, kept)
            Library(library.folder).remove(removed[-1][0])
            add(Library(library.folder), [raw(1000 + bit)])
            assert readable_before <= readable(library.folder, kept)


def test_a_damaged_pack_does_not_stop_the_compaction_of_others(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before this was mended, small packs were not merged any more, and packs with later names were never
    rewritten."""
    monkeypatch.setattr(library_compaction, "MANY", 3)
    first, *others = [dag(range(at, at + 3)) for at in range(0, 50, 10)]
    add(library, first)
    (name,) = packs(library)
    before = (library.folder / name).read_bytes()
    for blocks in others:
        add(library, blocks)
    flipped = bytearray(before)
    flipped[before.index(first[0][0]) - 1] ^= 0x40  # the length of a section
    (library.folder / name).write_bytes(flipped)
    for _ in range(2):
        with pytest.raises(StoreFailed, match=f"{name} is damaged, and was not compacted"):
            Library(library.folder).compact()
        assert len(packs(library)) == 2
    assert (library.folder / name).read_bytes() == flipped
    for blocks in others:
        assert readable(library.folder, blocks) == {cid for cid, _block in blocks}


def readable(folder: Path, blocks: list[tuple[Cid, bytes]]) -> set[Cid]:
    """Those of `blocks` that the library can read."""
    found, library = set(), Library(folder)
    for cid, block in blocks:
        with suppress(IpfsFuseError):
            if library.block(cid) == block:
                found.add(cid)
    library.close()
    return found


def test_an_add_repairs_a_pack_that_was_cut_short(library: Library) -> None:
    blocks = dag(range(20))
    add(library, blocks)
    ((name, size),) = packs(library).items()
    os.truncate(library.folder / name, size // 2)
    with pytest.raises(NotHere):
        Library(library.folder).block(blocks[0][0])
    add(library, blocks)
    assert Library(library.folder).block(blocks[0][0]) == blocks[0][1]


def test_a_block_that_is_too_large_is_named_and_left_out_of_ranges(library: Library) -> None:
    large, small = raw(7, cids.MAX_BLOCK + 1), raw(8, cids.MAX_BLOCK)
    add(library, [large, small])
    leaves = [
        Leaf(large[0], 0, cids.MAX_BLOCK),
        Leaf(small[0], cids.MAX_BLOCK, cids.MAX_BLOCK),
        Leaf(small[0], 2 * cids.MAX_BLOCK, 1),
    ]
    got: list[int] = []

    async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
        got.extend(range(index, index + len(blocks)))

    async def main() -> None:
        source = LibrarySource(library)
        with pytest.raises(
            BlockTooLarge, match=f"library has {cids.text(large[0])} as a block of 2,097,153 bytes"
        ):
            await source.get(large[0])
        assert await source.get(small[0]) == small[1]
        await give_each(source.stream(LeafRange(large[0], 3 * cids.MAX_BLOCK, leaves)), deliver)
        await source.aclose()

    with pytest.raises(BlockTooLarge):
        library.block(large[0])
    trio.run(main)
    assert got == [1], "the other blocks do not have the sizes of their leaves"
