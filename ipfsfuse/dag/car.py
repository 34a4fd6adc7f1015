"""CAR files as bytes: headers, sections, the version 2 frame, both ways, strictly.

Pure: what reads files and streams is in `sources`. Sources: https://ipld.io/specs/transport/car/carv1/ and
carv2/; the bound of a section is go-car's. All errors are Malformed and say where.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid

MAX_HEADER = 8 << 20
"""Bytes of the largest header of a file: 200,000 roots. It takes a second to parse: in a worker thread."""
MAX_STREAM_HEADER = 64 << 10
"""Bytes of the largest header of a stream, which is parsed where it is read: an answer to one question has
one root."""
MAX_SECTION = 8 << 20

HEAD_BYTES = 9 + cids.MAX_CID_BYTES
"""A section's length and CID are never longer than this."""

PRAGMA = b"\x0a\xa1gversion\x02"
"""What every version 2 file begins with: a version 1 header without roots that says 2."""

V2_BYTES = len(PRAGMA) + 40
"""The frame of a version 2 file: pragma and fixed header."""

_V2 = struct.Struct("<QQQQQ")


class Section(NamedTuple):
    """One section's place, in bytes from where its CAR data begins (the index's offsets): the varint's, the
    block's, its end's."""

    cid: Cid
    start: int
    block: int
    end: int


@dataclass(frozen=True, slots=True)
class V2Header:
    """Where a version 2 file keeps its parts, in bytes from its start; `index_offset` is 0 where it has no
    index."""

    data_offset: int
    data_size: int
    index_offset: int
    characteristics: bytes = bytes(16)


# -- the header ----------------------------------------------------------------------------------------------


def header_length(data: bytes, most: int = MAX_HEADER) -> int:
    """How many bytes at the start of `data` are the header with its length, from its first 9 bytes.

    Raises Malformed, for one of over `most` bytes too."""
    try:
        length, at = varint.get(data, 0)
    except Malformed as exc:
        raise Malformed(f"not a CAR: its header's length: {exc}") from exc
    if not 0 < length <= most:
        raise Malformed(f"not a CAR: its header would have {length} bytes: 1 to {most} are allowed")
    return at + length


def decode_header(data: bytes) -> tuple[Cid, ...]:
    """The roots that a version 1 header (length included, exactly `data`) names. Raises Malformed."""
    version, roots = _header_map(data, header_length(data))
    if version != 1:
        raise Malformed(f"a CAR of version {version} where version 1 belongs")
    if roots is None:
        raise Malformed("a CAR header without roots")
    return roots


def is_v2(data: bytes) -> bool:
    """Whether a file that begins with `data` is of version 2. Raises Malformed for versions that nobody
    knows."""
    if data.startswith(PRAGMA):
        return True
    length = header_length(data)
    if length == len(PRAGMA) and len(data) >= length:
        version, _roots = _header_map(data[:length], length)
        if version != 1:
            raise Malformed(f"a CAR of version {version} is not known")
    return False


def encode_header(roots: Sequence[Cid]) -> bytes:
    """A version 1 header, length included."""
    body = b"\xa2eroots" + _cbor_head(4, len(roots)) + b"".join(map(_cbor_link, roots)) + b"gversion\x01"
    return varint.put(len(body)) + body


def decode_v2(data: bytes) -> V2Header:
    """The frame at the start of a version 2 file: the first V2_BYTES. Raises Malformed."""
    if len(data) < V2_BYTES:
        raise Malformed("a CAR of version 2 is cut short in its header")
    high, low, offset, size, index = _V2.unpack_from(data, len(PRAGMA))
    if offset < V2_BYTES or offset >= 1 << 63:
        raise Malformed(f"the CAR's header puts its data at {offset}, where it can't be")
    if not 0 < size < 1 << 63:
        raise Malformed(f"the CAR's header gives its data {size} bytes")
    if index and not offset + size <= index < 1 << 63:
        raise Malformed(f"the CAR's header puts its index at {index}, inside its data")
    return V2Header(offset, size, index, struct.pack("<QQ", high, low))


def encode_v2(header: V2Header) -> bytes:
    """Pragma and header: V2_BYTES."""
    return (
        PRAGMA
        + header.characteristics
        + struct.pack("<QQQ", header.data_offset, header.data_size, header.index_offset)
    )


# -- sections ------------------------------------------------------------------------------------------------


