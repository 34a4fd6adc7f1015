"""What blocks mean: a verified block in, a file, directory, shard or symlink out.

The types here are what the layers above speak of. All are frozen; links hold binary CIDs and raw name bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ipfsfuse.dag.cid import Cid


class Link(NamedTuple):
    """One link of a dag-pb node. `name` is b"" where there is none; `tsize` is its publisher's claim, in bytes."""

    cid: Cid
    name: bytes
    tsize: int


class Leaf(NamedTuple):
    """A piece of a file whose bytes one block holds: `size` content bytes at `offset` of the file.

    `cid` names the block: a raw block, a dag-pb leaf, or an interior node with inline data (whose content is that data).
    """

    cid: Cid
    offset: int
    size: int


class Child(NamedTuple):
    """A subtree of a file: `size` content bytes at `offset` of the file, by its parent's word."""

    cid: Cid
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Meta:
    """Stored attributes. `mode` is masked to 0o777, None where none is stored; `mtime` in nanoseconds since 1970."""

    mode: int | None = None
    mtime: int | None = None


NO_META = Meta()


@dataclass(frozen=True, slots=True)
class File:
    """A file's root (or an interior node of one): its content is `inline` bytes, then the children in order."""

    cid: Cid
    size: int
    inline: int
    """Content bytes that this very block holds, at the front (a leaf: all of them)."""
    children: Sequence[Child]
    meta: Meta = NO_META


@dataclass(frozen=True, slots=True)
class Directory:
    """A basic directory: links in the order stored, and by name."""

    cid: Cid
    links: Sequence[Link]
    by_name: dict[bytes, Link]
    meta: Meta = NO_META


@dataclass(frozen=True, slots=True)
class Shard:
    """One node of a HAMT directory. `slots` are (bit index, link) in bit order; a link's name is prefix + entry name."""

    cid: Cid
    width: int
    """Children per node: a power of two, 8 to 1024."""
    slots: Sequence[tuple[int, Link]]
    meta: Meta = NO_META


@dataclass(frozen=True, slots=True)
class Symlink:
    cid: Cid
    target: bytes
    meta: Meta = NO_META


Node = File | Directory | Shard | Symlink
