"""Parses verified blocks into files, directories, shards and symlinks.

The layers above use the types defined here. All are frozen. Links hold binary CIDs and raw name bytes. They
are made when they are used: a node keeps its block and a few bytes for each link. `parse` is strict: a block
that breaks a rule of the format (https://specs.ipfs.tech/unixfs/) raises Malformed.

Pure functions. A directory block of 2 MiB takes some 100 ms to parse: parse such blocks in a worker thread
(MAX_PARSED_ON_LOOP).
"""

import operator
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, islice
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, unixfs, values
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Link as Link
from ipfsfuse.dag.dagpb import Links
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse.dag.values import Document, Kind
from ipfsfuse.errors import Malformed, Unsupported

MAX_FILE_SIZE = (1 << 63) - 1
"""Bytes of the largest file that a file system can hold."""
MAX_PARSED_ON_LOOP = 100 << 10
"""Bytes of the largest block that is parsed on the event loop: about 10 ms."""
MAX_VALUES_ON_LOOP = 8 << 10
"""The same for dag-cbor and dag-json, which can have a value in each byte."""
MAX_SYMLINK_TARGET = 4095
"""The longest target of a symlink that Linux can follow, in bytes."""
MURMUR3 = 0x22
"""The multicodec of murmur3-x64-64, the one hash that HAMT directories use."""


class Leaf(NamedTuple):
    """A piece of a file that is in one block: `size` content bytes at `offset` of the file.

    `cid` names the block: a raw block, a dag-pb leaf, or an interior node with inline data (the data is the
    content).
    """

    cid: Cid
    offset: int
    size: int
    interior: bool = False
    """Whether its node is known to have children, with the content of later leaves."""

    def has_content(self, size: int, interior: bool) -> bool:
        """Whether `size` bytes from the block `cid` are the content. `interior`: whether the block has
        children. If not, the parent states a wrong size, or the block was taken for a leaf."""
        return size == self.size and interior <= self.interior


class Child(NamedTuple):
    """A subtree of a file: `size` content bytes at `offset` of the file, as its parent states them."""

    cid: Cid
    offset: int
    size: int


class Children:
    """The children of a file node, made when they are used."""

    __slots__ = ("_links", "_offsets", "first_size")

    def __init__(self, links: Links, offsets: "array[int]") -> None:
        """`offsets` has the offset of each child, and then the end of the last one."""
        self._links = links
        self._offsets = offsets
        self.first_size = offsets[1] - offsets[0] if links else 0
        """Content bytes of the first child."""

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Child]:
        offsets = self._offsets
        for at, link in enumerate(self._links.cids()):
            yield Child(link, offsets[at], offsets[at + 1] - offsets[at])

    def cids(self) -> list[Cid]:
        return self._links.cids()

    def between(self, start: int, stop: int) -> Iterator[Child]:
        """The children with content in [start, stop), in order."""
        block, spans, offsets = self._links.block, self._links.spans, self._offsets
        first = max(bisect_right(offsets, start) - 1, 0)
        for at in range(first, len(offsets) - 1):
            offset, end = offsets[at], offsets[at + 1]
            if offset >= stop:
                return
            if start < end and offset < end:
                yield Child(Cid(block[spans[4 * at] : spans[4 * at + 1]]), offset, end - offset)


NO_CHILDREN = Children(Links(), array("Q"))


@dataclass(frozen=True, slots=True)
class Meta:
    """Stored attributes; None if an attribute is not stored. `mode` is masked to 0o7777. `mtime` is in
    nanoseconds since 1970."""

    mode: int | None = None
    mtime: int | None = None


NO_META = Meta()


@dataclass(frozen=True, slots=True)
class File:
    """The root or an interior node of a file. Its content is `inline` bytes, then the content of the children
    in order."""

    cid: Cid
    size: int
    inline: int
    """Content bytes in this block itself. They come first. In a leaf, they are all."""
    children: Children = NO_CHILDREN
    meta: Meta = NO_META


