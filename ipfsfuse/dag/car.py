"""Decodes and encodes CAR files: headers, sections, the version 2 frame, indexes and streams. Decoding is
strict.

Pure: `sources` reads the files and streams. Sources: https://ipld.io/specs/transport/car/carv1/ and carv2/.
The largest section is that of go-car. All errors are Malformed and name the place.

All numbers of an index are little-endian, except the varint of its format. An index only claims offsets: the
caller must check the section there.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash, varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid
from ipfsfuse.structures import Buffer

MAX_HEADER = 8 << 20
"""Bytes of the largest header of a file: 200,000 roots. To parse it takes a second, in a worker thread."""
MAX_STREAM_HEADER = 64 << 10
"""Bytes of the largest header of a stream, which is parsed on the event loop. The response to a request has
one root."""
MAX_SECTION = 8 << 20

HEAD_BYTES = 9 + cids.MAX_CID_BYTES
"""The most bytes of a section's length and CID."""

PRAGMA = b"\x0a\xa1gversion\x02"
"""The start of every version 2 file: a header as in version 1, with the version 2 and without roots."""

V2_BYTES = len(PRAGMA) + 40
"""Bytes of the frame of a version 2 file: pragma and fixed header."""

_V2 = struct.Struct("<16sQQQ")


class Section(NamedTuple):
    """One section: its CID, and the offsets of its start, its block and its end (with the `base` of
    `section`)."""

    cid: Cid
    start: int
    block: int
    end: int


@dataclass(frozen=True, slots=True)
class V2Header:
    """The offsets of the parts of a version 2 file, in bytes. `index_offset` is 0 if there is no index."""

    data_offset: int
    data_size: int
    index_offset: int
    characteristics: bytes = bytes(16)


# -- the header ----------------------------------------------------------------------------------------------


def header_length(data: bytes, most: int = MAX_HEADER) -> int:
    """The size of the header at the start of `data`, with its length field. The first 9 bytes suffice.

    Raises Malformed, also for a header of over `most` bytes."""
    try:
        length, at = varint.get(data, 0)
    except Malformed as exc:
        raise Malformed(f"not a CAR: its header's length: {exc}") from exc
    if not 0 < length <= most:
        raise Malformed(f"not a CAR: its header would have {length} bytes: 1 to {most} are allowed")
    return at + length


def decode_header(data: bytes) -> tuple[Cid, ...]:
    """The roots of a version 1 header. `data` is the header with its length field, and nothing more.

    Raises Malformed."""
    version, roots = _header_map(data, header_length(data))
    if version != 1:
        raise Malformed(f"a CAR of version {version} where version 1 belongs")
    if roots is None:
        raise Malformed("a CAR header without roots")
    return roots


def is_v2(data: bytes) -> bool:
    """Whether a file that begins with `data` is of version 2. Raises Malformed for an unknown version."""
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
    characteristics, offset, size, index = _V2.unpack_from(data, len(PRAGMA))
    if offset < V2_BYTES or offset >= 1 << 63:
        raise Malformed(f"the CAR's header puts its data at {offset}, where it can't be")
    if not 0 < size < 1 << 63:
        raise Malformed(f"the CAR's header gives its data {size} bytes")
    if index and not offset + size <= index < 1 << 63:
        raise Malformed(f"the CAR's header puts its index at {index}, inside its data")
    return V2Header(offset, size, index, characteristics)


def encode_v2(header: V2Header) -> bytes:
    """Pragma and header: V2_BYTES."""
    return PRAGMA + _V2.pack(
        header.characteristics, header.data_offset, header.data_size, header.index_offset
    )


# -- sections ------------------------------------------------------------------------------------------------


