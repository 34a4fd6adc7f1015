"""Files that are not CARs, and CARs that are damaged, have a wrong index or change. Their whole blocks can
still be read; the others are errors."""

import os
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.local.in_place import CarSource
from tests.sources.cars import FIXTURES, SampleCar, index, need_fixtures, offsets, pairs, sections, v2


@need_fixtures
@pytest.mark.parametrize(
    ("name", "message"),
    [("badheaderlength", "its header would have"), ("sample-corrupt-pragma", "cut short")],
)
def test_fixtures_that_are_not_cars_are_refused(name: str, message: str, tmp_path: Path) -> None:
    sample = SampleCar(tmp_path, (FIXTURES / "go-car" / f"{name}.car").read_bytes())
    with pytest.raises(SourceFailed, match=f"some.car: .*{message}"):
        sample.open()


@need_fixtures
@pytest.mark.parametrize("count", [0, 5])
def test_blocks_before_a_section_of_an_impossible_length_can_still_be_read(
    count: int, tmp_path: Path
) -> None:
    bad = (FIXTURES / "go-car" / "badsectionlength.car").read_bytes()
    assert bad.startswith(sections([]))
    blocks = pairs(count)
    sample = SampleCar(tmp_path, sections(blocks) + bad.removeprefix(sections([])))
    assert not sample.open().whole
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    with pytest.raises(NotHere):
        sample.get(cids.parse("bafkreiab2rek7wjiazkfrt3hbnqpljmu24226alszdlh6ivic2abgjubzi"))


def test_a_changed_file_gets_a_new_index_and_the_old_one_is_removed(tmp_path: Path) -> None:
    first, second = pairs(5), pairs(7, seed=2)
    sample = SampleCar(tmp_path, sections(first))
    sample.get(first[0][0])
    sample.path.write_bytes(sections(second))
    assert sample.get(*(cid for cid, _block in second)) == [block for _cid, block in second]
    assert len(list(sample.indexes.iterdir())) == 1


def test_a_damaged_stored_index_is_an_error_once_and_then_rebuilt(tmp_path: Path) -> None:
    blocks = pairs(50)
    sample = SampleCar(tmp_path, sections(blocks))
    sample.get(blocks[0][0])
    (kept,) = sample.indexes.iterdir()
    kept.write_bytes(b"something else")
    with pytest.raises(SourceFailed):
        sample.open()
    assert sample.get(blocks[3][0]) == [blocks[3][1]]


@pytest.mark.parametrize("wrap", ["v1", "v2"])
def test_blocks_before_a_cut_can_still_be_read(wrap: str, tmp_path: Path) -> None:
    blocks = pairs(20)
    data = sections(blocks)
    cut = offsets(blocks)[cids.multihash(blocks[12][0])[2:]] + 500
    whole = data if wrap == "v1" else v2(data, index(offsets(blocks)))
    sample = SampleCar(tmp_path, whole[: cut + (0 if wrap == "v1" else car.V2_BYTES)])
    assert not sample.open().whole
    assert sample.get(*(cid for cid, _block in blocks[:12])) == [block for _cid, block in blocks[:12]]
    for cid, _block in blocks[12:]:
        with pytest.raises(NotHere):
            sample.get(cid)


@pytest.mark.parametrize("wrong", [0, 5, 18, 10**6, 1 << 62, (1 << 64) - 1])
def test_a_wrong_offset_in_an_index_is_an_error_of_that_block_only(wrong: int, tmp_path: Path) -> None:
    blocks = pairs(10)
    records = offsets(blocks) | {cids.multihash(blocks[4][0])[2:]: wrong}
    sample = SampleCar(tmp_path, v2(sections(blocks), index(records)))
    with pytest.raises(SourceFailed, match="its index names a place"):
        sample.get(blocks[4][0])
    assert sample.get(blocks[5][0]) == [blocks[5][1]]