@dataclass(frozen=True, slots=True)
class Directory:
    """A basic directory: links in the order stored. If two have the same name, the first counts."""

    cid: Cid
    links: Links
    meta: Meta = NO_META
    block: Document | None = None
    """All values of a dag-cbor or dag-json block, since such a block links more than its entries."""
    _by_name: Sequence[int] = field(init=False, repr=False, compare=False)
    """The indices of the links, sorted by name. The sort is stable, so that the first of equal names is
    found."""

    def __post_init__(self) -> None:
        names = self.links.names()
        order: Sequence[int] = range(len(names))
        if not all(map(operator.lt, names, islice(names, 1, None))):  # rare: importers sort the links
            order = array("I", sorted(order, key=names.__getitem__))
        object.__setattr__(self, "_by_name", order)

    def find(self, name: bytes) -> Link | None:
        """The entry `name`; None if there is none."""
        index = self._index(name)
        return None if index is None else self.links[index]

    @property
    def has_distinct_names(self) -> bool:
        """True if the links are sorted by name, as importers write them."""
        return isinstance(self._by_name, range)

    def counts(self, index: int) -> bool:
        """Whether the link at `index` is the first with its name."""
        return self.has_distinct_names or self._index(self.links.name(index)) == index

    def _index(self, name: bytes) -> int | None:
        order = self._by_name
        place = bisect_left(order, name, key=self.links.name)
        return order[place] if place < len(order) and self.links.name(order[place]) == name else None


@dataclass(frozen=True, slots=True)
class Shard:
    """One node of a HAMT directory. A link's name is prefix + entry name."""

    cid: Cid
    width: int
    """Children per node: a power of two, 8 to 1024."""
    indices: Sequence[int]
    """The bit index of each link, ascending."""
    links: Links
    meta: Meta = NO_META


@dataclass(frozen=True, slots=True)
class Symlink:
    cid: Cid
    target: bytes
    meta: Meta = NO_META


Node = File | Directory | Shard | Symlink


def parse(cid: Cid, block: bytes) -> Node:
    """The node in a verified `block`. Raises Malformed, or Unsupported for a codec that is not shown.

    For an identity CID, `block` is `cid.inline_block`. For a value within a block, `block` is the block of
    `cid.block_of`.
    """
    codec = cids.codec(cid)
    if codec == cids.RAW:
        return File(cid, len(block), len(block))
    refuse_unshown(cid)
    if codec != cids.DAG_PB:
        return value_node(cid, document(cid, block))
    try:
        node = dagpb.decode(block)
        if node.data is None:
            raise Malformed("a dag-pb node without UnixFS data")
        return _node(cid, node.links, unixfs.decode(node.data))
    except Malformed as exc:
        raise Malformed(f"{cids.brief(cid)}: {exc}") from exc


def refuse_unshown(cid: Cid) -> None:
    """Raises Unsupported for a codec that is not shown."""
    if cids.codec(cid) not in (cids.RAW, cids.DAG_PB, *values.SHOWN_CODECS) and not cids.is_value(cid):
        raise Unsupported(
            f"{cids.brief(cid)}: {cids.codec_name(cid)} blocks are not shown, only UnixFS, raw, dag-cbor and "
            "dag-json"
        )


def holds_values(cid: Cid) -> bool:
    """Whether `cid` is a dag-cbor or dag-json block, or a value within one."""
    return cids.is_value(cid) or cids.codec(cid) in values.SHOWN_CODECS


def document(cid: Cid, block: bytes) -> Document:
    """The values of `block`. `cid` names the block, or a value within it. Raises Malformed, Unsupported."""
    try:
        return values.shown(cids.codec(cids.block_of(cid)), block)
    except Malformed as exc:
        raise Malformed(f"{cids.brief(cids.block_of(cid))}: {exc}") from exc
    except Unsupported as exc:
        raise Unsupported(f"{cids.brief(cids.block_of(cid))}: {exc}") from exc


def value_node(cid: Cid, found: Document) -> Node:
    """The value `cid` of a document, as a directory or file. Raises Malformed if the document has no such
    value."""
    block, number = cids.value_place(cid)
    if number >= len(found):
        raise Malformed(f"{cids.brief(block)} has {len(found)} values, and none with the number {number}")
    if found.kind(number) in (Kind.MAP, Kind.LIST):
        return Directory(cid, found.links(number, block), block=None if number else found)
    size = found.content_size(number)
    return File(cid, size, size)


