"""Files to fetch: small ones, built by the importer's own parts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ipfsfuse.dag import build, car
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.sources.base import Run


@dataclass(frozen=True)
class SampleFile:
    root: Cid
    data: bytes
    leaves: Sequence[Leaf]
    blocks: dict[Cid, bytes]
    """The root and the leaves."""

    @property
    def run(self) -> Run:
        return Run(self.root, len(self.data), self.leaves)

    @property
    def expected(self) -> dict[int, bytes]:
        return {index: self.blocks[leaf.cid] for index, leaf in enumerate(self.leaves)}

    def car(self) -> bytes:
        return encode_car(self.root, list(self.blocks.items()))


def sample(seed: int, count: int = 8, size: int = 70_000, *, raw: bool = True, repeat: bool = False) -> SampleFile:
    """A file of `count` leaves of `size` bytes, the last one shorter; with `repeat` all but the last are the same."""
    profile = replace(build.UNIXFS_V1_2025, chunk_size=size, raw_leaves=raw)
    chance = random.Random(seed)
    same = chance.randbytes(size)
    chunks = [same if repeat else chance.randbytes(size) for _ in range(count - 1)] + [chance.randbytes(size // 3 + 1)]
    blocks: dict[Cid, bytes] = {}
    leaves: list[Leaf] = []
    builder = build.FileBuilder(profile, blocks.__setitem__)
    offset = 0
    for chunk in chunks:
        made = build.leaf(profile, chunk)
        blocks[made.built.cid] = made.block
        builder.add(made.built)
        leaves.append(Leaf(made.built.cid, offset, len(chunk)))
        offset += len(chunk)
    root = builder.finish().cid
    return SampleFile(root, b"".join(chunks), leaves, {root: blocks[root]} | blocks)


def raw_blocks(seed: int, count: int, size: int = 500) -> dict[Cid, bytes]:
    """Raw blocks that belong to no file."""
    chance = random.Random(seed)
    made = [build.leaf(build.UNIXFS_V1_2025, chance.randbytes(size)) for _ in range(count)]
    return {block.built.cid: block.block for block in made}


def encode_car(root: Cid, blocks: Sequence[tuple[Cid, bytes]]) -> bytes:
    return car.encode_header([root]) + b"".join(car.section_head(cid, len(block)) + block for cid, block in blocks)
