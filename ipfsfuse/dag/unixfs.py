"""The UnixFS message that dag-pb nodes carry in their data (https://specs.ipfs.tech/unixfs/).

`decode` follows the rules of protobuf, as Kubo does: fields may be in any order, the last of two equal fields
counts, unknown fields are skipped, and `blocksizes` may be packed. `encode` writes fields in ascending order,
as importers do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ipfsfuse.dag import protobuf, varint
from ipfsfuse.dag.dagpb import MAX_LINKS
from ipfsfuse.dag.protobuf import BYTES, FIXED32, VARINT
from ipfsfuse.errors import Malformed
from ipfsfuse.structures import Buffer


class Type(IntEnum):
    RAW = 0
    DIRECTORY = 1
    FILE = 2
    METADATA = 3
    SYMLINK = 4
    HAMT_SHARD = 5


MIN_MTIME = -62_135_596_800
"""0001-01-01T00:00:00Z, the first second that the schema allows."""
MAX_SECONDS = 253_402_300_799
"""9999-12-31T23:59:59Z, the last one."""
_TYPES = {int(kind): kind for kind in Type}
MAX_FIELDS = 1000
"""The most fields of a message. Neighbouring block sizes count as one. A block with more is an attack."""
MAX_STAMP = 64
"""Bytes of an IPFSTimestamp: its two fields need 16."""
_NUMBERS = (3, 5, 6, 7)
_BLOCKSIZE = 0x20
"""The tag of one unpacked block size."""
_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class UnixFS:
    """One message; None stands for an absent field. `mtime` is in nanoseconds since 1970, `mode` as it is
    stored."""

    type: Type
    data: Buffer | None = None
    filesize: int | None = None
    blocksizes: Sequence[int] = ()
    hash_type: int | None = None
    fanout: int | None = None
    mode: int | None = None
    mtime: int | None = None


def decode(message: Buffer) -> UnixFS:
    """Decodes `message`. `data` is a slice of it, so the data of a memoryview is not copied.

    Raises Malformed."""
    kind: Type | None = None
    data: Buffer | None = None
    mtime: int | None = None
    numbers: dict[int, int] = {}
    sizes: list[int] = []
    at, end = 0, len(message)
    fields = 0
    while at < end:
        field, wire, at = protobuf.tag(message, at, end)
        fields += 1
        if fields > MAX_FIELDS:
            raise Malformed(f"UnixFS: a message of over {MAX_FIELDS} fields")
        if field == 4 and wire in (VARINT, BYTES):
            at = _blocksizes(message, at, wire, sizes)
        elif wire == VARINT:
            value, at = protobuf.varint(message, at, end)
            if field == 1:
                kind = _TYPES.get(value, kind)
            elif field in _NUMBERS:
                numbers[field] = value
        elif wire == BYTES and field in (2, 8):
            start, at = protobuf.span(message, at, end)
            if field == 2:
                data = message[start:at]
            else:
                mtime = _timestamp(message, start, at)
        else:
            at = protobuf.skip(message, at, end, wire)
    if kind is None:
        raise Malformed("UnixFS: no type, or one that is not known")
    mode = numbers[7] & 0xFFFFFFFF if 7 in numbers else None
    return UnixFS(kind, data, numbers.get(3), sizes, numbers.get(5), numbers.get(6), mode, mtime)


def _blocksizes(message: Buffer, at: int, wire: int, sizes: list[int]) -> int:
    """Reads a packed list, or a run of unpacked values: a file node has thousands of them."""
    end = len(message)
    packed = wire == BYTES
    if packed:
        at, end = protobuf.span(message, at, end)
    while at < end:
        value, at = protobuf.varint(message, at, end)
        sizes.append(value)
        if len(sizes) > MAX_LINKS:
            raise Malformed(f"UnixFS: over {MAX_LINKS} block sizes")
        if not packed:
            if at >= end or message[at] != _BLOCKSIZE:
                return at
            at += 1
    if packed:
        return at
    raise Malformed("UnixFS: a block size is cut short")


def _timestamp(message: Buffer, at: int, end: int) -> int:
    """An IPFSTimestamp in nanoseconds since 1970. Its fields are a required int64 seconds = 1 and an optional
    fixed32 nanos = 2."""
    seconds: int | None = None
    # the specification allows 1 to 999,999,999; ipfs-unixfs (JavaScript) writes 0 for a whole second
    nanos = 0
    if end - at > MAX_STAMP:
        raise Malformed(f"UnixFS: an mtime of {end - at} bytes")
    while at < end:
        field, wire, at = protobuf.tag(message, at, end)
        start = at
        at = protobuf.skip(message, at, end, wire)
        if field == 1 and wire == VARINT:
            value = protobuf.varint(message, start, end)[0]
            seconds = value - (1 << 64) if value >> 63 else value
        elif field == 2 and wire == FIXED32:
            nanos = int.from_bytes(message[start:at], "little")
    if seconds is None or not MIN_MTIME <= seconds <= MAX_SECONDS:
        raise Malformed(f"UnixFS: mtime of {seconds} seconds")
    if not 0 <= nanos < _SECOND:
        raise Malformed(f"UnixFS: mtime with {nanos} nanoseconds")
    return seconds * _SECOND + nanos


def encode(message: UnixFS) -> bytes:
    """The canonical bytes of `message`."""
    parts: list[Buffer] = [b"\x08", varint.put(message.type)]
    if message.data is not None:
        parts += (b"\x12", varint.put(len(message.data)), message.data)
    if message.filesize is not None:
        parts += (b"\x18", varint.put(message.filesize))
    for size in message.blocksizes:
        parts += (b"\x20", varint.put(size))
    for tag, value in ((b"\x28", message.hash_type), (b"\x30", message.fanout), (b"\x38", message.mode)):
        if value is not None:
            parts += (tag, varint.put(value))
    if message.mtime is not None:
        stamp = _stamp(message.mtime)
        parts += (b"\x42", varint.put(len(stamp)), stamp)
    return b"".join(parts)


def _stamp(mtime: int) -> bytes:
    seconds, nanos = divmod(mtime, _SECOND)
    out = b"\x08" + varint.put(seconds & (1 << 64) - 1)
    return out + b"\x15" + nanos.to_bytes(4, "little") if nanos else out