def section_length(data: bytes | memoryview, at: int = 0, base: int = 0) -> int:
    """How many bytes the section that begins at `at` has in all, from its first 9. `base` as for `section`.
    Raises Malformed."""
    try:
        length, head = varint.get(data, at)
    except Malformed as exc:
        raise Malformed(f"the CAR section at {base + at}: {exc}") from exc
    if not 0 < length <= MAX_SECTION:
        raise Malformed(
            f"the CAR section at {base + at} would have {length} bytes: 1 to {MAX_SECTION} are allowed"
        )
    return head - at + length


def section(data: bytes | memoryview, at: int, base: int = 0) -> Section:
    """The section that begins at index `at` of `data`, of which its first HEAD_BYTES need to be there, no
    more.

    `base` is added to the places that come back. Raises Malformed.
    """
    end = at + section_length(data, at, base)
    head = varint.get(data, at)[1]
    try:
        cid, length = cids.decode_prefix(bytes(data[head : min(end, head + cids.MAX_CID_BYTES)]))
    except NotACid as exc:
        raise Malformed(f"the CAR section at {base + at}: {exc}") from exc
    return Section(cid, base + at, base + head + length, base + end)


def section_head(cid: Cid, size: int) -> bytes:
    """What stands before a block of `size` bytes."""
    return varint.put(len(cid) + size) + cid


# -- the header's dag-cbor -----------------------------------------------------------------------------------


def _header_map(data: bytes, length: int) -> tuple[int, tuple[Cid, ...] | None]:
    """(version, roots) of a header that is exactly `length` bytes. Raises Malformed."""
    pairs, at = _cbor_expect(data, varint.get(data, 0)[1], 5, "map")
    if len(data) != length:
        raise Malformed("the CAR's header is cut short")
    version: int | None = None
    roots: tuple[Cid, ...] | None = None
    for _ in range(min(pairs, 3)):
        key, at = _cbor_bytes(data, at, 3, "text")
        if key == b"version" and version is None:
            version, at = _cbor_expect(data, at, 0, "number")
        elif key == b"roots" and roots is None:
            roots, at = _cbor_links(data, at)
        else:
            raise Malformed(f"the CAR's header has a key {key[:20]!r} that does not belong there")
    if version is None or at != length:
        raise Malformed(
            "not a CAR: its header has no version"
            if version is None
            else "the CAR's header has bytes behind its end"
        )
    return version, roots


def _cbor_links(data: bytes, at: int) -> tuple[tuple[Cid, ...], int]:
    count, at = _cbor_expect(data, at, 4, "list of roots")
    roots = []
    for _ in range(count):  # each takes a byte at least, so a lying count ends with the data
        tag, at = _cbor_expect(data, at, 6, "CID")
        link, at = _cbor_bytes(data, at, 2, "CID")
        if tag != 42 or link[:1] != b"\0":
            raise Malformed("a root in the CAR's header is no CID")
        try:
            roots.append(cids.decode(link[1:]))
        except NotACid as exc:
            raise Malformed(f"a root in the CAR's header: {exc}") from exc
    return tuple(roots), at


def _cbor_bytes(data: bytes, at: int, major: int, what: str) -> tuple[bytes, int]:
    length, at = _cbor_expect(data, at, major, what)
    if at + length > len(data):
        raise Malformed(f"not a CAR: a {what} in its header is cut short")
    return data[at : at + length], at + length


def _cbor_expect(data: bytes, at: int, major: int, what: str) -> tuple[int, int]:
    """(value, index behind) of one dag-cbor head of the kind `major` (RFC 8949 section 3, shortest form
    only)."""
    if at >= len(data) or data[at] >> 5 != major or data[at] & 31 > 27:
        raise Malformed(f"not a CAR: its header has no {what} where one belongs")
    small = data[at] & 31
    if small < 24:
        return small, at + 1
    size = 1 << small - 24
    value = int.from_bytes(data[at + 1 : at + 1 + size])
    if at + 1 + size > len(data) or value < (24 if size == 1 else 1 << 4 * size):
        raise Malformed(f"not a CAR: a {what} in its header is not in its shortest form")
    return value, at + 1 + size


def _cbor_head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    size = next(n for n in (1, 2, 4, 8) if value < 1 << 8 * n)
    return bytes([major << 5 | 23 + size.bit_length()]) + value.to_bytes(size)


def _cbor_link(cid: Cid) -> bytes:
    return _cbor_head(6, 42) + _cbor_head(2, len(cid) + 1) + b"\0" + cid
