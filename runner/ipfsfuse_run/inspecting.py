"""`inspect`: what a recorded run read, by path, as a table or as JSON."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Shard, Symlink
from ipfsfuse.errors import Malformed
from ipfsfuse.text import printable
from ipfsfuse_run import options, receipts
from ipfsfuse_run.errors import ReceiptRefused, say
from ipfsfuse_run.receipts import Bundle, Receipt
from ipfsfuse_run.replay import check_stdin, opened


class Row(NamedTuple):
    """One thing of which at least its first block was read."""

    path: str
    type: str
    size: int
    """Bytes of a file's content; of a symlink's target; 0 for a directory."""
    read: int
    """Bytes of a file's content in the blocks that were read."""
    cid: str


def main(argv: Sequence[str]) -> int:
    """`inspect RUN.car [--json]`. Raises UsageError, ReceiptRefused."""
    parser = options.Parser(
        prog="ipfsfuse-run inspect", allow_abbrev=False, description="What a recorded run read, by path."
    )
    parser.add_argument("record", metavar="RUN.car")
    parser.add_argument("--json", action="store_true")
    asked: argparse.Namespace = parser.parse_args(list(argv))
    path = Path(asked.record)
    with opened(path) as (record, receipt):
        check_stdin(record, receipt)
        walk = Walk(record, receipt)
        found = list(walk.rows())
    if asked.json:
        shown = {
            "guest": receipt.name,
            "argv": list(receipt.argv),
            "exit_code": receipt.exit_code,
            "read": [each._asdict() for each in found],
        }
        print(json.dumps(shown, indent=1))
    else:
        print(printable(" ".join(receipt.argv)))
        print(
            f"  {printable(receipt.name)} ended with {receipt.exit_code} at "
            f"{printable(receipt.started)}, {receipt.seconds} s"
        )
        print(f"{'TYPE':<10} {'SIZE':>14} {'READ':>14}  PATH")
        for each in found:
            print(f"{each.type:<10} {each.size:>14,} {each.read:>14,}  {printable(each.path)}")
    if walk.left_out:
        say(f"{path}: more paths than these lead to what was read; the rest is left out")
    return 0


class _Node(NamedTuple):
    """What is shown of one node, wherever it stands."""

    type: str
    size: int
    read: int
    entries: Sequence[tuple[Cid, bytes]]
    """A directory's children of which something was read."""


class Walk:
    """Every path to what was read. A few blocks can make up a tree of any number of paths, so each block is
    looked at once, and the paths are bounded by the number of blocks."""

    def __init__(self, record: Bundle, receipt: Receipt) -> None:
        self._record = record
        self._read = {cids.multihash(each) for each in receipt.read}
        self._nodes: dict[Cid, _Node] = {}
        self._counted: dict[Cid, int] = {}
        self._rows_left = 10_000 + 4 * len(receipt.read)
        self._text_left = 16 << 20
        self.left_out = False
        """Whether there are more paths than `rows` gave."""

    def rows(self) -> Iterator[Row]:
        """Raises ReceiptRefused."""
        try:
            yield from self._rows()
        except (RecursionError, Malformed) as exc:
            raise ReceiptRefused(
                f"{self._record.path}: a file or sharded folder in it is made as none can be: {exc}"
            ) from exc

    def _rows(self) -> Iterator[Row]:
        place = self._record.find(receipts.IPFS)
        # a tree may be far deeper than Python's calls
        stack = [] if place is None else [(place, f"/{receipts.IPFS}")]
        top = True
        while stack:
            cid, path = stack.pop()
            node = self._node(cid, all_entries=top)
            if not top:
                yield Row(path, node.type, node.size, node.read, cids.text(cid))
            stack.extend(reversed(list(self._children(path, node))))
            top = False

    def _children(self, path: str, node: _Node) -> Iterator[tuple[Cid, str]]:
        for child, name in node.entries:
            if self._was_read(child):
                self._rows_left -= 1
                self._text_left -= len(path) + len(name) + 1
                if self._rows_left < 0 or self._text_left < 0:
                    self.left_out = True
                    return
                yield child, f"{path}/{os.fsdecode(name)}"

    def _was_read(self, cid: Cid) -> bool:
        return cids.multihash(cid) in self._read or cids.inline(cid) is not None

    def _node(self, cid: Cid, all_entries: bool) -> _Node:
        if cid not in self._nodes:
            node = self._record.node(cid)
            if isinstance(node, File):
                self._nodes[cid] = _Node("file", node.size, self._bytes_read(node), ())
            elif isinstance(node, Symlink):
                self._nodes[cid] = _Node("symlink", len(node.target), len(node.target), ())
            else:
                entries = [
                    each
                    for each in self._entries(node, hamt.TOP, set())
                    if all_entries or self._was_read(each[0])
                ]
                self._nodes[cid] = _Node("directory", 0, 0, entries)
        return self._nodes[cid]

    def _entries(
        self, node: Directory | Shard, spot: hamt.Spot, seen: set[Cid]
    ) -> Iterator[tuple[Cid, bytes]]:
        """Of a sharded folder, what stands where its name belongs: so no node of it can stand there twice.
        Raises Malformed."""
        if isinstance(node, Directory):
            yield from ((link.cid, link.name) for link in node.links)
            return
        for index, link in zip(node.indices, node.links, strict=True):
            below = hamt.below(spot, node, index)
            entry = hamt.entry_name(node, link)
            if entry:
                hamt.placed(entry, below, node)
                yield link.cid, entry
            elif cids.multihash(link.cid) in self._read:
                if link.cid in seen:
                    raise Malformed(f"{cids.brief(link.cid)} stands twice in one sharded folder")
                seen.add(link.cid)
                yield from self._entries(hamt.subshard(self._record.node(link.cid)), below, seen)

    def _bytes_read(self, node: File) -> int:
        if node.cid not in self._counted:
            total = node.inline
            for child in node.children:
                if cids.multihash(child.cid) in self._read:
                    below = self._counted.get(child.cid)
                    if below is None:
                        opened = self._record.node(child.cid)
                        below = self._counted[child.cid] = (
                            self._bytes_read(opened) if isinstance(opened, File) else 0
                        )
                    total += below
            self._counted[node.cid] = total
        return self._counted[node.cid]
