"""Blocks for the tests of reading, made by hand, and a driver for walks."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, hamt, nodes, unixfs, varint
from ipfsfuse.dag.cid import DAG_PB, RAW, Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.traversal import Walk
from ipfsfuse.dag.unixfs import Type, UnixFS

T = TypeVar("T")
FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"


def fixtures(pattern: str) -> list[Path]:
    """The conformance files that match. Skips the test if there are none."""
    found = sorted(FIXTURES.glob(pattern))
    if not found:
        pytest.skip(f"no conformance fixtures at {FIXTURES}")
    return found


def cid_of(block: bytes, codec: int = DAG_PB) -> Cid:
    return cids.make(codec, b"\x12\x20" + hashlib.sha256(block).digest())


def identity(block: bytes, codec: int = RAW) -> Cid:
    return cids.make(codec, b"\x00" + varint.put(len(block)) + block)


class Blocks:
    """A heap of blocks that records which blocks are asked for."""

    def __init__(self) -> None:
        self.by_hash: dict[bytes, bytes] = {}
        self.asked: list[list[Cid]] = []

    def put(self, block: bytes, codec: int = DAG_PB) -> Cid:
        cid = cid_of(block, codec)
        self.by_hash[cids.multihash(cid)] = block
        return cid

    def block(self, cid: Cid) -> bytes:
        return self.by_hash[cids.multihash(cid)]

    @property
    def fetched(self) -> list[Cid]:
        return [cid for batch in self.asked for cid in batch]

    def drive(self, walk: Walk[T]) -> T:
        """Runs a walk to its end. It must not ask for an identity CID, or twice for a CID in a batch."""
        try:
            wanted: Sequence[Cid] = next(walk)
            while True:
                assert len(set(wanted)) == len(wanted), "the walk asks for a block twice"
                assert all(cids.inline_block(cid) is None for cid in wanted)
                if wanted:
                    self.asked.append(list(wanted))
                wanted = walk.send([nodes.parse(cid, self.block(cid)) for cid in wanted])
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # typeshed has Any here

    def load_car(self, path: Path) -> list[Cid]:
        """Reads a CARv1 that is known to be good. Returns the CIDs of its blocks, in order."""
        data = path.read_bytes()
        size, at = varint.get(data, 0)
        at += size
        order: list[Cid] = []
        while at < len(data):
            size, at = varint.get(data, at)
            cid, start = cids.decode_prefix(data, at)
            at += size
            cids.verify(cid, data[start:at])
            self.by_hash[cids.multihash(cid)] = data[start:at]
            order.append(cid)
        return order

    # -- builders --------------------------------------------------------------------------------------------

    def leaf(self, data: bytes, raw: bool = True) -> Cid:
        return (
            self.put(data, RAW)
            if raw
            else self.put(dagpb.encode([], unixfs.encode(UnixFS(Type.FILE, data, len(data)))))
        )

    def file_node(
        self, children: Sequence[tuple[Cid, int]], inline: bytes = b"", total: int | None = None
    ) -> Cid:
        """An interior node over (CID, content size) pairs. It states `total` bytes."""
        sizes = [size for _, size in children]
        message = UnixFS(
            Type.FILE, inline or None, sum(sizes) + len(inline) if total is None else total, sizes
        )
        return self.put(
            dagpb.encode([Link(cid, b"", size) for cid, size in children], unixfs.encode(message))
        )

    def balanced(self, chunks: Sequence[bytes], width: int, raw: bool) -> Cid:
        """A file as importers make it: all leaves have the same height."""
        level = [(self.leaf(chunk, raw), len(chunk)) for chunk in chunks]
        while len(level) > 1:
            groups = [level[at : at + width] for at in range(0, len(level), width)]
            level = [(self.file_node(group), sum(size for _, size in group)) for group in groups]
        return level[0][0]

    def directory(self, links: Sequence[Link]) -> Cid:
        return self.put(dagpb.encode(links, unixfs.encode(UnixFS(Type.DIRECTORY))))

    def trie(self, names: Sequence[bytes], width: int = 256) -> Cid:
        """A valid HAMT of empty files, built from the top."""
        target = self.leaf(b"")
        return self._trie_node([(hamt.hash64(name), Link(target, name, 1)) for name in names], width, 0)

    def _trie_node(self, found: list[tuple[int, Link]], width: int, bits: int) -> Cid:
        level = width.bit_length() - 1
        slots: dict[int, list[tuple[int, Link]]] = {}
        for key, link in found:
            slots.setdefault(key >> (64 - bits - level) & width - 1, []).append((key, link))
        links = [self._trie_link(index, slots[index], width, bits + level) for index in sorted(slots)]
        return self.put(shard(width, sorted(slots), links))

    def _trie_link(self, index: int, found: list[tuple[int, Link]], width: int, bits: int) -> Link:
        prefix = b"%0*X" % (len(f"{width - 1:X}"), index)
        if len(found) == 1:
            return found[0][1]._replace(name=prefix + found[0][1].name)
        return Link(self._trie_node(found, width, bits), prefix, 1)


def shard(width: int, indexes: Sequence[int], links: Sequence[Link], hash_type: int = 0x22) -> bytes:
    """The block of one HAMT node."""
    bits = sum(1 << index for index in indexes)
    field = bits.to_bytes((bits.bit_length() + 7) // 8, "big")
    return dagpb.encode(
        links, unixfs.encode(UnixFS(Type.HAMT_SHARD, field, hash_type=hash_type, fanout=width))
    )


def chunks_of(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def pseudo_random(size: int) -> bytes:
    """The same bytes every time. No two pieces of them are equal."""
    return b"".join(hashlib.sha256(b"%d" % at).digest() for at in range(size // 32 + 1))[:size]


def field(number: int, value: bytes | int) -> bytes:
    """One protobuf field, by hand."""
    if isinstance(value, int):
        return varint.put(number << 3) + varint.put(value)
    return varint.put(number << 3 | 2) + varint.put(len(value)) + value


def every_prefix(block: bytes) -> Iterator[bytes]:
    return (block[:size] for size in range(len(block)))
