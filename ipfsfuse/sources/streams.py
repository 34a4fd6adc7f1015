"""Streams of blocks, to iterate over while the source reads on.

    async with source.stream(wanted) as stream:
        async for delivery in stream:
            ...

A stream is a channel without a buffer: its source reads the next blocks while the receiver works on the last
ones, and then waits. In a stream with `alternate` the source does not read on before the receiver asks for
more, because both would only compete for Python's lock. Leaving the block ends the stream.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import groupby
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere
from ipfsfuse.structures import Buffer

T = TypeVar("T")

B = TypeVar("B", bound=Buffer)


def nothing() -> None:
    """The `release` of blocks that need none."""


class Delivery(NamedTuple):
    """Blocks of consecutive leaves. They are verified and written together, because a call in a thread costs
    60 us."""

    first: int
    """The index of the first of them in `LeafRange.leaves`."""
    blocks: Sequence[Buffer]
    release: Callable[[], None] = nothing
    """Must be called when the blocks are no longer needed: until then their source may wait. If it was not
    called, the end of the stream does the same."""


class Hashed(NamedTuple):
    """A block and its SHA-256, computed while the block was read, so that reading and hashing overlap. The
    pool compares the digest."""

    block: Buffer
    digest: bytes


BlockBatch = Sequence[tuple[Cid, Buffer | Hashed]]
"""Unverified blocks with the CIDs that their source claims, parents before children."""


class Send(Generic[T]):
    """The source's end of a stream."""

    def __init__(self, channel: trio.MemorySendChannel[T], asked: trio.Semaphore | None) -> None:
        self._channel, self._asked = channel, asked

    async def send(self, value: T) -> None:
        """Returns when `value` was received; with `alternate`, when the next value is asked for."""
        await self._channel.send(value)
        if self._asked is not None:
            await self._asked.acquire()


class Shifted(Send[Delivery]):
    """Sends deliveries of a range that begins at leaf `start` of a longer range."""

    def __init__(self, send: Send[Delivery], start: int) -> None:
        self._send, self._start = send, start

    async def send(self, value: Delivery) -> None:
        await self._send.send(value._replace(first=self._start + value.first))


class Receive(Generic[T]):
    """The receiver's end of a stream, to iterate over."""

    def __init__(self, channel: trio.MemoryReceiveChannel[T], asked: trio.Semaphore | None) -> None:
        self._channel, self._asked = channel, asked

    def __aiter__(self) -> "Receive[T]":
        return self

    async def __anext__(self) -> T:
        if self._asked is not None:
            self._asked.release()
        return await self._channel.__anext__()


Stream = AbstractAsyncContextManager[Receive[T]]


@asynccontextmanager
async def streaming(
    produce: Callable[[Send[T]], Awaitable[None]], *, alternate: bool = False
) -> AsyncIterator[Receive[T]]:
    """The stream of the values that `produce` sends. At its end, raises the exception of `produce`.
    Exceptions of `produce` and of the `with` block are raised unchanged, not in a group."""
    channel, receive = trio.open_memory_channel[T](0)
    asked = trio.Semaphore(0) if alternate else None
    failure: Exception | None = None

    async def run() -> None:
        nonlocal failure
        async with channel:
            try:
                if asked is not None:
                    await asked.acquire()
                await produce(Send(channel, asked))
            except Exception as exc:
                failure = exc

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        try:
            yield Receive(receive, asked)
        except Exception as exc:
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class Leases:
    """The parts of a bounded resource that the deliveries of one stream hold until they are released."""

    def __init__(self, give: Callable[[int], None]) -> None:
        """`give(size)` returns a part of the resource."""
        self._give = give
        self._unreleased: dict[int, int] = {}
        self._number = 0

    def take(self, size: int) -> Callable[[], None]:
        """Notes that a delivery holds `size`. Returns the delivery's `release`."""
        self._number = number = self._number + 1
        self._unreleased[number] = size
        return lambda: self._release(number)

    def _release(self, number: int) -> None:
        size = self._unreleased.pop(number, None)
        if size is not None:
            self._give(size)

    def close(self) -> None:
        """Returns the parts that were not released."""
        while self._unreleased:
            self._give(self._unreleased.popitem()[1])


def can_range(leaves: Sequence[Leaf]) -> bool:
    """Whether a range of the file's bytes can be cut into the blocks of these leaves: the leaves are raw and
    follow each other, and none is empty (HTTP has no empty ranges)."""
    end = leaves[0].offset
    for leaf in leaves:
        if leaf.offset != end or not leaf.size or cids.codec(leaf.cid) != cids.RAW:
            return False
        end += leaf.size
    return True


SEGMENT_BYTES = 4 << 20
"""The most bytes of leaves that one call reads, verifies or writes. A call in a thread costs 60 us of CPU."""
SEGMENT_LEAVES = 64
"""The most leaves of one call."""


def segments_of(leaves: Sequence[Leaf]) -> Iterator[tuple[int, Sequence[Leaf]]]:
    """Cuts `leaves` into segments, each for one call. Yields (index of the first, leaves) for each.

    The first segment has one leaf, the next two, and so on: so a reader gets the first leaf soon."""
    start, most = 0, 1
    while start < len(leaves):
        end, left = start, SEGMENT_BYTES
        while end < len(leaves) and end - start < most and (left := left - leaves[end].size) >= 0:
            end += 1
        end = max(end, start + 1)
        yield start, leaves[start:end]
        start, most = end, min(2 * most, SEGMENT_LEAVES)


def consecutive(found: Sequence[tuple[int, B]]) -> Iterator[tuple[int, Sequence[B]]]:
    """Splits blocks where leaves between them are missing. `found`: indexes of leaves with their blocks.
    Yields the index of the first leaf, and the blocks, of each part."""
    for _, part in groupby(enumerate(found), key=lambda each: each[1][0] - each[0]):
        rows = [row for _at, row in part]
        yield rows[0][0], [block for _index, block in rows]


async def send_singly(
    get: Callable[[Cid], Awaitable[bytes]], leaves: Sequence[Leaf], send: Send[Delivery], connections: int
) -> None:
    """Gets each block by a request of its own, `connections` at a time. Leaves out blocks that the source
    lacks."""
    indexes = iter(range(len(leaves)))

    async def work() -> None:
        for index in indexes:
            try:
                block = await get(leaves[index].cid)
            except NotHere:
                continue
            await send.send(Delivery(index, [block]))

    await all_of([work] * min(connections, len(leaves)))


class JobOrder:
    """Makes parallel tasks, each of which takes one job after the other, send their results in the order of
    the jobs."""

    def __init__(self) -> None:
        self._last = trio.Event()
        """Set when the result of the job that was taken last has been sent."""
        self._last.set()

    def take(self) -> "JobSlot":
        """The slot of the next job. Call it when a task takes the job."""
        before, self._last = self._last, trio.Event()
        return JobSlot(before, self._last)


class JobSlot:
    """An async context manager that begins when the results of the jobs before this one have been sent. If it
    fails, no later slot begins."""

    def __init__(self, before: trio.Event, sent: trio.Event) -> None:
        self._before, self._sent = before, sent

    async def __aenter__(self) -> None:
        await self._before.wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._sent.set()


async def all_of(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Runs `calls` in parallel. The first failure cancels the others and is raised unchanged, not in a
    group."""
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
