"""Ways to fetch over HTTP: leaves by a range of their file or by a CAR, a directory's blocks by a CAR.

Each delivers what it gets, unverified; the caller picks what is faster for its server. Concurrency: each call
runs its own few requests; a slow `deliver` slows them down.
"""

import functools
import itertools
from collections.abc import Awaitable, Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.car import StreamParser
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Block, Deliver, DeliverBlocks, Run, Subtree
from ipfsfuse.sources.failures import LONG, NOT_SUPPORTED, STATUS
from ipfsfuse.sources.http.client import ERROR_BODY, Http, Response, translated

CAR_TYPE = "application/vnd.ipld.car"
SECTIONS = 1000
"""Sections of a CAR that are parsed and handed on in one step of the event loop."""
RANGE_PART = 16 << 20
"""A range is cut into requests of at least so many bytes."""

Take = Callable[[Sequence[tuple[Cid, bytes]]], Awaitable[bool]]


class NotOffered(SourceFailed):
    """The server does not do it this way: another way may work, so nothing is wrong with its health."""


async def by_range(http: Http, run: Run, deliver: Deliver, connections: int) -> None:
    """The file's own bytes by HTTP ranges, cut where its leaves end (`runs.can_range` must hold).

    Raises NotOffered if the server gives no ranges of files, SourceFailed if it breaks off."""
    count, size = len(run.leaves), sum(leaf.size for leaf in run.leaves)
    parts = max(1, min(connections, size // RANGE_PART))
    bounds = [count * part // parts for part in range(parts + 1)]

    async def fetch(start: int, end: int) -> None:
        leaves = run.leaves[start:end]
        first, last = leaves[0].offset, leaves[-1].offset + leaves[-1].size - 1
        target, header = f"/ipfs/{cids.text(run.file)}", ("Range", f"bytes={first}-{last}")
        async with http.ask("GET", target, [header]) as response:
            given = response.headers.get("content-range", "")
            if response.status == 206 and not given.startswith(f"bytes {first}-"):
                raise NotOffered(f"{http.origin.text} gives another range than was asked for", STATUS)
            if response.status != 206:
                raise await _not_offered(http, response, run.file, "ranges of files")

            async def read(some: Sequence[Leaf]) -> tuple[Sequence[Block], Callable[[], None]]:
                return await response.receive_into([leaf.size for leaf in some]), response.detach()

            async def give(index: int, blocks: Sequence[Block]) -> None:
                await deliver(start + index, blocks)

            await runs.in_stretches(leaves, read, give)

    await runs.all_of([functools.partial(fetch, *part) for part in itertools.pairwise(bounds)])


async def by_car(http: Http, run: Run, deliver: Deliver) -> None:
    """A CAR of the range. Blocks that were not asked for are dropped; missing ones are not an error here.

    Raises NotOffered, NotHere, SourceFailed."""
    first, last = run.leaves[0], run.leaves[-1]
    scope = f"dag-scope=entity&entity-bytes={first.offset}:{max(first.offset, last.offset + last.size - 1)}"
    wanted: dict[bytes, list[int]] = {}
    for index, leaf in enumerate(run.leaves):
        wanted.setdefault(cids.multihash(leaf.cid), []).append(index)

    async def take(blocks: Sequence[tuple[Cid, bytes]]) -> bool:
        for cid, block in blocks:
            for index in wanted.pop(cids.multihash(cid), ()):
                await deliver(index, [block])
        return bool(wanted)

    limit = 2 * sum(leaf.size for leaf in run.leaves) + (8 << 20)
    if await _car(http, run.file, scope, limit, take):
        raise SourceFailed(f"{http.origin.text} sent far more than the blocks that were asked for", LONG)


async def by_subtree(http: Http, subtree: Subtree, deliver: DeliverBlocks) -> None:
    """A CAR of a directory, up to its limit of bytes; that it is cut short is not an error here.

    Raises NotOffered, NotHere, SourceFailed."""

    async def take(blocks: Sequence[tuple[Cid, bytes]]) -> bool:
        await deliver(blocks)
        return True

    await _car(http, subtree.root, f"dag-scope={'all' if subtree.whole else 'entity'}", subtree.limit, take)


async def _car(http: Http, root: Cid, scope: str, limit: int, take: Take) -> bool:
    """Gives the blocks of a CAR to `take` until that returns False. True where it exceeds `limit` bytes."""
    parser, accept = StreamParser(), ("Accept", f"{CAR_TYPE}; version=1; order=dfs; dups=n")
    async with http.ask("GET", f"/ipfs/{cids.text(root)}?format=car&{scope}", [accept]) as response:
        if response.status != 200 or response.content_type != CAR_TYPE:
            raise await _not_offered(http, response, root, "CARs")
        while limit >= 0 and (piece := await response.receive()):
            limit -= len(piece)
            found = parser.feed(piece)
            while True:
                with translated(http.origin.text):
                    blocks = list(itertools.islice(found, SECTIONS))
                if not blocks:
                    break
                if not await take(blocks):
                    return False
                await trio.lowlevel.checkpoint()
    return limit < 0


async def _not_offered(http: Http, response: Response, root: Cid, what: str) -> NotHere | SourceFailed:
    """What a response that holds no `what` means."""
    if response.status != 200 and response.status not in NOT_SUPPORTED:
        return await response.declined(http.origin.text, cids.text(root))
    if response.status != 200:
        await response.read(ERROR_BODY)
    return NotOffered(f"{http.origin.text} gives no {what} (status {response.status})", STATUS)
