"""CAR framing: every fixture is read or refused as its name says, written CARs are read back, and damaged
CARs are refused."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.car import StreamParser
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, Malformed

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
VALID = {
    "gateway-raw-block": 3, "path_gateway_dag_dag-pb": 4, "path_gateway_dag_plain-cbor": 1, "path_gateway_tar_fixtures": 10,
    "path_gateway_tar_inside-root": 4, "path_gateway_unixfs_dir-with-files": 9, "path_gateway_unixfs_dir-with-percent-encoded-filename": 2,
    "path_gateway_unixfs_symlink": 3, "subdomain_gateway_fixtures": 11, "trustless_gateway_car_dir-with-duplicate-files": 9,
    "trustless_gateway_car_file-3k-and-3-blocks-missing-block": 3, "trustless_gateway_car_single-layer-hamt-with-multi-block-files": 243,
    "sample-unixfs-v2": 3, "simple-unixfs-missing-blocks": 17, "simple-unixfs": 22,
}  # fmt: skip
"""Blocks in each file."""
INVALID = {
    "badheaderlength": "its header would have 216830324832 bytes",
    "badsectionlength": "the CAR section at 0 would have 216830324832 bytes",
    "sample-corrupt-pragma": "cut short",
}
need_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="no conformance fixtures")

Blocks = list[tuple[Cid, bytes]]


def fixture(name: str) -> bytes:
    (path,) = FIXTURES.glob(f"*/{name}.car")
    return path.read_bytes()


def read(data: bytes, step: int = 1 << 20) -> tuple[tuple[Cid, ...] | None, Blocks]:
    """The roots and the blocks of a whole stream that arrives in pieces of `step` bytes."""
    parser = StreamParser()
    blocks = [pair for start in range(0, len(data), step) for pair in parser.feed(data[start : start + step])]
    parser.finish()
    return parser.roots, blocks


def raw(data: bytes) -> Cid:
    return cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(data).digest())


def write(roots: list[Cid], blocks: list[bytes]) -> bytes:
    return car.encode_header(roots) + b"".join(
        car.section_head(raw(block), len(block)) + block for block in blocks
    )


def frame(data: bytes, before: int = 0, index: bytes = b"") -> bytes:
    header = car.V2Header(car.V2_BYTES + before, len(data), car.V2_BYTES + before + len(data) if index else 0)
    return car.encode_v2(header) + bytes(before) + data + index


@need_fixtures
def test_every_fixture_is_listed_in_this_file() -> None:
    assert {path.stem for path in FIXTURES.rglob("*.car")} == set(VALID) | set(INVALID)


@need_fixtures
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", VALID)
def test_a_valid_fixture_is_read_in_full(name: str, step: int) -> None:
    roots, blocks = read(fixture(name), step)
    assert roots
    assert len(blocks) == VALID[name]
    for cid, block in blocks:
        cids.verify(cid, block)


@need_fixtures
@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_fixture_gives_the_error_of_its_name(name: str, step: int) -> None:
    with pytest.raises(Malformed, match=INVALID[name]):
        read(fixture(name), step)


@given(st.lists(st.binary(max_size=300)), st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 50))
def test_a_car_that_was_written_is_read_back(blocks: list[bytes], roots: list[bytes], step: int) -> None:
    named = [raw(root) for root in roots]
    assert read(write(named, blocks), step) == (tuple(named), [(raw(block), block) for block in blocks])


@given(st.lists(st.binary(max_size=300)), st.integers(0, 200), st.binary(max_size=60), st.integers(1, 50))
def test_version_2_with_padding_is_read_back(
    blocks: list[bytes], before: int, index: bytes, step: int
) -> None:
    roots, found = read(frame(write([], blocks), before, index), step)
    assert roots == ()
    assert found == [(raw(block), block) for block in blocks]


def test_headers_of_many_roots_and_all_kinds_of_cids() -> None:
    roots = [raw(bytes([n % 256, n // 256])) for n in range(300)] + [
        Cid(b"\x12\x20" + bytes(32)),
        cids.make(0x71, b"\x00\x80\x01" + bytes(128)),
    ]
    header = car.encode_header(roots)
    assert car.header_length(header) == len(header)
    assert car.decode_header(header) == tuple(roots)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a CAR"),
        (b"\xa0", "no version"),
        (b"\xa1eroots\x80", "no version"),
        (b"\xa1gversion\x01", "without roots"),
        (b"\xa2eroots\xf6gversion\x01", "no list of roots"),
        (b"\xa2eroots\x80gversion\x03", "version 3"),
        (b"\xa2eroots\x80gversion\x02", "version 2 where version 1 belongs"),
        (b"\xa2eroots\x80gversion\x18\x01", "shortest form"),
        (b"\xa2eroots\x80gversion\x01\x00", "behind its end"),
        (b"\xa2eroots\x80eroots\x80", "does not belong"),
        (b"\xa3eroots\x80gversion\x01dmore\x01", "does not belong"),
        (b"\xa2eroots\x81\x40gversion\x01", "no CID"),
        (b"\xa2eroots\x81\xd8\x2a\x43\x00\x01\x55gversion\x01", "a root in the CAR's header"),
        (b"\xa2eroots\x81\xd8\x2b\x41\x00gversion\x01", "not a CID"),
        (b"\xa2eroots\x9b\xff\xff\xff\xff\xff\xff\xff\xffgversion\x01", "no CID"),
        (b"\xbf", "not a CAR"),
    ],
)
def test_a_malformed_header_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        car.decode_header(bytes([len(body)]) + body)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (car.V2Header(50, 100, 0), "puts its data at 50"),
        (car.V2Header(1 << 63, 100, 0), "puts its data"),
        (car.V2Header(51, 0, 0), "gives its data 0 bytes"),
        (car.V2Header(51, 100, 150), "puts its index at 150"),
        (car.V2Header(51, 100, 1 << 63), "puts its index"),
    ],
)
def test_a_frame_with_wrong_offsets_is_refused(header: car.V2Header, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        car.decode_v2(car.encode_v2(header))


@pytest.mark.parametrize("cut", [0, 1, 10, 17, 19, 40, 60, -1])
def test_a_stream_that_ends_too_early_is_refused_as_cut_short(cut: int) -> None:
    with pytest.raises(Malformed, match="cut short"):
        read(write([], [b"some block", bytes(300)])[:cut])


def test_data_that_ends_inside_a_section_is_refused() -> None:
    whole = frame(write([], [bytes(300)]))
    damaged = bytearray(whole)
    damaged[len(car.PRAGMA) + 24 : len(car.PRAGMA) + 32] = (200).to_bytes(8, "little")
    with pytest.raises(Malformed, match="ends inside a section"):
        read(bytes(damaged))


@settings(max_examples=300)
@given(st.binary(max_size=400), st.integers(1, 400))
def test_random_bytes_give_blocks_or_an_error_of_ours(noise: bytes, step: int) -> None:
    try:
        read(noise, step)
    except IpfsFuseError:
        pass


def test_mutations_and_prefixes_give_blocks_or_an_error_of_ours() -> None:
    whole = frame(write([raw(b"root")], [b"a", b"", bytes(200)]), 5, b"index")
    chance = random.Random(7)
    for _ in range(20_000):
        mutant = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            mutant[chance.randrange(len(mutant))] = chance.randrange(256)
        try:
            read(bytes(mutant[: chance.randrange(len(mutant) + 1)]))
        except IpfsFuseError:
            pass


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("padding", [1, 5, 5000])
def test_zeros_at_the_end_of_a_stream_are_accepted(padding: int, step: int) -> None:
    data = write([], [b"one", b"two"]) + bytes(padding)
    for stream in (data, frame(data), frame(data, 9, b"an index")):
        assert read(stream, step) == ((), [(raw(b"one"), b"one"), (raw(b"two"), b"two")])
    with pytest.raises(Malformed, match="behind the zeros"):
        read(data + b"\1", step)


def test_the_header_of_a_stream_has_a_limit() -> None:
    few, many = (
        [raw(b"%d" % number) for number in range(1500)],
        [raw(b"%d" % number) for number in range(1700)],
    )
    assert len(car.encode_header(few)) < car.MAX_STREAM_HEADER < len(car.encode_header(many))
    assert read(write(few, [b"one"]))[0] == tuple(few)
    with pytest.raises(Malformed, match="its header would have"):
        list(StreamParser().feed(car.encode_header(many)[:100]))
    assert car.decode_header(car.encode_header(many)) == tuple(many), "the header of a file may be larger"
