"""The blocks of a CAR in order: those of the path, then those of the entity at its end.

Concurrency: one task for each stream. Memory holds one block, and the links of its ancestors.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Final, NamedTuple

import trio

from ipfsfuse.cache.reader import parsed_node
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, nodes, traversal
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import MAX_PARSED_ON_LOOP, Directory, File, Node, Shard
from ipfsfuse.errors import Malformed, NotFound, Unsupported
from ipfsfuse.fileio import threads

MAX_BLOCKS: Final = 200_000
"""The most blocks of a stream. Then it is cut off, since the CIDs that were sent are remembered, in 20 MB."""
MAX_INLINE_NODES: Final = 1_000_000
"""The most nodes in identity CIDs that one stream visits. They are not in the CAR."""
INLINE_AT_A_TIME: Final = 200
"""Nodes in identity CIDs that are visited before other requests can run: about 10 ms."""
MAX_LEVELS: Final = 2000
"""The most levels below the entity. Each level holds the links of one block."""

GetBlock = Callable[[Cid], Awaitable[bytes]]


class TooMuch(Exception):
    """The DAG is too large or too deep for one answer."""


class ResolvedPath(NamedTuple):
    """The entity at the end of a path, and the blocks on the way."""

    way: Sequence[Cid]
    entity: Cid


class Span(NamedTuple):
    """The wanted bytes of a file, both ends included. Negative numbers count from its end. If `last` is None,
    up to the end."""

    first: int
    last: int | None


async def find(get: GetBlock, root: Cid, names: Sequence[bytes]) -> ResolvedPath:
    """Raises NotFound for a name that is proved absent, Malformed, Unsupported, and what `get` raises."""
    way: list[Cid] = []

    async def node(cid: Cid) -> Node:
        block = cids.block_of(cid)
        if block not in way[-1:]:
            way.append(block)
        return await parsed_node(cid, await get(block))

    async def all_nodes(wanted: Sequence[Cid]) -> list[Node]:
        return [await node(cid) for cid in wanted]

    entity = root
    for name in names:
        here = await node(entity)
        if not isinstance(here, Directory | Shard):
            raise NotFound(f"{cids.brief(entity)} is not a directory")
        link = await traversal.drive(traversal.child(here, name), all_nodes)
        if link is None:
            raise NotFound(f"{cids.brief(entity)} has no entry {name!r}")
        entity = link.cid
    if cids.is_value(entity):  # the path ends within the last block of the way
        entity = way.pop()
    return ResolvedPath(way, entity)


async def blocks(
    get: GetBlock, resolved: ResolvedPath, scope: str, span: Span, dups: bool
) -> AsyncIterator[tuple[Cid, bytes]]:
    """The blocks on the way to `place`, then, depth first, the blocks of its entity according to `scope`
    (block, entity or all) and `span`. Without `dups` each comes once. Blocks in identity CIDs are left out.

    Raises TooMuch, and the errors of `get` and of the parser."""
    sent: set[Cid] = set()
    count = inlined = 0
    for cid in resolved.way:
        if cids.inline_block(cid) is None and (dups or cid not in sent):
            sent.add(cid)
            yield cid, await get(cid)
    levels: list[Iterator[_Visit]] = [iter([_Visit(resolved.entity)])]
    while levels:
        visit = next(levels[-1], None)
        if visit is None:
            levels.pop()
            continue
        if not dups and visit.cid in sent and len(levels) > 1:
            continue
        inline = cids.inline_block(visit.cid)
        if inline is not None:
            inlined += 1
            if inlined > MAX_INLINE_NODES:
                raise TooMuch(f"over {MAX_INLINE_NODES} nodes in identity CIDs")
            if not inlined % INLINE_AT_A_TIME:
                await trio.lowlevel.checkpoint()
        block = inline if inline is not None else await get(visit.cid)
        if inline is None and (dups or visit.cid not in sent):
            count += 1
            if count > MAX_BLOCKS:
                raise TooMuch(f"over {MAX_BLOCKS} blocks")
            if not dups:
                sent.add(visit.cid)
            yield visit.cid, block
        if scope == "block":
            return
        below = await _below(visit, block, scope, span if len(levels) == 1 else None)
        if below:
            if len(levels) > MAX_LEVELS:
                raise TooMuch(f"over {MAX_LEVELS} levels")
            levels.append(iter(below))


class _Visit(NamedTuple):
    """A block to visit. `offset` and `wanted` count bytes of the file that the block is a part of."""

    cid: Cid
    offset: int = 0
    wanted: tuple[int, int] | None = None
    """The first byte and the end of the wanted bytes; None for all."""


async def _below(visit: _Visit, block: bytes, scope: str, span: Span | None) -> list[_Visit]:
    """The blocks to visit below a block. `span` is None except for the entity itself."""
    if len(block) <= MAX_PARSED_ON_LOOP:
        return _children(visit, block, scope, span)
    return await threads.run_sync(_children, visit, block, scope, span)


def _children(visit: _Visit, block: bytes, scope: str, span: Span | None) -> list[_Visit]:
    if scope == "all" and visit.wanted is None and (span is None or span == Span(0, None)):
        return [_Visit(cid) for cid in nodes.links(visit.cid, block)]
    try:
        node = nodes.parse(visit.cid, block)
    except (Malformed, Unsupported):  # an entity that is not UnixFS is only its block
        return [_Visit(cid) for cid in nodes.links(visit.cid, block)] if scope == "all" else []
    if isinstance(node, File):
        wanted = visit.wanted
        if span is not None and span != Span(0, None):
            wanted = _bytes_of(span, node.size)
        return [
            _Visit(child.cid, visit.offset + child.offset, wanted)
            for child in node.children
            if wanted is None or _overlaps(wanted, visit.offset + child.offset, child.size)
        ]
    if scope == "all":
        return [_Visit(cid) for cid in nodes.children(node)]
    if isinstance(node, Shard):
        return [_Visit(cid) for cid in hamt.deeper(node)]
    return []


def _bytes_of(span: Span, size: int) -> tuple[int, int]:
    first = span.first if span.first >= 0 else max(size + span.first, 0)
    last = size - 1 if span.last is None else span.last if span.last >= 0 else size + span.last
    return first, last + 1


def _overlaps(wanted: tuple[int, int], offset: int, size: int) -> bool:
    return offset < wanted[1] and offset + size > wanted[0]
