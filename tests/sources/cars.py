"""CAR files made by hand."""

import hashlib
import random
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.local.car_file import CarSource

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"


need_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the conformance fixtures are not beside the project"
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
    """Where each block's section begins in `sections(blocks)`, by digest."""
    at, found = len(car.encode_header([])), {}
    for cid, block in blocks:
        found[cids.multihash(cid)[2:]] = at
        at += len(car.section_head(cid, len(block))) + len(block)
    return found


def index(records: dict[bytes, int], form: int = car.MULTIHASH_INDEX_SORTED) -> bytes:
    """By hand, as go-car writes it: all sha2-256."""
    data = b"".join(digest + offset.to_bytes(8, "little") for digest, offset in sorted(records.items()))
    bucket = (1).to_bytes(4, "little") + (40).to_bytes(4, "little") + len(data).to_bytes(8, "little") + data
    if form == car.INDEX_SORTED:
        return b"\x80\x08" + bucket
    return b"\x81\x08" + (1).to_bytes(4, "little") + (0x12).to_bytes(8, "little") + bucket


def v2(data: bytes, behind: bytes, padding: int = 0) -> bytes:
    offset = car.V2_BYTES + padding
    header = car.V2Header(offset, len(data), offset + len(data) + padding if behind else 0)
    return car.encode_v2(header) + bytes(padding) + data + bytes(padding if behind else 0) + behind


class Opened:
    """A file with `data`, opened as a source; indexes go beside it."""

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
