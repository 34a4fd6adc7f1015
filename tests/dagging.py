"""Blocks made by hand, for tests that need a DAG that no importer makes, or that must know each block."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ipfsfuse.dag import car, dagpb, unixfs
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Link
from ipfsfuse.dag.unixfs import Type, UnixFS


class Dag:
    """Collects blocks by multihash."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}

    def block(self, data: bytes, codec: int = cids.RAW) -> Cid:
        cid = cids.make(codec, b"\x12\x20" + hashlib.sha256(data).digest())
        self.blocks[cids.multihash(cid)] = data
        return cid

    def node(self, links: Sequence[Link], message: UnixFS) -> Cid:
        return self.block(dagpb.encode(links, unixfs.encode(message)), cids.DAG_PB)

    def directory(self, entries: dict[bytes, tuple[Cid, int]]) -> Cid:
        """`entries`: name to (CID, claimed size)."""
        return self.node(
            [Link(cid, name, size) for name, (cid, size) in entries.items()], UnixFS(type=Type.DIRECTORY)
        )

    def file(self, leaves: Sequence[bytes]) -> Cid:
        sizes = [len(leaf) for leaf in leaves]
        links = [Link(self.block(leaf), b"", len(leaf)) for leaf in leaves]
        return self.node(links, UnixFS(type=Type.FILE, filesize=sum(sizes), blocksizes=sizes))

    def car(self, path: Path, roots: Sequence[Cid] = ()) -> Path:
        """Writes all blocks to a CARv1 file."""
        sections = [
            car.section_head(cids.make(cids.RAW, key), len(block)) + block
            for key, block in self.blocks.items()
        ]
        path.write_bytes(b"".join([car.encode_header(list(roots)), *sections]))
        return path

    def symlink(self, target: bytes) -> Cid:
        return self.node([], UnixFS(type=Type.SYMLINK, data=target))
