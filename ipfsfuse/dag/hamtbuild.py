"""HAMT directories from all their links at once (https://specs.ipfs.tech/unixfs/#dag-pb-hamtdirectory).

Pure. A trie over the bits of each name's hash: its shape is a function of the names alone, so it need not be grown by
insertion as Kubo's is.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ipfsfuse.dag import hamt
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Link
from ipfsfuse.errors import Unsupported

MURMUR3 = 0x22


class Saved(Protocol):
    """What is known of a shard that was saved."""

    @property
    def cid(self) -> Cid: ...

    @property
    def tsize(self) -> int: ...


S = TypeVar("S", bound=Saved)
Save = Callable[[Sequence[Link], bytes, bool], S]
"""(links, bitfield, whether it is the root) -> the saved shard; children come before their parents."""


def build(links: Sequence[Link], width: int, save: Save[S]) -> S:
    """The root shard, `width` slots wide, a power of two. Raises Unsupported where names can't be told apart by hash."""
    return _shard([(hamt.hash64(link.name), link) for link in links], width, 0, save)


def _shard(entries: list[tuple[int, Link]], width: int, depth: int, save: Save[S]) -> S:
    bits = width.bit_length() - 1
    shift = hamt.HASH_BITS - bits * (depth + 1)
    if shift < 0:
        raise Unsupported(f"the names {entries[0][1].name!r} and {entries[1][1].name!r} have one hash: a sharded directory can't hold both")
    slots: dict[int, list[tuple[int, Link]]] = {}
    for entry in entries:
        slots.setdefault(entry[0] >> shift & width - 1, []).append(entry)
    digits = len(f"{width - 1:X}")
    found: list[Link] = []
    bitfield = 0
    for index in sorted(slots):
        bitfield |= 1 << index
        prefix = f"{index:0{digits}X}".encode()
        inside = slots[index]
        if len(inside) == 1:
            link = inside[0][1]
            found.append(Link(link.cid, prefix + link.name, link.tsize))
        else:
            child = _shard(inside, width, depth + 1, save)
            found.append(Link(child.cid, prefix, child.tsize))
    return save(found, bitfield.to_bytes((bitfield.bit_length() + 7) // 8), depth == 0)
