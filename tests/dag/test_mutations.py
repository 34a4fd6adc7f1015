"""Damaged blocks: each gives a value or an error of ours, and never another exception."""

import random

import pytest

from ipfsfuse.dag import dagpb, directory_pages, file_layout, nodes, traversal, unixfs
from ipfsfuse.dag.nodes import Directory, File, Leaf, Shard
from ipfsfuse.errors import IpfsFuseError
from tests.dag.blocks import every_prefix, fixtures
from tests.dag.samples import PARENT, VALID

MUTATIONS = 100_000


def read_all(block: bytes) -> None:
    """Reads `block` in every way: as a node, as a leaf, as dag-pb and as UnixFS."""
    try:
        node = nodes.parse(PARENT, block)
        file_layout.leaf_content(Leaf(PARENT, 0, len(block)), block)
        if isinstance(node, File):
            first(file_layout.leaves(node, 0, node.size))
        elif isinstance(node, Directory | Shard):
            first(directory_pages.entries(node, 0))
            first(traversal.child(node, b"one"))
    except IpfsFuseError as refused:
        assert "\n" not in str(refused)
    try:
        found = dagpb.decode(block)
        assert dagpb.decode(dagpb.encode(found.links, found.data)) == found
    except IpfsFuseError:
        pass
    try:
        message = unixfs.decode(block)
        assert unixfs.decode(unixfs.encode(message)) == message
    except IpfsFuseError:
        pass


def first(walk: traversal.Walk[object]) -> None:
    """Runs a walk until it asks for its first blocks."""
    try:
        next(walk)
    except StopIteration:
        pass


def damage(block: bytes, chance: random.Random) -> bytes:
    """Makes one to four small changes: flipped, lost, doubled and odd bytes, and pieces of other blocks."""
    out = bytearray(block)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at, size = chance.randrange(len(out) + 1), chance.choice((1, 1, 2, 5, 40))
        match chance.randrange(6):
            case 0:
                out[at : at + 1] = bytes([out[at] ^ 1 << chance.randrange(8)]) if at < len(out) else b""
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size]
            case 3:
                out[at : at + size] = chance.choice(
                    (
                        b"\xff" * 9 + b"\x01",
                        b"\x80" * 11,
                        b"\x00",
                        b"\x12\x00",
                        b"\x0a\x00",
                        b"\xff\xff\xff\xff\x0f",
                        chance.randbytes(size),
                    )
                )
            case 4:
                other = chance.choice(list(VALID.values()))
                start = chance.randrange(len(other))
                out[at : at + size] = other[start : start + size]
            case _:
                del out[at:]
    return bytes(out)


@pytest.mark.parametrize("kind", VALID)
def test_every_prefix_is_read_or_refused(kind: str) -> None:
    for block in every_prefix(VALID[kind]):
        read_all(block)
    read_all(VALID[kind])


@pytest.mark.parametrize("kind", VALID)
def test_100_000_mutations_are_read_or_refused(kind: str) -> None:
    chance = random.Random(kind)
    for _ in range(MUTATIONS // len(VALID)):
        read_all(damage(VALID[kind], chance))


def test_mutations_of_the_fixtures_are_read_or_refused() -> None:
    chance = random.Random(0)
    for path in fixtures("codec-fixtures/dag-pb/*.dag-pb"):
        for block in every_prefix(path.read_bytes()):
            read_all(block)
        for _ in range(200):
            read_all(damage(path.read_bytes(), chance))


def test_some_damaged_blocks_are_still_readable() -> None:
    """Damage that makes all blocks unreadable, or none, would test little."""
    chance = random.Random(1)
    readable = 0
    for _ in range(1000):
        try:
            dagpb.decode(damage(VALID["directory"], chance))
            readable += 1
        except IpfsFuseError:
            pass
    assert 100 < readable < 900
