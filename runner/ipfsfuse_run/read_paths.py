"""Finds the paths that a run read, from the blocks that it read."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, hamt
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Node, Shard, Symlink
from ipfsfuse.errors import Malformed
from ipfsfuse_run.errors import ReceiptRefused


class Row(NamedTuple):
    """A file, symlink or directory of which at least the first block was read."""

    path: str
    type: str
    size: int
    """Bytes of a file's content or of a symlink's target; 0 for a directory."""
    read: int
    """Bytes of a file's content in the blocks that were read."""
    cid: str


def links(cid: Cid, block: bytes) -> Iterable[Cid]:
    """The links of a verified block; none if it is not a dag-pb node."""
    if cids.codec(cid) != cids.DAG_PB:
        return ()
    try:
        return [each.cid for each in dagpb.decode(block).links]
    except Malformed:
        return ()


class Roots:
    """Finds the roots among blocks that are added in the order of first use: no earlier block links to
    them."""

    def __init__(self) -> None:
        self.found: list[Cid] = []
        self._below: set[bytes] = set()

    def add(self, cid: Cid, block: bytes) -> None:
        if cids.multihash(cid) not in self._below:
            self.found.append(cid)
        self._below.update(cids.multihash(each) for each in links(cid, block))


def entries(
    node: Directory | Shard, opened: Callable[[Cid], Node], wanted: Callable[[Cid], bool] = lambda _cid: True
) -> Iterator[tuple[Cid, bytes]]:
    """The entries of a folder: CID and name. For a sharded folder, `opened` returns its shards; only those
    that are `wanted` are opened. Raises Malformed, also if a name is not in the shard that its hash gives, or
    if a shard occurs twice."""
    yield from _entries(node, hamt.TOP, set(), opened, wanted)


def _entries(
    node: Directory | Shard,
    spot: hamt.Spot,
    seen: set[Cid],
    opened: Callable[[Cid], Node],
    wanted: Callable[[Cid], bool],
) -> Iterator[tuple[Cid, bytes]]:
    if isinstance(node, Directory):
        yield from ((link.cid, link.name) for link in node.links)
        return
    for index, cid, entry, _tsize in hamt.slots(node):
        below = hamt.below(spot, node, index)
        if entry:
            hamt.placed(entry, below, node)
            yield cid, entry
        elif wanted(cid):
            if cid in seen:
                raise Malformed(f"{cids.brief(cid)} stands twice in one sharded folder")
            seen.add(cid)
            yield from _entries(hamt.subshard(opened(cid)), below, seen, opened, wanted)


class _Node(NamedTuple):
    """The columns of a row that depend on the node and not on its path."""

    type: str
    size: int
    read: int
    entries: Sequence[tuple[Cid, bytes]]
    """The children of a directory of which something was read."""


class Walk:
    """Walks every path to what was read. A few blocks can form a tree with any number of paths. So each block
    is parsed once, and the number of paths is bounded by the number of blocks."""

    def __init__(self, node: Callable[[Cid], Node], roots: Sequence[Cid], read: Sequence[Cid]) -> None:
        """`node` returns the node of each CID in `read`. Paths begin with `roots`."""
        self._opened = node
        self._roots = roots
        self._read = {cids.multihash(each) for each in read}
        self._nodes: dict[Cid, _Node] = {}
        self._counted: dict[Cid, int] = {}
        self._rows_left = 10_000 + 4 * len(read)
        self._text_left = 16 << 20
        self.left_out = False
        """Whether there are more paths than `rows` yielded."""

    def rows(self) -> Iterator[Row]:
        """Raises ReceiptRefused."""
        try:
            yield from self._rows()
        except (RecursionError, Malformed) as exc:
            raise ReceiptRefused(
                f"a file or sharded folder that was read is made as none can be: {exc}"
            ) from exc

    def _rows(self) -> Iterator[Row]:
        # no recursion: a tree may be far deeper than Python's call stack
        stack = [(each, f"/ipfs/{cids.text(each)}") for each in reversed(self._roots)]
        while stack:
            cid, path = stack.pop()
            node = self._node(cid)
            yield Row(path, node.type, node.size, node.read, cids.text(cid))
            stack.extend(reversed(list(self._children(path, node))))

    def _children(self, path: str, node: _Node) -> Iterator[tuple[Cid, str]]:
        for child, name in node.entries:
            if self._was_read(child):
                self._rows_left -= 1
                self._text_left -= len(path) + len(name) + 1
                if self._rows_left < 0 or self._text_left < 0:
                    self.left_out = True
                    return
                yield child, f"{path}/{os.fsdecode(name)}"

    def _is_node_read(self, cid: Cid) -> bool:
        return cids.multihash(cid) in self._read

    def _was_read(self, cid: Cid) -> bool:
        return cids.multihash(cid) in self._read or cids.inline_block(cid) is not None

    def _node(self, cid: Cid) -> _Node:
        if cid not in self._nodes:
            node = self._opened(cid)
            if isinstance(node, File):
                self._nodes[cid] = _Node("file", node.size, self._bytes_read(node), ())
            elif isinstance(node, Symlink):
                self._nodes[cid] = _Node("symlink", len(node.target), len(node.target), ())
            else:
                found = [
                    each
                    for each in entries(node, self._opened, self._is_node_read)
                    if self._was_read(each[0])
                ]
                self._nodes[cid] = _Node("directory", 0, 0, found)
        return self._nodes[cid]

    def _bytes_read(self, node: File) -> int:
        if node.cid not in self._counted:
            total = node.inline
            for child in node.children:
                if cids.multihash(child.cid) in self._read:
                    below = self._counted.get(child.cid)
                    if below is None:
                        opened = self._opened(child.cid)
                        below = self._counted[child.cid] = (
                            self._bytes_read(opened) if isinstance(opened, File) else 0
                        )
                    total += below
            self._counted[node.cid] = total
        return self._counted[node.cid]
