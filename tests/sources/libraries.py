"""Blocks and adds for the tests of the library."""

import hashlib
import random

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Link
from ipfsfuse.sources.local.library import Library, NewRoot

Pairs = list[tuple[Cid, bytes]]


def multihash(block: bytes) -> bytes:
    return b"\x12\x20" + hashlib.sha256(block).digest()


def raw(seed: int, size: int = 1000) -> tuple[Cid, bytes]:
    block = random.Random(seed).randbytes(size)
    return cids.make(cids.RAW, multihash(block)), block


def parent(children: Pairs) -> tuple[Cid, bytes]:
    block = dagpb.encode(
        [Link(cid, str(index).encode(), len(block)) for index, (cid, block) in enumerate(children)],
        b"\x08\x01",
    )
    return cids.make(cids.DAG_PB, multihash(block)), block


def dag(seeds: range | list[int], size: int = 1000) -> Pairs:
    """Leaves, and their root as the last."""
    leaves = [raw(seed, size) for seed in seeds]
    return [*leaves, parent(leaves)]


def add(library: Library, blocks: Pairs, name: str = "thing") -> int:
    """Adds `blocks`, with the last one as a root. Returns how many were new."""
    with library.open_writer() as writer:
        new = sum(writer.put(cid, block) for cid, block in blocks)
        writer.commit([NewRoot(blocks[-1][0], name, sum(len(block) for _cid, block in blocks))])
    return new


def packs(library: Library) -> dict[str, int]:
    return {
        path.name: path.stat().st_size for path in library.folder.iterdir() if path.suffix in (".car", ".tmp")
    }
