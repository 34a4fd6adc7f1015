"""Leaves: the content that a block holds, and the proof of that content without its block.

A staging file holds only a file's content. The content of a raw leaf is its block. A dag-pb leaf wraps the
content in an envelope of a few bytes, in one of the few forms that importers write. So staged content can be
verified against its CID again: by its own hash, or by the hash of one of those envelopes around it.

Pure functions; hashing lets other threads run.
"""

from collections.abc import Iterator

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, hashes, nodes, protobuf, unixfs, varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Leaf
from ipfsfuse.dag.unixfs import Type
from ipfsfuse.errors import Malformed, NotALeaf, Unsupported

Buffer = bytes | bytearray | memoryview


def of(leaf: Leaf, block: bytes) -> memoryview:
    """The content of `leaf`, `leaf.size` bytes, from its verified block.

    Raises NotALeaf for an interior node that was taken for a leaf (`file_layout.leaves(..., sure=True)` tells
    them apart), Malformed for a block whose number of bytes differs from what its parent states, and what
    `content` raises.
    """
    data = content(leaf.cid, block)
    if len(data) == leaf.size:
        return data
    name = cids.brief(leaf.cid)
    node = nodes.parse(leaf.cid, block)
    if isinstance(node, File) and node.children and node.size == leaf.size:
        raise NotALeaf(f"{name}: is an interior node, but a leaf was expected")
    raise Malformed(f"{name}: holds {len(data)} bytes of a file, but its parent states {leaf.size}")


def content(cid: Cid, block: Buffer) -> memoryview:
    """The content bytes that `block`, verified, holds itself: all of a raw block, the data of a UnixFS file
    node.

    A view of `block`, except for a dag-pb block in a form that no importer writes. Raises Malformed for a
    block that is not a file, Unsupported for another codec.
    """
    codec = cids.codec(cid)
    if codec == cids.RAW:
        return memoryview(block)
    if codec != cids.DAG_PB:
        raise Unsupported(f"{cids.brief(cid)}: a part of a file can't be a {cids.codec_name(cid)} block")
    block = bytes(block)  # no copy, where it is that
    span = _canonical_span(block)
    if span is not None:
        return memoryview(block)[span[0] : span[1]]
    node = dagpb.decode(block)
    message = unixfs.decode(memoryview(node.data or b""))
    if message.type not in (Type.FILE, Type.RAW):
        raise Malformed(f"{cids.brief(cid)}: a part of a file can't be a UnixFS {message.type.name.lower()}")
    return memoryview(message.data or b"")


def is_canonical(cid: Cid, block: Buffer) -> bool:
    """Whether `proves(cid, content(cid, block))` will hold: what must be kept whole, if at all, is every
    other block."""
    codec = cids.codec(cid)
    return codec == cids.RAW or (codec == cids.DAG_PB and _canonical_span(bytes(block)) is not None)


def proves(cid: Cid, data: Buffer) -> bool:
    """Whether `data` is the content of the leaf `cid`: its hash, or that of a canonical envelope around it,
    matches.

    Raises Unsupported for a hash that is not allowed. Costs one hash for a raw leaf, up to `len(_FORMS)` for
    a dag-pb leaf that does not match, and one or two for one that does.
    """
    return _around(cid, data) is not None


def block(cid: Cid, data: Buffer) -> bytes | None:
    """The verified block of the leaf `cid`, made of its content; None where `proves` is False."""
    found = _around(cid, data)
    return None if found is None else b"".join((found[0], data, found[1]))


def _around(cid: Cid, data: Buffer) -> tuple[bytes, bytes] | None:
    """What stands before and behind `data` in the block of `cid`; None where it is not that block's
    content."""
    multihash = cids.multihash(cid)
    forms = iter(((b"", b""),)) if cids.codec(cid) == cids.RAW else _envelopes(len(data))
    return next(((head, tail) for head, tail in forms if hashes.matches(multihash, (head, data, tail))), None)


_FORMS = ((Type.FILE, True), (Type.RAW, True), (Type.FILE, False), (Type.RAW, False))
"""(type, whether filesize stands behind the data): go, js and old go importers write the first two."""


def _envelopes(size: int) -> Iterator[tuple[bytes, bytes]]:
    """What stands before and behind `size` bytes of content in each canonical dag-pb leaf."""
    for kind, sized in _FORMS:
        for with_data in (True,) if size else (False, True):
            yield _envelope(kind, sized, size, with_data)


def _envelope(kind: Type, sized: bool, size: int, with_data: bool) -> tuple[bytes, bytes]:
    head = b"\x08" + varint.put(kind) + (b"\x12" + varint.put(size) if with_data else b"")
    tail = b"\x18" + varint.put(size) if sized else b""
    return b"\x0a" + varint.put(len(head) + size + len(tail)) + head, tail


def _canonical_span(block: bytes) -> tuple[int, int] | None:
    """Where the content lies in a canonical dag-pb leaf; None if `block` is not one."""
    try:
        start, end = protobuf.span(block, 1, len(block))
        start = end = start + 2  # behind the type
        if block[start : start + 1] == b"\x12":
            start, end = protobuf.span(block, start + 1, len(block))
    except Malformed:
        return None
    outside = block[:start], block[end:] if len(block) - end < 16 else b""
    return (start, end) if outside in _envelopes(end - start) else None