def children(node: Node) -> list[Cid]:
    """The CIDs that the block of a node links. For a value within a block: none."""
    if isinstance(node, Directory) and holds_values(node.cid):
        return node.block.targets() if node.block is not None else []
    if isinstance(node, File):
        return node.children.cids()
    return [] if isinstance(node, Symlink) else node.links.cids()


def links(cid: Cid, block: bytes) -> list[Cid]:
    """The CIDs that a dag-pb, dag-cbor or dag-json block links, in order; for other codecs none.

    Raises Malformed."""
    codec = cids.codec(cid)
    if codec == cids.DAG_PB:
        return dagpb.decode(block).links.cids()
    if codec not in values.SHOWN_CODECS:
        return []
    try:
        return values.decode(codec, block).targets()
    except Malformed as exc:
        raise Malformed(f"{cids.brief(cid)}: {exc}") from exc


def _node(cid: Cid, links: Links, message: UnixFS) -> Node:
    kind = message.type
    meta = NO_META
    if message.mode is not None or message.mtime is not None:
        meta = Meta(None if message.mode is None else message.mode & 0o7777, message.mtime)
    if kind is Type.FILE or kind is Type.RAW:
        return file_of(cid, links, message, meta)
    if kind is Type.DIRECTORY:
        return Directory(cid, links, meta)
    if kind is Type.HAMT_SHARD:
        return _shard(cid, links, message, meta)
    if kind is Type.SYMLINK:
        return _symlink(cid, message, meta)
    # Kubo's mount and gateway do not show them either
    raise Unsupported(f"{cids.brief(cid)}: UnixFS Metadata nodes are not shown")


def file_of(cid: Cid, links: Links, message: UnixFS, meta: Meta = NO_META) -> File:
    """The file node of a dag-pb block with these links and this message. Raises Malformed."""
    sizes = message.blocksizes
    if len(sizes) != len(links):
        raise Malformed(f"a file node with {len(links)} links and {len(sizes)} block sizes")
    offset = inline = len(message.data or b"")
    if links and any(links.names()):
        raise Malformed("a file node with a link that has a name")
    offset += sum(sizes)
    if message.filesize is not None and message.filesize != offset:
        raise Malformed(f"a file node that says {message.filesize} bytes and holds {offset}")
    if offset > MAX_FILE_SIZE:
        raise Malformed(f"a file of {offset} bytes is larger than a file system can hold")
    children = Children(links, array("Q", accumulate(sizes, initial=inline))) if links else NO_CHILDREN
    return File(cid, offset, inline, children, meta)


def _symlink(cid: Cid, message: UnixFS, meta: Meta) -> Symlink:
    target = bytes(message.data or b"")
    if not 1 <= len(target) <= MAX_SYMLINK_TARGET:
        raise Malformed(
            f"a symlink with a target of {len(target)} bytes: 1 to {MAX_SYMLINK_TARGET} can be followed"
        )
    if b"\0" in target:
        raise Malformed("a symlink whose target has a NUL byte")
    return Symlink(cid, target, meta)


def _shard(cid: Cid, links: Links, message: UnixFS, meta: Meta) -> Shard:
    width = message.fanout or 0
    if message.hash_type != MURMUR3:
        raise Malformed(f"a HAMT of hash type {message.hash_type}: only murmur3-x64-64 is known")
    if not 8 <= width <= 1024 or width & (width - 1):
        raise Malformed(f"a HAMT {width} wide: a power of two from 8 to 1024 is allowed")
    bits = int.from_bytes(message.data or b"", "big")
    if bits >> width or len(message.data or b"") > width // 8:
        raise Malformed("a HAMT with a bit field wider than the node")
    if bits.bit_count() != len(links):
        raise Malformed(f"a HAMT with {bits.bit_count()} bits set and {len(links)} links")
    indices = array("H")
    pad = prefix_length(width)
    for name in links.names():
        index = (bits & -bits).bit_length() - 1
        bits &= bits - 1
        if name[:pad] != b"%0*X" % (pad, index):
            raise Malformed(f"a HAMT whose bit {index} has a link with the prefix {name[:pad]!r}")
        indices.append(index)
    return Shard(cid, width, indices, links, meta)


@cache
def prefix_length(width: int) -> int:
    """The number of hexadecimal digits before each name in a HAMT node of this width."""
    return len(f"{width - 1:X}")
