"""HAMT directories: finds the place of a name in the trie.

The hash of a name is its path in the trie: from the most significant bit on, each level takes log2(width)
bits (https://specs.ipfs.tech/unixfs/). A `Spot` is a place in the trie: the bits that lead to it. Every entry
that is read is checked against its spot. So no block can be in two places, and a trie that repeats a block
fails at its first entry. Pure functions.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import mmh3

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Link, Node, Shard, prefix_length
from ipfsfuse.errors import Malformed

HASH_BITS = 64


class Spot(NamedTuple):
    """All names whose hash begins with the `bits` bits of `prefix`."""

    prefix: int
    bits: int


TOP = Spot(0, 0)


def hash64(name: bytes) -> int:
    """The low 64 bits of murmur3-x64-128, unsigned."""
    return mmh3.hash64(name, signed=False)[0]


def below(spot: Spot, shard: Shard, index: int) -> Spot:
    """The spot of slot `index` in `shard`, a node at `spot`. Raises Malformed if the hash has no bits
    left."""
    level = shard.width.bit_length() - 1
    if spot.bits + level > HASH_BITS:
        raise Malformed(f"{cids.brief(shard.cid)}: a HAMT node deeper than its hash has bits")
    return Spot(spot.prefix << level | index, spot.bits + level)


def slot(shard: Shard, spot: Spot, key: int) -> tuple[Spot, Link | None]:
    """The slot for hash `key` in a node at `spot`, and its link if there is one."""
    level = shard.width.bit_length() - 1
    index = (key >> max(HASH_BITS - spot.bits - level, 0)) & (shard.width - 1)
    found = bisect_left(shard.indices, index)
    here = found < len(shard.indices) and shard.indices[found] == index
    return below(spot, shard, index), shard.links[found] if here else None


def slots(shard: Shard) -> Iterator[tuple[int, Cid, bytes, int]]:
    """For each slot in use: its index, and the CID, the `entry_name` and the tsize of its link."""
    length = prefix_length(shard.width)
    links = shard.links.parts(0, len(shard.links))
    for index, (cid, name, tsize) in zip(shard.indices, links, strict=True):
        yield index, cid, name[length:], tsize


def deeper(shard: Shard) -> list[Cid]:
    """The nodes below `shard`."""
    return [cid for _index, cid, name, _tsize in slots(shard) if not name]


def entry_name(shard: Shard, link: Link) -> bytes:
    """The name of the entry `link`; b"" if the link leads to a deeper node."""
    return link.name[prefix_length(shard.width) :]


def placed(name: bytes, spot: Spot, shard: Shard) -> int:
    """The hash of `name`, an entry of `shard`. Raises Malformed unless it belongs at `spot`."""
    key = hash64(name)
    if key >> (HASH_BITS - spot.bits) != spot.prefix:
        raise misplaced(name, shard)
    return key


def misplaced(name: bytes, shard: Shard) -> Malformed:
    return Malformed(
        f"{cids.brief(shard.cid)}: a HAMT node holds {name[:80]!r} at a place that does not fit its hash"
    )


def subshard(node: Node) -> Shard:
    """`node` as a HAMT node below a root. Raises Malformed if it is not one, or if it is empty, since a trie
    of empty nodes can be endless."""
    if not isinstance(node, Shard) or not node.links:
        raise Malformed(
            f"{cids.brief(node.cid)}: is linked in a HAMT directory, but is not a HAMT node, or is an "
            "empty one"
        )
    return node
