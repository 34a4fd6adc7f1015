"""The parts of the protobuf wire format that dag-pb and UnixFS need
(https://protobuf.dev/programming-guides/encoding/).

All functions take a buffer, the index to read at and the end, and raise Malformed. Varints of protobuf need
not be in their shortest form, and have up to 10 bytes; those of multiformats differ (`dag.varint`).
"""

from ipfsfuse.errors import Malformed
from ipfsfuse.structures import Buffer

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """The value (0 to 2**64 - 1) at index `at`, and the index after it."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
        shift += 7
        if shift > 63:
            break
    raise Malformed("protobuf: a varint is cut short or too long")


def tag(data: Buffer, at: int, end: int) -> tuple[int, int, int]:
    """(field number, wire type, index after it) of the tag at `at`."""
    value, at = varint(data, at, end)
    if not 8 <= value < 1 << 32:
        raise Malformed(f"protobuf: no field has the tag {value}")
    return value >> 3, value & 7, at


def span(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """The start and end index of the bytes of a field. Their length is at `at`."""
    if at < end and data[at] < 0x80:  # the usual length of one byte
        size, at = data[at], at + 1
    else:
        size, at = varint(data, at, end)
    if size > end - at:
        raise Malformed("protobuf: a field is cut short")
    return at, at + size


def skip(data: Buffer, at: int, end: int, wire: int) -> int:
    """The index after an unneeded value of wire type `wire`."""
    if wire == VARINT:
        return varint(data, at, end)[1]
    if wire == BYTES:
        return span(data, at, end)[1]
    size = {FIXED64: 8, FIXED32: 4}.get(wire)
    if size is None or size > end - at:
        raise Malformed(f"protobuf: wire type {wire} is not read here, or its value is cut short")
    return at + size