def section_length(data: Buffer, at: int = 0, base: int = 0) -> int:
    """The size of the section that begins at `at`. Its first 9 bytes suffice. `base` as for `section`.

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


def section(data: Buffer, at: int, base: int = 0) -> Section:
    """The section that begins at index `at` of `data`. Its first HEAD_BYTES suffice.

    `base` is added to the returned offsets. Raises Malformed.
    """
    end = at + section_length(data, at, base)
    head = varint.get(data, at)[1]
    try:
        cid, length = cids.decode_prefix(bytes(data[head : min(end, head + cids.MAX_CID_BYTES)]))
    except NotACid as exc:
        raise Malformed(f"the CAR section at {base + at}: {exc}") from exc
    return Section(cid, base + at, base + head + length, base + end)


def section_head(cid: Cid, size: int) -> bytes:
    """The bytes of a section before its block of `size` bytes."""
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
    for _ in range(count):  # each takes at least a byte, so a wrong count ends with the data
        tag, at = _cbor_expect(data, at, 6, "CID")
        link, at = _cbor_bytes(data, at, 2, "CID")
        if tag != 42 or link[:1] != b"\0":
            raise Malformed("a root in the CAR's header is not a CID")
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
    """(value, index after it) of one dag-cbor head of major type `major` in its shortest form (RFC 8949,
    section 3)."""
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


# -- the index, read -----------------------------------------------------------------------------------------

INDEX_SORTED = 0x0400
"""Has a bucket for each digest length."""
MULTIHASH_INDEX_SORTED = 0x0401
"""Has a bucket for each hash function and digest length."""

ReadIndex = Callable[[int, int], bytes]
"""(offset in the index, length) -> that many bytes, or fewer at the end of the index."""

_MAX_BUCKETS = 4096
"""Far more than the allowed hash functions and digest lengths."""
_MAX_COPIES = 16
"""The most copies of one block that are returned."""
_WINDOW = 4096
_COUNT = struct.Struct("<i")
_CODE = struct.Struct("<Q")
_BUCKET = struct.Struct("<IQ")


class IndexBucket(NamedTuple):
    """`records` sorted records of one digest length, at `start` of the index. Each has `width` bytes: the
    digest, then 8 bytes of offset."""

    code: int | None
    """The hash function; None in INDEX_SORTED, which does not name it."""
    width: int
    start: int
    records: int


def index_buckets(read: ReadIndex) -> tuple[IndexBucket, ...]:
    """The buckets of an index. Raises Malformed, also for formats other than the two."""
    form, at = varint.get(read(0, 13), 0)
    if form not in (INDEX_SORTED, MULTIHASH_INDEX_SORTED):
        raise Malformed(f"the CAR's index has the unknown format 0x{form:x}")
    by_code = form == MULTIHASH_INDEX_SORTED
    codes, at = _count(read, at) if by_code else (1, at)
    found: list[IndexBucket] = []
    for _ in range(codes):
        code, at = _numbers(read, at, _CODE) if by_code else ((None,), at)
        count, at = _count(read, at)
        for _ in range(count):
            (width, length), at = _numbers(read, at, _BUCKET)
            if not 8 <= width <= 8 + 2 * multihash.MAX_DIGEST or length % width or length >= 1 << 62:
                raise Malformed(f"the CAR's index has a bucket of {length} bytes for records of {width}")
            found.append(IndexBucket(code[0], width, at, length // width))
            at += length
        _check_count(len(found))
    return tuple(found)


def _numbers(read: ReadIndex, at: int, form: struct.Struct) -> tuple[tuple[int, ...], int]:
    """The numbers at `at`, and the offset after them."""
    data = read(at, form.size)
    if len(data) < form.size:
        raise Malformed("the CAR's index is cut short")
    return form.unpack_from(data), at + form.size


def _count(read: ReadIndex, at: int) -> tuple[int, int]:
    (count,), at = _numbers(read, at, _COUNT)
    return _check_count(count), at


def _check_count(count: int) -> int:
    if not 0 <= count <= _MAX_BUCKETS:
        raise Malformed(f"the CAR's index would have {count} buckets")
    return count


def index_find(buckets: Sequence[IndexBucket], wanted: bytes, read: ReadIndex) -> list[int]:
    """The offsets of the sections that the index claims for the multihash `wanted`. Raises Malformed."""
    code, digest = multihash.split(wanted)
    found: list[int] = []
    for bucket in buckets:
        if bucket.width == len(digest) + 8 and bucket.code in (code, None):
            found += _search(bucket, digest, read)
    return found


def _search(bucket: IndexBucket, digest: bytes, read: ReadIndex) -> list[int]:
    """The offsets in one bucket. Digests are spread evenly, so interpolation takes 2 reads; bisection takes
    10."""
    width, span = bucket.width, _WINDOW // bucket.width
    low, high, below, above = 0, bucket.records, 0, 1 << 64
    key, guesses = _key(digest), 4
    while low < high:
        share = (
            (high - low) * (key - below) // (above - below)
            if guesses and below <= key < above
            else (high - low) // 2
        )
        guesses -= 1 if guesses else 0
        first = max(low, min(low + share - span // 2, high - span))
        count = min(span, high - first)
        window = read(bucket.start + first * width, count * width)
        if len(window) < count * width:
            raise Malformed("the CAR's index is cut short")
        if digest < window[: width - 8]:
            high, above = first, _key(window)
        elif digest > window[-width:-8]:
            low, below = first + count, _key(window[-width:])
        else:
            return _in_window(window, width, digest)
    return []


def _in_window(window: bytes, width: int, digest: bytes) -> list[int]:
    places = range(0, len(window), width)
    first = bisect_left(places, digest, key=lambda at: window[at : at + width - 8])
    matching = takewhile(
        lambda at: window[at : at + width - 8] == digest, places[first : first + _MAX_COPIES]
    )
    return [int.from_bytes(window[at + width - 8 : at + width], "little") for at in matching]


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8])


# -- the index, written --------------------------------------------------------------------------------------


def index_record(digest: bytes, offset: int) -> bytes:
    """A record of an index. Records of one digest length are sorted as bytes."""
    return digest + offset.to_bytes(8, "little")


def index_head(codes: int) -> bytes:
    """The start of a MultihashIndexSorted for `codes` hash functions."""
    return varint.put(MULTIHASH_INDEX_SORTED) + _COUNT.pack(codes)


def index_code_head(code: int, widths: int) -> bytes:
    """The bytes before the `widths` buckets of one hash function. Functions are sorted by code, buckets by
    width."""
    return _CODE.pack(code) + _COUNT.pack(widths)


def index_bucket_head(width: int, count: int) -> bytes:
    """The bytes before the `count` records (of `width` bytes each) of one bucket."""
    return _BUCKET.pack(width, count * width)


# -- a stream ------------------------------------------------------------------------------------------------

_MIN_HEADER = len(encode_header(()))


class StreamParser:
    """Parses a CAR stream of version 1 or 2 as it comes.

    `feed` returns the blocks that are complete. `finish` checks that the stream is complete. Memory holds at
    most one section and the last bytes fed. Not for several tasks at once.
    """

    def __init__(self) -> None:
        self.roots: tuple[Cid, ...] | None = None
        """None until the header has come."""
        self._buffer = bytearray()
        self._need = _MIN_HEADER
        """Bytes that the buffer needs for the next step."""
        self._padded = False
        """Whether the zeros after the last section have begun."""
        self._skip = 0
        self._left: int | None = None
        """Bytes of CAR data still to come; None for version 1. In version 2, bytes after the data are
        ignored."""

    def feed(self, data: bytes) -> Iterator[tuple[Cid, bytes]]:
        """The blocks that `data` completes, unverified. Consume them before the next call.

        Raises Malformed."""
        self._buffer += data
        while len(self._buffer) >= self._need:
            if self._skip:
                self._drop_padding()
            elif self.roots is None:
                self._header()
            elif self._left == 0:
                self._buffer.clear()
            elif self._padded or self._buffer[0] == 0:
                self._drop_zeros()
            else:
                found = self._section()
                if found is not None:
                    yield found

    def finish(self) -> None:
        """To be called at the end of the stream. Raises Malformed if the stream is incomplete."""
        if self.roots is None or (self._buffer and self._left != 0) or (self._left and not self._padded):
            raise Malformed("the CAR stream is cut short")

    def _drop_padding(self) -> None:
        dropped = min(self._skip, len(self._buffer))
        del self._buffer[:dropped]
        self._skip -= dropped
        self._need = 1 if self._skip else _MIN_HEADER

    def _drop_zeros(self) -> None:
        """A section of no bytes ends the CAR: the zeros after it are padding. Source: go-car's
        ZeroLengthSectionAsEOF."""
        count = len(self._buffer) if self._left is None else min(self._left, len(self._buffer))
        if self._buffer.count(0, 0, count) != count:
            raise Malformed("the CAR has something behind the zeros that end it")
        self._padded = True
        self._take(count)

    def _header(self) -> None:
        if self._left is None and is_v2(bytes(self._buffer[: len(PRAGMA)])):
            if not self._has(V2_BYTES):
                return
            frame = decode_v2(bytes(self._buffer[:V2_BYTES]))
            self._skip, self._left = frame.data_offset, frame.data_size
            return
        length = header_length(bytes(self._buffer[:9]), MAX_STREAM_HEADER)
        if self._has(length):
            self.roots = decode_header(self._take(length))

    def _section(self) -> tuple[Cid, bytes] | None:
        head = bytes(self._buffer[:HEAD_BYTES])
        if len(head) < HEAD_BYTES and not self._has(_announced(head)):
            # an incomplete head looks like a broken one: wait for the whole section, which is short too
            return None
        found = section(head, 0)
        if not self._has(found.end):
            return None
        return found.cid, self._take(found.end)[found.block :]

    def _has(self, need: int) -> bool:
        self._need = need
        return len(self._buffer) >= need

    def _take(self, length: int) -> bytes:
        if self._left is not None:
            self._left -= length
            if self._left < 0:
                raise Malformed("the CAR's data ends inside a section")
        taken = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        self._need = 1
        return taken


def _announced(head: bytes) -> int:
    """The size of the section that begins with `head`. If its length is incomplete: one byte more than
    `head` has."""
    if len(head) < 9 and all(byte & 0x80 for byte in head):
        return len(head) + 1
    return section_length(head)
