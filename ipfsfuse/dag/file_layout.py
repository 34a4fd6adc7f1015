"""Finds the leaves of a range of a file, and the content of a leaf.

Only the block of a dag-pb child shows whether the child is a leaf or an interior node. But a leaf's block
that is fetched here is fetched twice, because the reader fetches it again, into staging. So the child's size,
as its parent states it, decides:

- A child of 2 MiB or more is interior. No block is larger, and a dag-pb block needs some bytes beside the
  content.
- Any other child is of the same kind as its parent's first child. Importers make balanced trees, in which all
  children of a node have the same height. So a short last subtree is recognised by its long siblings.

Trees of tiny chunks and the tail of a trickle tree break this rule. Then `leaf_content` raises NotALeaf for
an interior node that was taken for a leaf, and the caller walks again with `sure=True`. That expands every
dag-pb child, and is right for every tree.

The bytes that a node holds itself come before those of its children, as the UnixFS specification says (Kubo
leaves them out). A part whose size differs from what its parent states is Malformed.

Pure. The work is bounded whatever the blocks say: one call returns at most LEAVES_PER_CALL and expands
about NODES_PER_CALL nodes.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, multihash, nodes, protobuf, unixfs, varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Leaf, Node
from ipfsfuse.dag.traversal import Frontier, Unexpanded, Walk, expand, ready
from ipfsfuse.dag.unixfs import Type
from ipfsfuse.errors import Malformed, NotALeaf, Unsupported
from ipfsfuse.structures import Buffer

LEAVES_PER_CALL = 4096
"""The most leaves that one call returns. A file of tiny chunks has a million of them in a MiB."""
NODES_PER_CALL = 512
"""After expanding so many nodes, a call returns the leaves that it has, if it has any."""
FIRST_NODES, MAX_PARALLEL_NODES = 4, 32
"""Nodes that are fetched in parallel: at first, and at most."""
MAX_CHILDREN = 1 << 16
"""The most children of the nodes that are fetched in parallel, estimated from earlier nodes: 15 MB of
memory."""
MAX_HEIGHT = 128
"""Levels below a root. A tree with two links in each node and 2**63 leaves has 63; a higher one is an
attack."""


class _Subtree(NamedTuple):
    """An unexpanded node: the offset and size of its content, as its parent states them, and its level."""

    offset: int
    size: int
    level: int


_Frontier = Frontier[Leaf, _Subtree]


def leaves(file: File, offset: int, size: int, sure: bool = False) -> Walk[list[Leaf]]:
    """The leaves that overlap `size` bytes at `offset`, in order. If there are any, at least the first one.

    If the list ends before the range, call again from the end of its last leaf. Raises Malformed if a node is
    not a file node, or if its size differs from its parent's statement.
    """
    start, stop = max(offset, 0), min(offset + size, file.size)
    if start >= stop:
        return []

    children = 0

    def parts_of(part: Unexpanded[_Subtree], child: Node) -> _Frontier:
        nonlocal children
        if not isinstance(child, File):
            raise Malformed(f"{cids.brief(part.cid)}: a part of a file, but not a file node")
        if child.size != part.state.size:
            raise Malformed(
                f"{cids.brief(part.cid)}: has {child.size} bytes, but its parent states {part.state.size}"
            )
        children += len(child.children)
        return _parts(child, part.state.offset, part.state.level, (start, stop), sure)

    frontier = _parts(file, 0, 0, (start, stop), sure)
    done = ready(frontier)
    count, together = 0, FIRST_NODES
    while frontier and (count < NODES_PER_CALL or not done):
        yield from expand(frontier, together, parts_of)
        del frontier[LEAVES_PER_CALL - len(done) :]
        done += ready(frontier)
        count += together
        together = max(1, min(2 * together, MAX_PARALLEL_NODES, MAX_CHILDREN * together // max(children, 1)))
        children = 0
    return done


def _parts(file: File, base: int, level: int, span: tuple[int, int], sure: bool) -> _Frontier:
    """The parts of a node that overlap `span`, at most LEAVES_PER_CALL of them. The node's content begins
    at `base`."""
    start, stop = span[0] - base, span[1] - base
    frontier: _Frontier = []
    if file.inline and start < file.inline:
        frontier.append(Leaf(file.cid, base, file.inline, bool(file.children)))
    deep = sure or file.children.first_size >= cids.MAX_BLOCK
    for child in islice(file.children.between(start, stop), LEAVES_PER_CALL - len(frontier)):
        raw = cids.codec(child.cid) == cids.RAW
        if raw and child.size > cids.MAX_BLOCK:
            raise Malformed(f"{cids.brief(child.cid)}: a leaf can't have {child.size} bytes")
        if raw or (not deep and child.size < cids.MAX_BLOCK and cids.inline_block(child.cid) is None):
            frontier.append(Leaf(child.cid, base + child.offset, child.size))
        elif level >= MAX_HEIGHT:
            raise Malformed(f"a file of more than {MAX_HEIGHT} levels")
        else:
            state = _Subtree(base + child.offset, child.size, level + 1)
            frontier.append(Unexpanded(child.cid, state))
    return frontier


# -- the content of one leaf ---------------------------------------------------------------------------------

# A staging file holds only a file's content. The content of a raw leaf is its block. A dag-pb leaf has an
# envelope of a few bytes around the content, in one of the few forms that importers write. So staged content
# can be verified again without its block: by its own hash, or by the hash of the content in an envelope.


def leaf_content(leaf: Leaf, block: bytes) -> memoryview:
    """The content of `leaf`, `leaf.size` bytes, from its verified block.

    Raises NotALeaf for an interior node that was taken for a leaf (then use `leaves(..., sure=True)`),
    Malformed if the size differs from the parent's statement, and the errors of `block_content`.
    """
    found = block_content(leaf.cid, block)
    if leaf.has_content(len(found.data), found.interior):
        return found.data
    name = cids.brief(leaf.cid)
    if found.interior and leaf.size in (found.size, len(found.data)):
        raise NotALeaf(f"{name}: is an interior node, but a leaf was expected")
    raise Malformed(f"{name}: holds {len(found.data)} bytes of a file, but its parent states {leaf.size}")


class BlockContent(NamedTuple):
    """The content bytes that a block holds itself."""

    data: memoryview
    size: int
    """Bytes of the node and its children, as the node states them."""
    interior: bool = False
    """Whether it has children."""


def block_content(cid: Cid, block: Buffer) -> BlockContent:
    """The content in a verified `block` itself: all of a raw block, the data of a UnixFS file node.

    It is a view of `block`, except for a dag-pb block in an unusual form. Raises Malformed for a block that
    is not a file, Unsupported for another codec.
    """
    codec = cids.codec(cid)
    if codec == cids.RAW:
        return BlockContent(memoryview(block), len(block))
    if codec != cids.DAG_PB:
        raise Unsupported(f"{cids.brief(cid)}: a part of a file can't be a {cids.codec_name(cid)} block")
    block = bytes(block)  # bytes are not copied
    span = _canonical_span(block)
    if span is not None:
        return BlockContent(memoryview(block)[span[0] : span[1]], span[1] - span[0])
    node = dagpb.decode(block)
    message = unixfs.decode(memoryview(node.data or b""))
    if message.type not in (Type.FILE, Type.RAW):
        raise Malformed(f"{cids.brief(cid)}: a part of a file can't be a UnixFS {message.type.name.lower()}")
    try:
        file = nodes.file_of(cid, node.links, message)
    except Malformed as exc:
        raise Malformed(f"{cids.brief(cid)}: {exc}") from exc
    return BlockContent(memoryview(message.data or b""), file.size, bool(file.children))


def is_canonical(cid: Cid, block: Buffer) -> bool:
    """Whether `proves(cid, block_content(cid, block).data)` is true. Any other block can only be kept
    whole."""
    codec = cids.codec(cid)
    return codec == cids.RAW or (codec == cids.DAG_PB and _canonical_span(bytes(block)) is not None)


def proves(cid: Cid, data: Buffer) -> bool:
    """Whether `data` is the content of the leaf `cid`: raw, or in a canonical envelope.

    Raises Unsupported for a hash that is not allowed. A raw leaf costs one hash. A dag-pb leaf costs one or
    two, and up to `len(_FORMS)` if no form matches. Other threads run meanwhile.
    """
    return _around(cid, data) is not None


def leaf_block(cid: Cid, data: Buffer) -> bytes | None:
    """The verified block of the leaf `cid`, made of its content; None if `proves` is false."""
    found = _around(cid, data)
    return None if found is None else b"".join((found[0], data, found[1]))


def _around(cid: Cid, data: Buffer) -> tuple[bytes, bytes] | None:
    """The bytes before and after `data` in the block of `cid`; None if `data` is not its content."""
    wanted = cids.multihash(cid)
    forms = iter(((b"", b""),)) if cids.codec(cid) == cids.RAW else _envelopes(len(data))
    return next(((head, tail) for head, tail in forms if multihash.matches(wanted, (head, data, tail))), None)


_FORMS = ((Type.FILE, True), (Type.RAW, True), (Type.FILE, False), (Type.RAW, False))
"""(type, whether filesize follows the data). Importers in Go and JavaScript write the first two."""


def _envelopes(size: int) -> Iterator[tuple[bytes, bytes]]:
    """The bytes before and after `size` bytes of content, in each form of a canonical dag-pb leaf."""
    for kind, sized in _FORMS:
        for with_data in (True,) if size else (False, True):
            yield _envelope(kind, sized, size, with_data)


def _envelope(kind: Type, sized: bool, size: int, with_data: bool) -> tuple[bytes, bytes]:
    head = b"\x08" + varint.put(kind) + (b"\x12" + varint.put(size) if with_data else b"")
    tail = b"\x18" + varint.put(size) if sized else b""
    return b"\x0a" + varint.put(len(head) + size + len(tail)) + head, tail


def _canonical_span(block: bytes) -> tuple[int, int] | None:
    """The place of the content in a canonical dag-pb leaf; None if `block` is not one."""
    try:
        start, end = protobuf.span(block, 1, len(block))
        start = end = start + 2  # after the type
        if block[start : start + 1] == b"\x12":
            start, end = protobuf.span(block, start + 1, len(block))
    except Malformed:
        return None
    outside = block[:start], block[end:] if len(block) - end < 16 else b""
    return (start, end) if outside in _envelopes(end - start) else None
