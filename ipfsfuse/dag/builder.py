"""Builds blocks from files, directories and symlinks, with the CIDs that Kubo 0.43 gives them.

Pure. Every block goes to a sink as (cid, block), children before parents, and `Built` describes the result.
Profiles: https://specs.ipfs.tech/ipips/ipip-0499/. A file takes memory for the links of one node of each
level, a directory for all its links.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ipfsfuse.dag import dagpb, hamt, unixfs
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.multihash import SHA2_256_PREFIX
from ipfsfuse.dag.nodes import MURMUR3, Link, prefix_length
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse.errors import Unsupported
from ipfsfuse.structures import Buffer

Sink = Callable[[Cid, Buffer], object]


@dataclass(frozen=True, slots=True)
class Profile:
    """The settings that determine the CID of a content."""

    name: str
    cid_version: Literal[0, 1]
    raw_leaves: bool
    chunk_size: int
    """Bytes of content in a leaf."""
    file_links: int
    """The most children of a file node."""
    estimate: Literal["block", "links"]
    """How a directory's size is counted: its encoded block, or only the names and CIDs in it."""
    shard_threshold: int = 256 << 10
    """A larger directory becomes a HAMT."""
    hamt_width: int = 256

    def with_metadata(self) -> "Profile":
        """The variant for files with a mode or time. It has no raw leaves, as in Kubo, since they can't hold
        attributes."""
        return replace(self, raw_leaves=False)


UNIXFS_V1_2025 = Profile("unixfs-v1-2025", 1, True, 1 << 20, 1024, "block")
UNIXFS_V0_2015 = Profile("unixfs-v0-2015", 0, False, 256 << 10, 174, "links")
PROFILES = {profile.name: profile for profile in (UNIXFS_V1_2025, UNIXFS_V0_2015)}


@dataclass(frozen=True, slots=True)
class Stored:
    """The attributes to store with a file, directory or symlink. None if an attribute is not stored."""

    mode: int | None = None
    """The low 12 bits of st_mode."""
    mtime: int | None = None
    """Nanoseconds since 1970."""

    def on(self, message: UnixFS) -> UnixFS:
        """`message` with the attributes. Kubo stores mode 0 of a directory, and leaves out that of a file."""
        mode = None if self.mode == 0 and message.type is Type.FILE else self.mode
        return (
            message if mode is None and self.mtime is None else replace(message, mode=mode, mtime=self.mtime)
        )


NO_ATTRIBUTES = Stored()


class Built(NamedTuple):
    """A finished DAG."""

    cid: Cid
    size: int
    """Content bytes of a file; 0 for others."""
    tsize: int
    """Bytes of all its blocks, a block that is linked twice counted twice."""


class Block(NamedTuple):
    """A finished block that is not in the sink yet."""

    built: Built
    block: Buffer


def node(profile: Profile, links: Sequence[Link], message: UnixFS) -> Block:
    """A dag-pb node around `message`."""
    block = dagpb.encode(links, unixfs.encode(message))
    multihash = SHA2_256_PREFIX + hashlib.sha256(block).digest()
    cid = Cid(multihash) if profile.cid_version == 0 else Cid(b"\x01\x70" + multihash)
    return Block(Built(cid, message.filesize or 0, len(block) + sum(link.tsize for link in links)), block)


# -- files ---------------------------------------------------------------------------------------------------


def leaf(profile: Profile, chunk: Buffer, stored: Stored = NO_ATTRIBUTES) -> Block:
    """A leaf that holds `chunk`. Hashing lets other threads run."""
    if profile.raw_leaves:
        cid = Cid(b"\x01\x55" + SHA2_256_PREFIX + hashlib.sha256(chunk).digest())
        return Block(Built(cid, len(chunk), len(chunk)), chunk)
    return node(profile, (), stored.on(UnixFS(Type.FILE, chunk or None, len(chunk))))


