"""What is staged, by path: which entries of which directories are here, found from what was opened by name.

The cache knows CIDs alone. So the names come from the directories themselves: the walk begins at the names
that were opened in the mount's root, and goes down through directory blocks that are here. It asks no
source, and what it looks at does not count as used. Each directory is entered once, by the first path that
leads to it, so that the walk takes no longer than there are entries.
"""

from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

import trio

from ipfsfuse.cache.base import Kept
from ipfsfuse.cache.reader import Reader
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Node, Shard, Symlink
from ipfsfuse.dag.path import can_hold
from ipfsfuse.errors import Malformed, Unsupported
from ipfsfuse.fileio import threads

AT_ONCE = 500
"""Entries that are looked at before other tasks can run: some milliseconds."""


class Staged(NamedTuple):
    """One path that is here, at least in part."""

    path: bytes
    """`/ipfs/NAME/a/b`, NAME as it was opened."""
    kept: Kept
    kind: str
    """`directory`, `file` or `symlink`."""
    size: int | None
    """Content bytes; None for a directory."""


async def staged_paths(reader: Reader, roots: Iterable[tuple[Cid, str]]) -> AsyncIterator[Staged]:
    """Every path below `roots` (CIDs and their names) that is staged, a directory before what is in it. The
    next root is asked for when all below the one before it was yielded."""
    entered = set[Cid]()
    looked_at = 0
    for root, name in roots:
        waiting = [(b"/ipfs/" + name.encode(), root)]
        while waiting:
            looked_at += 1
            if looked_at % AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            path, cid = waiting.pop()
            kept = reader.store.kept_of(cid)
            if kept is None:
                continue
            node = await _node(reader, cid) if cids.codec(cid) == cids.DAG_PB else None
            if isinstance(node, Directory | Shard):
                yield Staged(path, kept, "directory", None)
                if cids.canonical(cid) not in entered:
                    entered.add(cids.canonical(cid))
                    entries = sorted([entry async for entry in _entries(reader, node)], reverse=True)
                    waiting += [(path + b"/" + child, below) for child, below in entries]
            else:
                kind = "symlink" if isinstance(node, Symlink) else "file"
                yield Staged(path, kept, kind, node.size if isinstance(node, File) else kept.size)


async def _entries(reader: Reader, directory: Directory | Shard) -> AsyncIterator[tuple[bytes, Cid]]:
    """The names in a directory. Of a HAMT those in the nodes that are here."""
    if isinstance(directory, Directory):
        for index, link in enumerate(directory.links):
            if can_hold(link.name) and directory.counts(index):
                yield link.name, link.cid
        return
    shards, entered = [directory], set[Cid]()
    while shards:
        shard = shards.pop()
        for link in shard.links:
            name = hamt.entry_name(shard, link)
            if name:
                if can_hold(name):
                    yield name, link.cid
            elif link.cid not in entered:  # a broken HAMT may have one node twice
                entered.add(link.cid)
                below = await _node(reader, link.cid)
                if isinstance(below, Shard):
                    shards.append(below)


async def _node(reader: Reader, cid: Cid) -> Node | None:
    """The node of a block that is staged."""
    block = await reader.staged_block(cid, use=False)
    if block is None:
        return None
    try:
        if len(block) > nodes.MAX_PARSED_ON_LOOP:
            return await threads.run_sync(nodes.parse, cid, block)
        return nodes.parse(cid, block)
    except (Malformed, Unsupported):
        return None
