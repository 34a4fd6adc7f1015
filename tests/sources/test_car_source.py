"""CAR files as sources, with an index and without one."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere
from ipfsfuse.sources.base import LeafRange
from ipfsfuse.sources.local.car_writer import RecordSorter
from ipfsfuse.sources.local.in_place import CarSource
from ipfsfuse.structures import Buffer
from tests.sources.cars import FIXTURES, SampleCar, index, need_fixtures, offsets, pairs, sections, v2
from tests.sources.streamed import give_each


@need_fixtures
@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("gateway-conformance/*.car")), ids=lambda path: path.stem
)
def test_every_block_of_the_conformance_files_is_found(path: Path, tmp_path: Path) -> None:
    from tests.dag.test_car import read

    roots, blocks = read(path.read_bytes())
    sample = SampleCar(tmp_path, path.read_bytes())
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    assert tuple(sample.open().roots()) == roots


@need_fixtures
def test_a_version_2_file_of_go_car_is_read_by_its_own_index(tmp_path: Path) -> None:
    from tests.dag.test_car import read

    data = (FIXTURES / "go-car" / "sample-unixfs-v2.car").read_bytes()
    sample = SampleCar(tmp_path, data)
    _roots, blocks = read(data)
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    assert not sample.indexes.exists()


@pytest.mark.parametrize("form", [car.INDEX_SORTED, car.MULTIHASH_INDEX_SORTED])
@pytest.mark.parametrize("count", [0, 1, 100, 101, 5000])
def test_both_index_formats_find_all_blocks_and_no_others(form: int, count: int, tmp_path: Path) -> None:
    blocks = pairs(count, 10)
    sample = SampleCar(tmp_path, v2(sections(blocks), index(offsets(blocks), form), padding=33))
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    assert not sample.indexes.exists(), "its own index was not used"
    for cid, _block in pairs(20, 10, seed=2):
        with pytest.raises(NotHere):
            sample.get(cid)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: v2(data, b"", padding=7)], ids=["v1", "v2"])
def test_an_index_is_built_once_and_kept(wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    blocks = pairs(500)
    sample = SampleCar(tmp_path, wrap(sections(blocks)))
    reports: list[tuple[int, int]] = []
    CarSource.open(sample.path, sample.indexes, lambda done, total: reports.append((done, total)))
    assert reports[-1] == (sample.path.stat().st_size, sample.path.stat().st_size)
    (kept,) = sample.indexes.iterdir()
    written = kept.stat().st_mtime_ns
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    assert [path.stat().st_mtime_ns for path in sample.indexes.iterdir()] == [written]


def test_a_block_is_found_by_any_cid_with_its_multihash(tmp_path: Path) -> None:
    ((cid, block),) = pairs(1)
    sample = SampleCar(tmp_path, sections([(cid, block)]))
    assert sample.get(cids.make(cids.DAG_PB, cids.multihash(cid)), Cid(cids.multihash(cid))) == [block, block]


def test_duplicates_are_read_and_identity_and_unknown_hashes_are_not(tmp_path: Path) -> None:
    blocks = pairs(3)
    identity = cids.make(cids.RAW, b"\x00\x03abc")
    unknown = cids.make(cids.RAW, b"\x22\x20" + bytes(32))
    sample = SampleCar(tmp_path, sections([*blocks, (identity, b"abc"), (unknown, b"?"), *blocks]))
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    for cid in (identity, unknown):
        with pytest.raises(NotHere):
            sample.get(cid)


def test_other_hash_functions_have_their_own_records(tmp_path: Path) -> None:
    block = b"some block"
    sha = cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(block).digest())
    sha1 = cids.make(cids.RAW, b"\x11\x14" + hashlib.sha1(block).digest())
    sha512 = cids.make(cids.RAW, b"\x13\x40" + hashlib.sha512(block).digest())
    sample = SampleCar(tmp_path, sections([(sha, block), (sha1, block)]))
    assert sample.get(sha, sha1) == [block, block]
    with pytest.raises(NotHere):
        sample.get(sha512)


def test_a_range_is_delivered_in_order_without_missing_blocks(tmp_path: Path) -> None:
    small, large = pairs(1500, 700), pairs(30, 1 << 20, seed=3)
    stored = small + large
    sample = SampleCar(tmp_path, sections(stored[1000:] + stored[:1000]))
    wanted = [*stored[:700], *pairs(3, 10, seed=4), *stored[700:]]
    leaves = [Leaf(cid, 0, len(block)) for cid, block in wanted]
    got: list[tuple[int, Buffer]] = []

    async def deliver(number: int, blocks: Sequence[Buffer]) -> None:
        got.extend(enumerate(blocks, number))

    async def main() -> None:
        source = sample.open()
        await give_each(source.stream(LeafRange(stored[0][0], 1, leaves)), deliver)
        await source.aclose()

    trio.run(main)
    assert got == [(number, block) for number, (_cid, block) in enumerate(wanted) if not 700 <= number < 703]


def test_an_error_of_the_receiver_ends_the_stream_and_is_raised(tmp_path: Path) -> None:
    blocks = pairs(3000)
    sample = SampleCar(tmp_path, sections(blocks))

    async def deliver(_number: int, _blocks: Sequence[Buffer]) -> None:
        raise LookupError("enough")

    async def main() -> None:
        with pytest.raises(LookupError):
            await give_each(
                sample.open().stream(
                    LeafRange(blocks[0][0], 1, [Leaf(cid, 0, 1000) for cid, _block in blocks])
                ),
                deliver,
            )

    trio.run(main)


GIB100 = 100 << 30


def huge(path: Path, indexed: bool) -> list[Cid]:
    """Makes a CAR file of 100 GiB: 50,000 sections of 2 MiB, whose blocks are holes. Returns their CIDs."""
    found, records, size = [], {}, 2 << 20
    base = car.V2_BYTES if indexed else 0
    with open(path, "wb") as out:
        at = len(car.encode_header([]))
        os.pwrite(out.fileno(), car.encode_header([]), base)
        for number in range(GIB100 // size):
            digest = hashlib.sha256(number.to_bytes(4)).digest()
            cid = cids.make(cids.RAW, b"\x12\x20" + digest)
            head = car.section_head(cid, size - 36 - 3)
            os.pwrite(out.fileno(), head, base + at)
            records[digest] = at
            found.append(cid)
            at += size
        out.truncate(base + at)
        if indexed:
            os.pwrite(out.fileno(), car.encode_v2(car.V2Header(base, at, base + at)), 0)
            os.pwrite(out.fileno(), index(records), base + at)
    return found


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("indexed", [True, False], ids=["with an index", "without an index"])
def test_a_car_of_100_gib_is_opened_without_being_read_through(indexed: bool, tmp_path: Path) -> None:
    path = tmp_path / "huge.car"
    found = huge(path, indexed)
    before = bytes_read()
    source = CarSource.open(path, tmp_path / "indexes")
    assert bytes_read() - before < (64 << 10 if indexed else 512 << 20)
    assert len(trio.run(source.get, found[-1])) == (2 << 20) - 39
    again = bytes_read()
    CarSource.open(path, tmp_path / "indexes")
    assert bytes_read() - again < 64 << 10


def test_records_are_sorted_the_same_in_pieces_and_at_once(tmp_path: Path) -> None:
    blocks = pairs(1000, 10)
    hashes = [cids.multihash(cid) for cid, _block in blocks] + [
        b"\x11\x14" + bytes([n]) * 20 for n in range(50)
    ]
    written = []
    for held in (7, 100, 10_000):
        out = tmp_path / str(held)
        with open(out, "wb") as file, RecordSorter(tmp_path, held) as sorter:
            for offset, multihash in enumerate(hashes):
                sorter.add(multihash, offset)
            sorter.write(file)
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == 2 + 4 + 2 * (8 + 4 + 12) + 1000 * 40 + 50 * 28
