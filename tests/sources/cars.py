"""CAR files made by hand."""

import hashlib
import random
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.local.in_place import CarSource

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"


need_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the conformance fixtures are not in ../shared"
)


Pairs = list[tuple[Cid, bytes]]


def pairs(count: int, size: int = 1000, seed: int = 1) -> Pairs:
    chance = random.Random(seed)
    blocks = [chance.randbytes(size) for _ in range(count)]
    return [(cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(block).digest()), block) for block in blocks]


def sections(blocks: Pairs, roots: list[Cid] | None = None) -> bytes:
    return car.encode_header(roots or []) + b"".join(
        car.section_head(cid, len(block)) + block for cid, block in blocks
    )


def offsets(blocks: Pairs) -> dict[bytes, int]:
    """The offset of each block's section in `sections(blocks)`, by digest."""
    at, found = len(car.encode_header([])), {}
    for cid, block in blocks:
        found[cids.multihash(cid)[2:]] = at
        at += len(car.section_head(cid, len(block))) + len(block)
    return found


def index(records: dict[bytes, int], form: int = car.MULTIHASH_INDEX_SORTED) -> bytes:
    """An index as go-car writes it. All digests are sha2-256."""
    data = b"".join(digest + offset.to_bytes(8, "little") for digest, offset in sorted(records.items()))
    bucket = (1).to_bytes(4, "little") + (40).to_bytes(4, "little") + len(data).to_bytes(8, "little") + data
    if form == car.INDEX_SORTED:
        return b"\x80\x08" + bucket
    return b"\x81\x08" + (1).to_bytes(4, "little") + (0x12).to_bytes(8, "little") + bucket


def v2(data: bytes, index_bytes: bytes, padding: int = 0) -> bytes:
    """A CAR of version 2: `data`, and `index_bytes` behind it."""
    offset = car.V2_BYTES + padding
    header = car.V2Header(offset, len(data), offset + len(data) + padding if index_bytes else 0)
    return car.encode_v2(header) + bytes(padding) + data + bytes(padding if index_bytes else 0) + index_bytes


class SampleCar:
    """A CAR file with `data`, next to a folder for indexes."""

    def __init__(self, folder: Path, data: bytes) -> None:
        self.path = folder / "some.car"
        self.path.write_bytes(data)
        self.indexes = folder / "indexes"

    def open(self) -> CarSource:
        return CarSource.open(self.path, self.indexes)

    def get(self, *wanted: Cid) -> list[bytes]:
        async def main() -> list[bytes]:
            source = self.open()
            try:
                return [await source.get(cid) for cid in wanted]
            finally:
                await source.aclose()

        return trio.run(main)
