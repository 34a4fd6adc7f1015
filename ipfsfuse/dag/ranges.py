"""Which leaves hold a range of a file.

Whether a dag-pb child is a leaf or an interior node shows only in its block, and to fetch a leaf's block here would
be to fetch it twice (who reads fetches it again, into staging). So its size decides, which its parent states:
- from 2 MiB on it must be interior: no block is larger, and a dag-pb block needs some bytes beside the content;
- else it is what its parent's first child is by that rule: importers make balanced trees, in which all children of a
  node have the same height, so a short last subtree is known by its long sisters.
What this takes for a leaf wrongly (trees of tiny chunks, the tail of a trickle tree) `leaves.of` refuses as NotALeaf;
then the same walk with `sure=True` opens every dag-pb child, and is right for every tree.

Pure; bounded whatever the blocks say: at most LIMIT leaves, and about BUDGET nodes, for each call.
"""

from bisect import bisect_right
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.front import Front, Unopened, Walk, known, open_first
from ipfsfuse.dag.nodes import Child, File, Leaf, Node
from ipfsfuse.errors import Malformed

LIMIT = 4096
"""Leaves that one call returns at most: files of tiny chunks have a million of them in a MiB."""
BUDGET = 512
"""Nodes that one call opens before it returns what it has, if that is anything."""
FIRST, AT_ONCE = 4, 32
"""Nodes that are opened side by side: at first, and at most."""
CHILDREN = 1 << 16
"""Children that the nodes opened side by side may have together, as far as those before them tell: 15 MB of memory."""
MAX_HEIGHT = 128
"""Levels below a root. A tree of two links a node over 2**63 leaves has 63; more is made to do harm."""


class _Subtree(NamedTuple):
    """Where an unopened node stands: its content's offset and size by its parent's word, and its level."""

    offset: int
    size: int
    level: int


_Front = Front[Leaf, _Subtree]


def leaves(file: File, offset: int, size: int, sure: bool = False) -> Walk[list[Leaf]]:
    """The leaves that overlap `size` bytes at `offset`, in order, at least the first of them if there is one.

    Where the list ends before the range does, ask again from where its last leaf ends. Raises Malformed where a node
    is no file node, or has another size than its parent says.
    """
    start, stop = max(offset, 0), min(offset + size, file.size)
    if start >= stop:
        return []

    children = 0

    def opened(part: Unopened[_Subtree], child: Node) -> _Front:
        nonlocal children
        if not isinstance(child, File):
            raise Malformed(f"{cids.brief(part.cid)}: stands in a file and is none")
        if child.size != part.state.size:
            raise Malformed(f"{cids.brief(part.cid)}: has {child.size} bytes, and its parent says {part.state.size}")
        children += len(child.children)
        return _parts(child, part.state.offset, part.state.level, (start, stop), sure)

    front = _parts(file, 0, 0, (start, stop), sure)
    count, at_once = 0, FIRST
    while len(done := known(front)) < len(front) and (count < BUDGET or not done):
        yield from open_first(front, at_once, opened)
        del front[LIMIT:]
        count += at_once
        at_once = max(1, min(2 * at_once, AT_ONCE, CHILDREN * at_once // max(children, 1)))
        children = 0
    return done


def _parts(file: File, base: int, level: int, span: tuple[int, int], sure: bool) -> _Front:
    """What of a node whose content begins at `base` overlaps `span`, at most LIMIT parts."""
    start, stop = span[0] - base, span[1] - base
    front: _Front = []
    if file.inline and start < file.inline:
        front.append(Leaf(file.cid, base, file.inline))
    children = file.children
    first = max(bisect_right(children, start, key=lambda child: child.offset) - 1, 0)
    deep = sure or (bool(children) and children[0].size >= cids.MAX_BLOCK)
    for index in range(first, len(children)):
        child = children[index]
        if child.offset >= stop or len(front) >= LIMIT:
            break
        if child.size and child.offset + child.size > start:
            front.append(_part(child, base, level + 1, deep))
    return front


def _part(child: Child, base: int, level: int, deep: bool) -> Leaf | Unopened[_Subtree]:
    offset = base + child.offset
    if cids.codec(child.cid) == cids.RAW:
        if child.size > cids.MAX_BLOCK:
            raise Malformed(f"{cids.brief(child.cid)}: a leaf can't have {child.size} bytes")
        return Leaf(child.cid, offset, child.size)
    if not deep and child.size < cids.MAX_BLOCK and cids.inline(child.cid) is None:
        return Leaf(child.cid, offset, child.size)
    if level > MAX_HEIGHT:
        raise Malformed(f"a file of over {MAX_HEIGHT} levels")
    return Unopened(child.cid, _Subtree(offset, child.size, level))
