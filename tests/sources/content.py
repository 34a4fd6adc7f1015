"""Small files and directories to fetch, built with the product's own builder."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ipfsfuse.dag import builder, car, dagpb
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf, Link
from ipfsfuse.sources.base import LeafRange
from tests.dag.blocks import Blocks


@dataclass(frozen=True)
class SampleFile:
    root: Cid
    data: bytes
    leaves: Sequence[Leaf]
    blocks: dict[Cid, bytes]
    """The root and the leaves."""

    @property
    def run(self) -> LeafRange:
        return LeafRange(self.root, len(self.data), self.leaves)

    @property
    def expected(self) -> dict[int, bytes]:
        return {index: self.blocks[leaf.cid] for index, leaf in enumerate(self.leaves)}

    def car(self) -> bytes:
        return encode_car(self.root, list(self.blocks.items()))


def sample(
    seed: int, count: int = 8, size: int = 70_000, *, raw: bool = True, repeat: bool = False
) -> SampleFile:
    """A file of `count` leaves of `size` bytes. The last one is shorter. With `repeat`, all others are the
    same."""
    profile = replace(builder.UNIXFS_V1_2025, chunk_size=size, raw_leaves=raw)
    chance = random.Random(seed)
    same = chance.randbytes(size)
    chunks = [same if repeat else chance.randbytes(size) for _ in range(count - 1)] + [
        chance.randbytes(size // 3 + 1)
    ]
    blocks: dict[Cid, bytes] = {}
    leaves: list[Leaf] = []
    file_builder = builder.FileBuilder(profile, blocks.__setitem__)
    offset = 0
    for chunk in chunks:
        made = builder.leaf(profile, chunk)
        blocks[made.built.cid] = made.block
        file_builder.add(made.built)
        leaves.append(Leaf(made.built.cid, offset, len(chunk)))
        offset += len(chunk)
    root = file_builder.finish().cid
    return SampleFile(root, b"".join(chunks), leaves, {root: blocks[root]} | blocks)


def raw_blocks(seed: int, count: int, size: int = 500) -> dict[Cid, bytes]:
    """Raw blocks that belong to no file."""
    chance = random.Random(seed)
    made = [builder.leaf(builder.UNIXFS_V1_2025, chance.randbytes(size)) for _ in range(count)]
    return {block.built.cid: block.block for block in made}


def encode_car(root: Cid, blocks: Sequence[tuple[Cid, bytes]]) -> bytes:
    return car.encode_header([root]) + b"".join(
        car.section_head(cid, len(block)) + block for cid, block in blocks
    )


@dataclass(frozen=True)
class SampleTree:
    """A directory. Its blocks are in the order of a CAR: depth first, each once."""

    root: Cid
    blocks: dict[Cid, bytes]
    """The directory and everything below it."""
    entity: dict[Cid, bytes]
    """The nodes of the directory itself."""

    def car(self, *, whole: bool = True) -> bytes:
        return encode_car(self.root, list((self.blocks if whole else self.entity).items()))


def tree(heap: Blocks, root: Cid) -> SampleTree:
    """The tree below `root` in `heap`. If `root` is a HAMT, it must be 256 wide."""
    blocks: dict[Cid, bytes] = {}
    entity: dict[Cid, bytes] = {}

    def walk(cid: Cid, own: bool) -> None:
        if cid not in blocks:
            blocks[cid] = heap.block(cid)
            if own:
                entity[cid] = blocks[cid]
            if cids.codec(cid) == cids.DAG_PB:
                for link in dagpb.decode(blocks[cid]).links:
                    walk(link.cid, own and len(link.name) == len("FF"))

    walk(root, True)
    return SampleTree(root, blocks, entity)


def trees() -> dict[str, SampleTree]:
    """A directory of each kind. No entry has a name of two characters: `tree` would take it for a node of a
    HAMT."""
    heap = Blocks()
    leaves = [Link(heap.leaf(b"file %d" % number), b"file %d" % number, 7) for number in range(20)]
    large = heap.balanced([b"%d" % number * 70_000 for number in range(4)], 8, True)
    basic = heap.directory([Link(large, b"large", 280_000), *leaves])
    nested = heap.directory(
        [
            Link(basic, b"basic", 280_200),
            Link(heap.directory(leaves[:3]), b"nested", 21),
            Link(leaves[4].cid, b"top", 7),
        ]
    )
    hamt = heap.trie([b"name %d" % number for number in range(2000)])
    return {"basic": tree(heap, basic), "nested": tree(heap, nested), "hamt": tree(heap, hamt)}
