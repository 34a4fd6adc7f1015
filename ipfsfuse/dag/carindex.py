"""CAR indexes: sorted records of a digest and the place of its section in the CAR data.

Formats (https://ipld.io/specs/transport/car/carv2/): 0x0400 IndexSorted, buckets by digest length; 0x0401
MultihashIndexSorted, the same for each hash function. All numbers but the format's varint are little-endian.

Pure: what needs bytes yields `Want`s, (offset in the index, length), and is sent that many bytes. Fewer mean
that the index ends there. An index is a claim: what it says of a place has to be checked at that place.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeVar

from ipfsfuse.dag import hashes, varint
from ipfsfuse.errors import Malformed

SORTED = 0x0400
MULTIHASH_SORTED = 0x0401

Want = tuple[int, int]
T = TypeVar("T")
Steps = Generator[Want, bytes, T]

_MAX_BUCKETS = 4096
"""Far more than there are allowed hash functions and lengths."""
_MAX_PLACES = 16
"""Of so many copies of one block the first are enough."""
_WINDOW = 4096
_COUNT = struct.Struct("<i")
_CODE = struct.Struct("<Q")
_BUCKET = struct.Struct("<IQ")


class Bucket(NamedTuple):
    """Records of one digest length, sorted: `records` times `width` bytes (a digest, then 8 for the offset)
    at `start` of the index."""

    code: int | None
    """The hash function; None in IndexSorted, which does not say."""
    width: int
    start: int
    records: int


def run(steps: Steps[T], read: Callable[[int, int], bytes]) -> T:
    """Answers the wants of `steps` by `read(offset, length)` until its result is there."""
    try:
        want = next(steps)
        while True:
            want = steps.send(read(*want))
    except StopIteration as stop:
        result: T = stop.value
        return result


# -- reading -------------------------------------------------------------------------------------------------


def buckets() -> Steps[tuple[Bucket, ...]]:
    """Where the index keeps its records. Raises Malformed, also for formats other than the two."""
    head = yield 0, 13
    form, at = varint.get(head, 0)
    if form not in (SORTED, MULTIHASH_SORTED):
        raise Malformed(f"the CAR's index has the unknown format 0x{form:x}")
    found: list[Bucket] = []
    if form == SORTED:
        yield from _widths(at, None, found)
        return tuple(found)
    (codes,) = yield from _numbers(at, _COUNT)
    at += _COUNT.size
    _check_count(codes)
    for _ in range(codes):
        (code,) = yield from _numbers(at, _CODE)
        at = yield from _widths(at + _CODE.size, code, found)
        _check_count(len(found))
    return tuple(found)


def _widths(at: int, code: int | None, found: list[Bucket]) -> Steps[int]:
    """Appends the buckets of one hash function to `found`; the offset behind them."""
    (count,) = yield from _numbers(at, _COUNT)
    at += _COUNT.size
    _check_count(count)
    for _ in range(count):
        width, length = yield from _numbers(at, _BUCKET)
        at += _BUCKET.size
        if not 8 <= width <= 8 + 2 * hashes.MAX_DIGEST or length % width or length >= 1 << 62:
            raise Malformed(f"the CAR's index has a bucket of {length} bytes for records of {width}")
        found.append(Bucket(code, width, at, length // width))
        at += length
    return at


def _numbers(at: int, form: struct.Struct) -> Steps[tuple[int, ...]]:
    data = yield at, form.size
    if len(data) < form.size:
        raise Malformed("the CAR's index is cut short")
    return form.unpack_from(data)


def _check_count(count: int) -> None:
    if not 0 <= count <= _MAX_BUCKETS:
        raise Malformed(f"the CAR's index would have {count} buckets")


def find(index: Sequence[Bucket], multihash: bytes) -> Steps[list[int]]:
    """The offsets of the sections that the index claims for `multihash`, none where it has none. Raises
    Malformed."""
    code, digest = hashes.split(multihash)
    found: list[int] = []
    for bucket in index:
        if bucket.width == len(digest) + 8 and bucket.code in (code, None):
            yield from _search(bucket, digest, found)
    return found


def _search(bucket: Bucket, digest: bytes, found: list[int]) -> Steps[None]:
    """Appends what one bucket has. Digests are spread evenly, so that a guess by value takes 2 reads where
    halving takes 10."""
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
        window = yield bucket.start + first * width, count * width
        if len(window) < count * width:
            raise Malformed("the CAR's index is cut short")
        if digest < window[: width - 8]:
            high, above = first, _key(window)
        elif digest > window[-width:-8]:
            low, below = first + count, _key(window[-width:])
        else:
            found += _in_window(window, width, digest)
            return


def _in_window(window: bytes, width: int, digest: bytes) -> list[int]:
    places = range(0, len(window), width)
    first = bisect_left(places, digest, key=lambda at: window[at : at + width - 8])
    matching = takewhile(
        lambda at: window[at : at + width - 8] == digest, places[first : first + _MAX_PLACES]
    )
    return [int.from_bytes(window[at + width - 8 : at + width], "little") for at in matching]


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8])


# -- writing -------------------------------------------------------------------------------------------------


def encode_record(digest: bytes, offset: int) -> bytes:
    """Records of one digest length sort as bytes."""
    return digest + offset.to_bytes(8, "little")


def head(codes: int) -> bytes:
    """What a MultihashIndexSorted of `codes` hash functions begins with."""
    return varint.put(MULTIHASH_SORTED) + _COUNT.pack(codes)


def code_head(code: int, widths: int) -> bytes:
    """What stands before the `widths` buckets of one hash function; functions ascend by code, buckets by
    width."""
    return _CODE.pack(code) + _COUNT.pack(widths)


def bucket_head(width: int, count: int) -> bytes:
    """What stands before the `count` records of `width` bytes of one bucket."""
    return _BUCKET.pack(width, count * width)