@pytest.mark.parametrize(
    "index_bytes",
    [
        b"\x99\x09nothing known",
        b"\x81",
        b"\x81\x08\xff\xff\xff\x7f",
        b"\x81\x08\x01\0\0\0\x12\0\0\0\0\0\0\0\x01\0\0\0\x28\0\0\0\xff\xff\xff\xff\0\0\0\0",
    ],
)
def test_an_unreadable_index_is_replaced(index_bytes: bytes, tmp_path: Path) -> None:
    blocks = pairs(10)
    sample = SampleCar(tmp_path, v2(sections(blocks), index_bytes))
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]
    assert sample.indexes.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"not a CAR at all, but a text", "not a CAR"),
        (b"\x7fELF" + bytes(100), "not a CAR"),
        (car.PRAGMA, "cut short in its header"),
        (car.encode_v2(car.V2Header(51, 100, 0)), "would begin behind the file's end"),
        (
            car.encode_v2(car.V2Header(60, 5, 0)) + bytes(9) + car.encode_header([]),
            "crosses the end of its data",
        ),
        (
            car.encode_v2(car.V2Header(51, 51, 0)) + car.encode_v2(car.V2Header(51, 51, 0)),
            "version 2 where version 1 belongs",
        ),
    ],
)
def test_a_file_that_is_not_a_car_is_refused_with_its_name(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match=f"some.car: .*{message}"):
        SampleCar(tmp_path, data).open()


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match="No such file") as caught:
        CarSource.open(tmp_path / "none.car", tmp_path)
    assert caught.value.kind == "missing"
    with pytest.raises(SourceFailed, match="Is a directory"):
        CarSource.open(tmp_path, tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    """To open a FIFO without a writer would take forever."""
    os.mkfifo(tmp_path / "fifo.car")
    reading, writing = os.pipe()
    for path in (tmp_path / "fifo.car", Path(f"/dev/fd/{reading}")):
        with pytest.raises(SourceFailed, match="not a file that can be read at any place"):
            CarSource.open(path, tmp_path)
    os.close(reading)
    os.close(writing)


def test_a_file_that_changes_while_its_source_is_open_is_an_error(tmp_path: Path) -> None:
    first, second = pairs(5), pairs(5, seed=2)
    sample = SampleCar(tmp_path, sections(first))
    source = sample.open()
    with open(sample.path, "r+b") as file:
        file.write(sections(second))
    os.utime(sample.path, ns=(1, 1))

    async def main() -> None:
        with pytest.raises(SourceFailed, match="has changed since it was opened"):
            await source.get(first[2][0])

    trio.run(main)


def test_a_block_that_is_truncated_away_later_is_an_error(tmp_path: Path) -> None:
    blocks = pairs(5, 300_000)
    sample = SampleCar(tmp_path, sections(blocks))
    source = sample.open()
    os.truncate(sample.path, 700_000)

    async def main() -> None:
        assert await source.get(blocks[1][0]) == blocks[1][1]
        with pytest.raises(SourceFailed, match="cut short"):
            await source.get(blocks[2][0])

    trio.run(main)


@pytest.mark.parametrize("padding", [1, 9, 4096, 1_000_000])
@pytest.mark.parametrize("wrap", ["v1", "v2"])
def test_a_car_that_ends_in_zeros_is_whole(wrap: str, padding: int, tmp_path: Path) -> None:
    blocks = pairs(20)
    data = sections(blocks) + bytes(padding)
    sample = SampleCar(tmp_path, data if wrap == "v1" else v2(data, b""))
    assert sample.open().whole
    assert sample.get(*(cid for cid, _block in blocks)) == [block for _cid, block in blocks]


def test_a_car_padded_by_a_hole_is_whole(tmp_path: Path) -> None:
    sample = SampleCar(tmp_path, sections(pairs(20)))
    os.truncate(sample.path, 1 << 40)
    assert sample.open().whole


def test_a_car_with_zeros_in_its_middle_is_damaged(tmp_path: Path) -> None:
    data = sections(pairs(20))
    assert not SampleCar(tmp_path, data + bytes(300_000) + b"\1").open().whole
