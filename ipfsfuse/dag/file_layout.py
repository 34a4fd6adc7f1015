"""Which leaves hold a range of a file.

Only its block shows whether a dag-pb child is a leaf or an interior node. Fetching a leaf's block here would
fetch it twice, because the reader fetches it again, into staging. So the size that the parent states for the
child decides:

- A child of 2 MiB or more is interior. No block is larger, and a dag-pb block needs some bytes beside the
  content.
- Any other child is what its parent's first child is by that rule. Importers make balanced trees, in which
  all children of a node have the same height. So a short last subtree is recognised by its long siblings.

Trees of tiny chunks and the tail of a trickle tree break this assumption. Then `leaves.of` raises NotALeaf
for an interior node that was taken for a leaf, and the caller walks again with `sure=True`, which expands
every dag-pb child and is right for every tree.

Pure. The work is bounded whatever the blocks say: one call returns at most LIMIT leaves and expands about
BUDGET nodes.
"""

from bisect import bisect_right
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Child, File, Leaf, Node
from ipfsfuse.dag.traversal import Frontier, Unexpanded, Walk, expand, known
from ipfsfuse.errors import Malformed

LIMIT = 4096
"""Leaves that one call returns at most. A file of tiny chunks has a million of them in a MiB."""
BUDGET = 512
"""Nodes that one call expands before it returns the leaves that it has, if it has any."""
FIRST, MOST_TOGETHER = 4, 32
"""Nodes that are fetched side by side: at first, and at most."""
MAX_CHILDREN = 1 << 16
"""Children that the nodes fetched side by side may have together, estimated by the nodes before them: 15 MB
of memory."""
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
    """The leaves that overlap `size` bytes at `offset`, in order. At least the first one, if there is any.

    If the list ends before the range does, ask again from the end of its last leaf. Raises Malformed if a
    node is not a file node, or if its size differs from what its parent states.
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
    count, together = 0, FIRST
    while len(done := known(frontier)) < len(frontier) and (count < BUDGET or not done):
        yield from expand(frontier, together, parts_of)
        del frontier[LIMIT:]
        count += together
        together = max(1, min(2 * together, MOST_TOGETHER, MAX_CHILDREN * together // max(children, 1)))
        children = 0
    return done


def _parts(file: File, base: int, level: int, span: tuple[int, int], sure: bool) -> _Frontier:
    """The parts of a node that overlap `span`, at most LIMIT of them. The node's content begins at `base`."""
    start, stop = span[0] - base, span[1] - base
    frontier: _Frontier = []
    if file.inline and start < file.inline:
        frontier.append(Leaf(file.cid, base, file.inline))
    children = file.children
    first = max(bisect_right(children, start, key=lambda child: child.offset) - 1, 0)
    deep = sure or (bool(children) and children[0].size >= cids.MAX_BLOCK)
    for index in range(first, len(children)):
        child = children[index]
        if child.offset >= stop or len(frontier) >= LIMIT:
            break
        if child.size and child.offset + child.size > start:
            frontier.append(_part(child, base, level + 1, deep))
    return frontier


def _part(child: Child, base: int, level: int, deep: bool) -> Leaf | Unexpanded[_Subtree]:
    offset = base + child.offset
    if cids.codec(child.cid) == cids.RAW:
        if child.size > cids.MAX_BLOCK:
            raise Malformed(f"{cids.brief(child.cid)}: a leaf can't have {child.size} bytes")
        return Leaf(child.cid, offset, child.size)
    if not deep and child.size < cids.MAX_BLOCK and cids.inline(child.cid) is None:
        return Leaf(child.cid, offset, child.size)
    if level > MAX_HEIGHT:
        raise Malformed(f"a file of more than {MAX_HEIGHT} levels")
    return Unexpanded(child.cid, _Subtree(offset, child.size, level))
