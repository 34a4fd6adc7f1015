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
from runner import bundle, options
from runner.bundle import Bundle
from runner.errors import ReceiptRefused
from runner.replay import opened


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
    parser = options.Parser(prog="ipfsfuse-run inspect", allow_abbrev=False, description="What a recorded run read, by path.")
    parser.add_argument("record", metavar="RUN.car")
    parser.add_argument("--json", action="store_true")
    asked: argparse.Namespace = parser.parse_args(list(argv))
    record, receipt = opened(Path(asked.record))
    read = {cids.multihash(each) for each in receipt.read}
    try:
        found = list(_rows(record, read))
    except RecursionError as exc:
        raise ReceiptRefused(f"{record.path}: a file or sharded folder in it is nested deeper than any can be") from exc
    if asked.json:
        shown = {"guest": receipt.name, "argv": list(receipt.argv), "exit_code": receipt.exit_code, "read": [each._asdict() for each in found]}
        print(json.dumps(shown, indent=1))
        return 0
    print(_printable(" ".join(receipt.argv)))
    print(f"  {_printable(receipt.name)} ended with {receipt.exit_code} at {_printable(receipt.started)}, {receipt.seconds} s")
    print(f"{'TYPE':<10} {'SIZE':>14} {'READ':>14}  PATH")
    for each in found:
        print(f"{each.type:<10} {each.size:>14,} {each.read:>14,}  {_printable(each.path)}")
    return 0


def _printable(path: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in path)


def _rows(record: Bundle, read: set[bytes]) -> Iterator[Row]:
    place = record.find(bundle.IPFS)
    top = None if place is None else record.node(place)
    counted: dict[Cid, int] = {}
    stack: list[tuple[Cid, str]] = []  # a tree may be far deeper than Python's calls

    def put(folder: Directory | Shard, path: str) -> None:
        stack.extend(reversed([(child, f"{path}/{os.fsdecode(entry)}") for child, entry in _entries(record, read, folder)]))

    if isinstance(top, Directory):
        put(top, f"/{bundle.IPFS}")
    while stack:
        cid, path = stack.pop()
        if cids.multihash(cid) not in read and cids.inline(cid) is None:
            continue
        node = record.node(cid)
        name = cids.text(cid)
        if isinstance(node, File):
            yield Row(path, "file", node.size, _bytes_read(record, read, node, counted), name)
        elif isinstance(node, Symlink):
            yield Row(path, "symlink", len(node.target), len(node.target), name)
        else:
            yield Row(path, "directory", 0, 0, name)
            put(node, path)


def _entries(record: Bundle, read: set[bytes], node: Directory | Shard) -> Iterator[tuple[Cid, bytes]]:
    if isinstance(node, Directory):
        yield from ((link.cid, link.name) for link in node.links)
        return
    for _index, link in node.slots:
        entry = hamt.entry_name(node, link)
        if entry:
            yield link.cid, entry
        elif cids.multihash(link.cid) in read:
            yield from _entries(record, read, hamt.subshard(record.node(link.cid)))


def _bytes_read(record: Bundle, read: set[bytes], node: File, counted: dict[Cid, int]) -> int:
    """`counted` has the nodes that were looked at: a file may name one block a billion times."""
    if node.cid not in counted:
        total = node.inline
        for child in node.children:
            if cids.multihash(child.cid) in read:
                below = record.node(child.cid)
                total += _bytes_read(record, read, below, counted) if isinstance(below, File) else 0
        counted[node.cid] = total
    return counted[node.cid]
