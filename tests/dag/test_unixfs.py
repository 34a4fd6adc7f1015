"""The UnixFS message, compared with Google's protobuf on Kubo's schema."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import unixfs
from ipfsfuse.dag.unixfs import MAX_SECONDS, MIN_MTIME, Type, UnixFS
from ipfsfuse.errors import Malformed
from tests.dag.blocks import field
from tests.dag.protoschema import message_class

FILE = field(1, 2)
U64 = st.integers(0, 2**64 - 1)
MTIMES = st.integers(MIN_MTIME * 10**9, MAX_SECONDS * 10**9 + 999_999_999)
MESSAGES = st.builds(
    UnixFS,
    st.sampled_from(Type),
    st.none() | st.binary(max_size=300),
    st.none() | U64,
    st.lists(U64, max_size=40),
    st.none() | U64,
    st.none() | U64,
    st.none() | st.integers(0, 2**32 - 1),
    st.none() | MTIMES,
)


@given(MESSAGES)
def test_encode_and_decode_are_inverse(message: UnixFS) -> None:
    assert unixfs.decode(unixfs.encode(message)) == message


def test_the_data_of_a_view_is_not_copied() -> None:
    message = unixfs.encode(UnixFS(Type.FILE, b"content", 7))
    data = unixfs.decode(memoryview(message)).data
    assert isinstance(data, memoryview)
    assert data.obj is message
    assert data == b"content"


def test_messages_are_read_as_protobuf_requires() -> None:
    sizes = field(4, b"\x05\x80\x01")  # packed
    message = (
        field(3, 9)
        + sizes
        + field(99, b"later")
        + field(98, 1)
        + b"\x89\x06"
        + bytes(8)
        + b"\x8d\x06"
        + bytes(4)
        + field(4, 6)
        + FILE
        + field(3, 139)
    )
    assert unixfs.decode(message) == UnixFS(Type.FILE, None, 139, [5, 128, 6])
    assert unixfs.decode(field(1, 77) + FILE).type is Type.FILE  # an unknown value counts as an unknown field
    assert unixfs.decode(FILE + field(2, b"a") + field(2, b"b")).data == b"b"
    assert unixfs.decode(FILE + field(7, (1 << 32) | 0o644)).mode == 0o644


def stamp(seconds: int, nanos: int | None) -> bytes:
    body = field(1, seconds & (1 << 64) - 1)
    return FILE + field(8, body if nanos is None else body + b"\x15" + nanos.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("seconds", "nanos", "total"),
    [(0, None, 0), (1, 1, 10**9 + 1), (-1, 999_999_999, -1), (MIN_MTIME, None, MIN_MTIME * 10**9)],
)
def test_times_are_nanoseconds_that_count_forward(seconds: int, nanos: int | None, total: int) -> None:
    assert unixfs.decode(stamp(seconds, nanos)).mtime == total
    assert unixfs.encode(UnixFS(Type.FILE, mtime=total)) == stamp(seconds, nanos)


def test_nanoseconds_of_0_are_accepted_though_they_should_be_left_out() -> None:
    """The current JavaScript importer (ipfs-unixfs) writes them."""
    assert unixfs.decode(stamp(1, 0)).mtime == 10**9


REFUSED = {
    "nothing": b"",
    "no type": field(3, 1),
    "an unknown type": field(1, 6),
    "nanoseconds of over a second": stamp(1, 10**9),
    "a year over 9999": stamp(MAX_SECONDS + 1, None),
    "a year below 1": stamp(MIN_MTIME - 1, None),
    "a time without seconds": FILE + field(8, b""),
    "a time cut short": FILE + field(8, b"\x08"),
    "nanoseconds cut short": FILE + field(8, field(1, 1) + b"\x15\x01"),
    "data cut short": FILE + b"\x12\x05abc",
    "a block size cut short": FILE + b"\x20",
    "a second block size cut short": FILE + b"\x20\x01\x20",
    "packed block sizes cut short": FILE + field(4, b"\x80"),
    "a group": FILE + b"\x4b\x4c",
    "field 0": FILE + b"\x00\x00",
    "a fixed64 cut short": FILE + b"\x49" + bytes(7),
}


@pytest.mark.parametrize("message", REFUSED.values(), ids=REFUSED.keys())
def test_a_message_that_breaks_a_rule_is_refused(message: bytes) -> None:
    with pytest.raises(Malformed):
        unixfs.decode(message)


@given(MESSAGES, st.data())
def test_damaged_messages_are_read_as_by_googles_protobuf(message: UnixFS, more: st.DataObject) -> None:
    wire = bytearray(unixfs.encode(message))
    for _ in range(more.draw(st.integers(0, 2))):
        wire[more.draw(st.integers(0, len(wire) - 1))] = more.draw(st.integers(0, 255))
    try:
        found = unixfs.decode(bytes(wire))
    except Malformed:  # `unixfs` is stricter: it refuses groups, and times out of range
        return
    other = message_class("Data")()
    other.ParseFromString(bytes(wire))
    assert found.type == other.Type  # type: ignore[attr-defined]  # the class is made at run time
    for ours, theirs in (
        ("data", "Data"),
        ("filesize", "filesize"),
        ("hash_type", "hashType"),
        ("fanout", "fanout"),
        ("mode", "mode"),
    ):
        assert getattr(found, ours) == (getattr(other, theirs) if other.HasField(theirs) else None)
    assert list(found.blocksizes) == list(other.blocksizes)  # type: ignore[attr-defined]  # the class is made at run time
    assert (found.mtime is None) == (not other.HasField("mtime"))
