"""Three ways to fetch consecutive leaves of a file over HTTP: a range of its own bytes, a CAR of it, block by block.

Each delivers what it gets, unverified, and returns how far it came by what it delivered; the caller picks by what is
faster for its server. Concurrency: each call runs its own few requests; a slow `deliver` slows them down.
"""

import itertools
from collections.abc import Awaitable, Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.carstream import Parser
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import Malformed, NotHere, SourceFailed
from ipfsfuse.sources.base import Deliver, Run
from ipfsfuse.sources.web.failures import LONG, STATUS
from ipfsfuse.sources.web.http import ERROR_BODY, Http

CAR_TYPE = "application/vnd.ipld.car"
RANGE_PART = 16 << 20
"""A range is cut into requests of at least so many bytes."""


class NotOffered(SourceFailed):
    """The server does not do it this way: another way may work, so nothing is wrong with its health."""


def can_range(leaves: Sequence[Leaf]) -> bool:
    """Whether the leaves' contents are their blocks (raw) and follow each other, so that bytes can be cut into blocks."""
    end = leaves[0].offset
    for leaf in leaves:
        if leaf.offset != end or cids.codec(leaf.cid) != cids.RAW:
            return False
        end += leaf.size
    return True


async def by_range(http: Http, run: Run, deliver: Deliver, connections: int) -> None:
    """The file's own bytes by HTTP ranges, cut where its leaves end (`can_range` must hold).

    Raises NotOffered if the server gives no ranges of files, SourceFailed if it breaks off."""
    size = sum(leaf.size for leaf in run.leaves)
    parts = max(1, min(connections, size // RANGE_PART))
    count = len(run.leaves)
    bounds = [count * part // parts for part in range(parts + 1)]
    await all_of([_Part(http, run, start, end, deliver).fetch for start, end in itertools.pairwise(bounds)])


class _Part:
    """One request for the bytes of the leaves from `start` to before `end`."""

    def __init__(self, http: Http, run: Run, start: int, end: int, deliver: Deliver) -> None:
        self._http, self._run, self._start, self._end, self._deliver = http, run, start, end, deliver

    async def fetch(self) -> None:
        first = self._run.leaves[self._start].offset
        last = self._run.leaves[self._end - 1]
        header = ("Range", f"bytes={first}-{last.offset + last.size - 1}")
        async with self._http.ask("GET", f"/ipfs/{cids.text(self._run.file)}", [header]) as answer:
            if answer.status != 206 or not answer.headers.get("content-range", "").startswith(f"bytes {first}-"):
                if answer.status != 200:
                    await answer.whole(ERROR_BODY)
                raise NotOffered(f"{self._http.origin.text} gives no ranges of files: status {answer.status}", STATUS)
            for index in range(self._start, self._end):
                await self._deliver(index, await answer.exactly(self._run.leaves[index].size))


async def by_car(http: Http, run: Run, deliver: Deliver) -> None:
    """A CAR of the range. Blocks that were not asked for are dropped; that some are missing is no error here.

    Raises NotOffered, SourceFailed."""
    first, last = run.leaves[0], run.leaves[-1]
    query = f"format=car&dag-scope=entity&entity-bytes={first.offset}:{max(first.offset, last.offset + last.size - 1)}"
    accept = ("Accept", f"{CAR_TYPE}; version=1; order=dfs; dups=n")
    wanted: dict[bytes, list[int]] = {}
    for index, leaf in enumerate(run.leaves):
        wanted.setdefault(cids.multihash(leaf.cid), []).append(index)
    room = 2 * sum(leaf.size for leaf in run.leaves) + (8 << 20)
    parser = Parser()
    async with http.ask("GET", f"/ipfs/{cids.text(run.file)}?{query}", [accept]) as answer:
        if answer.status != 200 or answer.content_type != CAR_TYPE:
            if answer.status != 200:
                await answer.whole(ERROR_BODY)
            raise NotOffered(f"{http.origin.text} gives no CAR: status {answer.status}, {answer.content_type or 'no type'}", STATUS)
        while wanted and (piece := await answer.some()):
            room -= len(piece)
            if room < 0:
                raise SourceFailed(f"{http.origin.text} sent far more than the blocks that were asked for", LONG)
            for cid, block in _parsed(parser, piece, http.origin.text):
                for index in wanted.pop(cids.multihash(cid), ()):
                    await deliver(index, block)


def _parsed(parser: Parser, piece: bytes, name: str) -> Sequence[tuple[Cid, bytes]]:
    try:
        return list(parser.feed(piece))
    except Malformed as exc:
        raise SourceFailed(f"{name} sent a broken CAR: {exc}", "car") from exc


async def by_blocks(get: Callable[[Cid], Awaitable[bytes]], run: Run, deliver: Deliver, connections: int) -> None:
    """One request per block, `connections` at a time. Blocks that are not there are left out."""
    left = iter(range(len(run.leaves)))

    async def work() -> None:
        for index in left:
            try:
                block = await get(run.leaves[index].cid)
            except NotHere:
                continue
            await deliver(index, block)

    await all_of([work] * min(connections, len(run.leaves)))


async def all_of(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Runs them side by side; the first failure cancels the others and is raised as it is, not in a group."""
    failure: BaseException | None = None

    async def one(call: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        nonlocal failure
        try:
            await call()
        except Exception as exc:
            failure = failure or exc
            scope.cancel()

    if len(calls) == 1:
        await calls[0]()
        return
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(one, call, nursery.cancel_scope)
    if failure is not None:
        raise failure
