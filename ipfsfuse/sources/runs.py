"""Ways to fetch consecutive leaves of a file over HTTP: a range of its own bytes, a CAR of it, block by block; and the
blocks of a directory by a CAR.

Each delivers what it gets, unverified, and returns how far it came by what it delivered; the caller picks by what is
faster for its server. Concurrency: each call runs its own few requests; a slow `deliver` slows them down.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.carstream import Parser
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import Malformed, NotHere, SourceFailed
from ipfsfuse.fileio.buffers import together
from ipfsfuse.sources.base import Block, Deliver, DeliverBlocks, Run, Subtree
from ipfsfuse.sources.web.answer import ERROR_BODY, Answer
from ipfsfuse.sources.web.failures import LONG, STATUS
from ipfsfuse.sources.web.http import Http
from ipfsfuse.sources.web.refusals import UNLIKE, declined

CAR_TYPE = "application/vnd.ipld.car"
DELIVERED_AT_ONCE = 2
"""Stretches of one request that are being proved and written while the next one is read."""
SECTIONS = 1000
"""Sections of a CAR that are parsed and handed on in one step of the event loop."""
RANGE_PART = 16 << 20
"""A range is cut into requests of at least so many bytes."""


class NotOffered(SourceFailed):
    """The server does not do it this way: another way may work, so nothing is wrong with its health."""


def can_range(leaves: Sequence[Leaf]) -> bool:
    """Whether the leaves' contents are their blocks (raw) and follow each other, so that bytes can be cut into blocks.

    Not of leaves that claim no bytes: no range has none, and a server's word about such a one would be no word about ranges."""
    end = leaves[0].offset
    for leaf in leaves:
        if leaf.offset != end or not leaf.size or cids.codec(leaf.cid) != cids.RAW:
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
            if answer.status == 206 and not answer.headers.get("content-range", "").startswith(f"bytes {first}-"):
                raise NotOffered(f"{self._http.origin.text} gives another range than was asked for", STATUS)
            if answer.status != 206:
                raise await _unlike(self._http, answer, self._run.file, "ranges of files")
            await self._take(answer)

    async def _take(self, answer: Answer) -> None:
        async def read(leaves: Sequence[Leaf]) -> tuple[Sequence[Block], Callable[[], None]]:
            return await answer.each([leaf.size for leaf in leaves]), answer.detach()

        async def deliver(index: int, blocks: Sequence[Block]) -> None:
            await self._deliver(self._start + index, blocks)

        await in_stretches(self._run.leaves[self._start : self._end], read, deliver)


Read = Callable[[Sequence[Leaf]], Awaitable[tuple[Sequence[Block], Callable[[], None]]]]
"""Gives the blocks of leaves, or of the first of them, and what is to be called once nobody needs them any more."""


async def in_stretches(leaves: Sequence[Leaf], read: Read, deliver: Deliver) -> None:
    """Reads some leaves, while the ones before are delivered: proved and written in worker threads. Raises what they raise."""
    free, failed = trio.Semaphore(DELIVERED_AT_ONCE), list[Exception]()

    async def give(index: int, blocks: Sequence[Block], let_go: Callable[[], None]) -> None:
        try:
            await deliver(index, blocks)
        except Exception as exc:
            failed.append(exc)
            nursery.cancel_scope.cancel()
        finally:
            let_go()
            free.release()

    async with trio.open_nursery() as nursery:
        try:
            for index, sizes in together([leaf.size for leaf in leaves]):
                blocks, let_go = await read(leaves[index : index + len(sizes)])
                try:
                    await free.acquire()
                except trio.Cancelled:
                    let_go()
                    raise
                nursery.start_soon(give, index, blocks, let_go)
        except SourceFailed as exc:
            failed.append(exc)
    if failed:
        raise failed[0]


async def by_car(http: Http, run: Run, deliver: Deliver) -> None:
    """A CAR of the range. Blocks that were not asked for are dropped; that some are missing is no error here.

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

    room = 2 * sum(leaf.size for leaf in run.leaves) + (8 << 20)
    if await _car(http, run.file, scope, room, take):
        raise SourceFailed(f"{http.origin.text} sent far more than the blocks that were asked for", LONG)


async def by_subtree(http: Http, subtree: Subtree, deliver: DeliverBlocks) -> None:
    """A CAR of a directory, up to its limit of bytes; where it is cut short, that is no error here.

    Raises NotOffered, NotHere, SourceFailed."""

    async def take(blocks: Sequence[tuple[Cid, bytes]]) -> bool:
        await deliver(blocks)
        return True

    await _car(http, subtree.root, f"dag-scope={'all' if subtree.whole else 'entity'}", subtree.limit, take)


async def _car(http: Http, root: Cid, scope: str, room: int, take: Callable[[Sequence[tuple[Cid, bytes]]], Awaitable[bool]]) -> bool:
    """Gives the blocks that each piece completes to `take` until that returns False, or the stream ends. True if it was longer than `room` bytes."""
    accept = ("Accept", f"{CAR_TYPE}; version=1; order=dfs; dups=n")
    parser = Parser()
    async with http.ask("GET", f"/ipfs/{cids.text(root)}?format=car&{scope}", [accept]) as answer:
        if answer.status != 200 or answer.content_type != CAR_TYPE:
            raise await _unlike(http, answer, root, "CARs")
        while piece := await answer.some():
            room -= len(piece)
            for blocks in _parsed(parser, piece, http.origin.text):
                if not await take(blocks):
                    return False
                await trio.lowlevel.checkpoint()
            if room < 0:
                return True
    return False


async def _unlike(http: Http, answer: Answer, root: Cid, what: str) -> NotHere | SourceFailed:
    """What an answer that holds no `what` means."""
    name = http.origin.text
    if answer.status == 200:
        return NotOffered(f"{name} gives no {what}: {answer.content_type or 'no type'}", STATUS)
    if answer.status in UNLIKE:
        await answer.whole(ERROR_BODY)
        return NotOffered(f"{name} gives no {what}: status {answer.status}", STATUS)
    return await declined(name, answer, cids.text(root))


def _parsed(parser: Parser, piece: bytes, name: str) -> Iterator[Sequence[tuple[Cid, bytes]]]:
    """The blocks that `piece` completes, a few milliseconds' worth at a time: a section can have 5 bytes."""
    found = parser.feed(piece)
    try:
        while blocks := list(itertools.islice(found, SECTIONS)):
            yield blocks
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
            await deliver(index, [block])

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