class FileBuilder:
    """Builds the balanced layout: all leaves have the same depth, and only the last node of a level may not
    be full."""

    def __init__(self, profile: Profile, sink: Sink) -> None:
        self._profile = profile
        self._sink = sink
        self._levels: list[list[Built]] = [[]]
        """The nodes that have no parent yet: leaves, then nodes of height 1, and so on."""

    def add(self, leaf: Built) -> None:
        """Adds the next leaf. The caller gives its block to the sink, since only the caller knows whether it
        is the file's only leaf."""
        self._push(0, leaf)

    def _push(self, level: int, child: Built) -> None:
        if level == len(self._levels):
            self._levels.append([])
        if len(self._levels[level]) == self._profile.file_links:
            self._close(level)
        self._levels[level].append(child)

    def _close(self, level: int) -> None:
        """Makes the parent of the children on `level`."""
        parent = self._parent(self._levels[level], NO_ATTRIBUTES)
        self._sink(parent.built.cid, parent.block)
        self._levels[level] = []
        self._push(level + 1, parent.built)

    def _parent(self, children: list[Built], stored: Stored) -> Block:
        sizes = [child.size for child in children]
        message = stored.on(UnixFS(Type.FILE, None, sum(sizes), sizes))
        return node(self._profile, [Link(child.cid, b"", child.tsize) for child in children], message)

    def finish(self, stored: Stored = NO_ATTRIBUTES) -> Built:
        """The root of a file of two leaves or more. (A file of one leaf is that leaf, which holds the
        attributes itself.)"""
        level = 0
        while level + 1 < len(self._levels):
            self._close(level)
            level += 1
        root = self._parent(self._levels[level], stored)
        self._sink(root.built.cid, root.block)
        return root.built


# -- directories and symlinks --------------------------------------------------------------------------------


def directory(profile: Profile, children: Sequence[tuple[bytes, Built]], stored: Stored, sink: Sink) -> Built:
    """A directory of `children` with distinct names: a basic directory, or a HAMT if that is too large.

    Raises Unsupported for a HAMT with two names of the same 64-bit hash.
    """
    links = sorted(
        (Link(built.cid, name, built.tsize) for name, built in children), key=lambda link: link.name
    )
    message = stored.on(UnixFS(Type.DIRECTORY))
    basic = node(profile, links, message)
    size = len(basic.block)
    if profile.estimate == "links":
        size = sum(len(link.name) + len(link.cid) for link in links)
    if size <= profile.shard_threshold:
        sink(basic.built.cid, basic.block)
        return basic.built
    return _sharded(profile, links, stored, sink)


def _sharded(profile: Profile, links: Sequence[Link], stored: Stored, sink: Sink) -> Built:
    """A HAMT (https://specs.ipfs.tech/unixfs/#dag-pb-hamtdirectory).

    Its shape depends only on the names: it is a trie over the bits of their hashes. So it is built from all
    links at once; Kubo inserts them one by one. Raises Unsupported if two names have the same hash.
    """
    width = profile.hamt_width
    bits = width.bit_length() - 1
    digits = prefix_length(width)

    def shard(entries: list[tuple[int, Link]], depth: int) -> Built:
        shift = hamt.HASH_BITS - bits * (depth + 1)
        if shift < 0:
            raise Unsupported(
                f"the names {entries[0][1].name!r} and {entries[1][1].name!r} have the same hash: "
                "a sharded directory can't hold both"
            )
        slots: dict[int, list[tuple[int, Link]]] = {}
        for entry in entries:
            slots.setdefault(entry[0] >> shift & width - 1, []).append(entry)
        found: list[Link] = []
        bitfield = 0
        for index in sorted(slots):
            bitfield |= 1 << index
            prefix = b"%0*X" % (digits, index)
            inside = slots[index]
            if len(inside) == 1:
                link = inside[0][1]
                found.append(Link(link.cid, prefix + link.name, link.tsize))
            else:
                child = shard(inside, depth + 1)
                found.append(Link(child.cid, prefix, child.tsize))
        data = bitfield.to_bytes((bitfield.bit_length() + 7) // 8)
        message = UnixFS(Type.HAMT_SHARD, data, hash_type=MURMUR3, fanout=width)
        block = node(profile, found, message if depth else stored.on(message))
        sink(block.built.cid, block.block)
        return block.built

    return shard([(hamt.hash64(link.name), link) for link in links], 0)


def symlink(profile: Profile, target: bytes, stored: Stored, sink: Sink) -> Built:
    """A symlink. Of the attributes, it stores only the time."""
    block = node(profile, (), replace(stored, mode=None).on(UnixFS(Type.SYMLINK, target)))
    sink(block.built.cid, block.block)
    return block.built
