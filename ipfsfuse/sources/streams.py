"""Streams of blocks: what a source sends, to iterate over while it reads on.

    async with source.stream(wanted) as stream:
        async for delivery in stream:
            ...

A stream is a channel without a buffer: its source reads the next blocks while the last ones are worked on,
and then waits. In a stream with `turns` it waits until it is asked for the next ones: reading them would only
take Python's lock from those who work on the last ones. Leaving the block ends the stream.
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

T = TypeVar("T")

Block = bytes | memoryview
B = TypeVar("B", bound=Block)


def nothing() -> None:
    """For what needs no release."""


class Delivery(NamedTuple):
    """Blocks of consecutive leaves, which are verified and written together: a call in a thread costs 60
    us."""

    first: int
    """The index of the first of them in `LeafRange.leaves`."""
    blocks: Sequence[Block]
    release: Callable[[], None] = nothing
    """To be called when the blocks are not needed any more. Until then their source may wait. It is called
    for whoever does not when the stream ends."""


class Hashed(NamedTuple):
    """A block as it was read, and its SHA-256, which was taken meanwhile: what the disk still reads and what
    is hashed overlap. Whether that is the digest wanted is for the pool to say."""

    block: bytes
    digest: bytes


Blocks = Sequence[tuple[Cid, bytes | Hashed]]
"""Blocks with their CIDs as their source claims them, parents before children."""


class Send(Generic[T]):
    """The source's end of a stream."""

    def __init__(self, channel: trio.MemorySendChannel[T], turn: trio.Semaphore | None) -> None:
        self._channel, self._turn = channel, turn

    async def send(self, value: T) -> None:
        """Returns when `value` was received, and with turns when the next one is asked for."""
        await self._channel.send(value)
        if self._turn is not None:
            await self._turn.acquire()


class Shifted(Send[Delivery]):
    """For who sends the leaves from `start` on of a longer range."""

    def __init__(self, send: Send[Delivery], start: int) -> None:
        self._send, self._start = send, start

    async def send(self, value: Delivery) -> None:
        await self._send.send(value._replace(first=self._start + value.first))


class Receive(Generic[T]):
    """What a stream sends, to iterate over."""

    def __init__(self, channel: trio.MemoryReceiveChannel[T], turn: trio.Semaphore | None) -> None:
        self._channel, self._turn = channel, turn

    def __aiter__(self) -> "Receive[T]":
        return self

    async def __anext__(self) -> T:
        if self._turn is not None:
            self._turn.release()
        return await self._channel.__anext__()


Stream = AbstractAsyncContextManager[Receive[T]]


@asynccontextmanager
async def streaming(
    produce: Callable[[Send[T]], Awaitable[None]], *, turns: bool = False
) -> AsyncIterator[Receive[T]]:
    """The stream of what `produce` sends. At its end it raises what `produce` raised. That, and what is
    raised in the block, leaves as it is, not in a group."""
    channel, receive = trio.open_memory_channel[T](0)
    turn = trio.Semaphore(0) if turns else None
    failure: Exception | None = None

    async def run() -> None:
        nonlocal failure
        async with channel:
            try:
                if turn is not None:
                    await turn.acquire()
                await produce(Send(channel, turn))
            except Exception as exc:
                failure = exc

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        try:
            yield Receive(receive, turn)
        except Exception as exc:
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class Leases:
    """What the deliveries of one stream take of something that is bounded, until they are released."""

    def __init__(self, give: Callable[[int], None]) -> None:
        """`give` gives back so much of it."""
        self._give = give
        self._unreleased: dict[int, int] = {}
        self._number = 0

    def take(self, size: int) -> Callable[[], None]:
        """`size` was taken for a delivery. Returns its `release`."""
        self._number = number = self._number + 1
        self._unreleased[number] = size
        return lambda: self._release(number)

    def _release(self, number: int) -> None:
        size = self._unreleased.pop(number, None)
        if size is not None:
            self._give(size)

    def close(self) -> None:
        """Gives back what was not released."""
        while self._unreleased:
            self._give(self._unreleased.popitem()[1])


def can_range(leaves: Sequence[Leaf]) -> bool:
    """Whether the bytes of the file can be cut into the blocks of these leaves: the leaves are raw, follow
    each other, and none is empty (there is no empty range in HTTP)."""
    end = leaves[0].offset
    for leaf in leaves:
        if leaf.offset != end or not leaf.size or cids.codec(leaf.cid) != cids.RAW:
            return False
        end += leaf.size
    return True


def consecutive(found: Sequence[tuple[int, B]]) -> Iterator[tuple[int, Sequence[B]]]:
    """`found`, the indexes of some leaves with their blocks, cut into blocks of consecutive leaves: the index
    of the first, and the blocks."""
    for _, run in groupby(enumerate(found), key=lambda each: each[1][0] - each[0]):
        rows = [row for _at, row in run]
        yield rows[0][0], [block for _index, block in rows]


async def send_singly(
    get: Callable[[Cid], Awaitable[bytes]], leaves: Sequence[Leaf], send: Send[Delivery], connections: int
) -> None:
    """One request per block, `connections` at a time. Blocks that the source lacks are left out."""
    indexes = iter(range(len(leaves)))

    async def work() -> None:
        for index in indexes:
            try:
                block = await get(leaves[index].cid)
            except NotHere:
                continue
            await send.send(Delivery(index, [block]))

    await all_of([work] * min(connections, len(leaves)))


class Turns:
    """Lets tasks that take one job after the other send what they made in the order of the jobs."""

    def __init__(self) -> None:
        self._last = trio.Event()
        """Set when the job that was taken last has been sent."""
        self._last.set()

    def take(self) -> "Turn":
        """The turn of the next job: call it when the job is taken."""
        before, self._last = self._last, trio.Event()
        return Turn(before, self._last)


class Turn:
    """A block that begins when the jobs before this one have been sent. What failed lets no other begin."""

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
    """Runs `calls` side by side. The first failure cancels the others and is raised as it is, not in a
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
