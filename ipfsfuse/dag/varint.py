"""Unsigned varints (https://github.com/multiformats/unsigned-varint): at most 9 bytes, in the shortest
form."""

from ipfsfuse.errors import Malformed
from ipfsfuse.structures import Buffer


def get(data: Buffer, at: int) -> tuple[int, int]:
    """The value at index `at`, and the index after it. Raises Malformed."""
    if at < len(data) and data[at] < 0x80:  # nearly all
        return data[at], at + 1
    value = shift = 0
    for index in range(at, min(at + 9, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and index > at:
                raise Malformed("a varint is not in its shortest form")
            return value, index + 1
        shift += 7
    raise Malformed("a varint is cut short or too long")


def put(value: int) -> bytes:
    """`value`, not negative, as a varint."""
    if value < 0x80:
        return bytes((value,))
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
