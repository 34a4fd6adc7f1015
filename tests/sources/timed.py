"""Sources whose answers come exactly when a test says."""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import trio
from trio.testing import MockClock

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.base import Fetched, LeafRange, Subtree
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.streams import BlockBatch, Delivery, Send, Stream, streaming
from tests.sources.content import raw_blocks

BLOCKS = raw_blocks(3, 200)
CID, BLOCK = next(iter(BLOCKS.items()))
Answer = Callable[[Cid], Awaitable[bytes]]


class Timed:
    """A network source whose answers come, or fail, exactly when the test says, by the mock clock. A real
    server can't be that exact."""

    in_place = False

    def __init__(
        self, name: str, answer: Answer | None = None, blocks: dict[Cid, bytes] | None = None
    ) -> None:
        self.name = name
        self.blocks = BLOCKS if blocks is None else blocks
        self.answer = answer
        self.asked: list[float] = []
        self.cancelled = 0
        self.subtrees: list[Subtree] = []

    async def get(self, cid: Cid) -> bytes:
        self.asked.append(trio.current_time())
        try:
            if self.answer is not None:
                return await self.answer(cid)
            await trio.lowlevel.checkpoint()
            return self.block(cid)
        except trio.Cancelled:
            self.cancelled += 1
            raise

    def block(self, cid: Cid) -> bytes:
        if cid not in self.blocks:
            raise NotHere(f"{self.name} does not have it")
        return self.blocks[cid]

    def stream(self, wanted: LeafRange) -> Stream[Delivery]:
        return streaming(partial(self.send_leaves, wanted))

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        for index, leaf in enumerate(wanted.leaves):
            try:
                await send.send(Delivery(index, [await self.get(leaf.cid)]))
            except NotHere:
                continue

    def subtree(self, subtree: Subtree) -> Stream[BlockBatch]:
        """Sends all its blocks in order, one at a time."""
        self.subtrees.append(subtree)
        return streaming(self.send_subtree)

    async def send_subtree(self, send: Send[BlockBatch]) -> None:
        for cid in self.blocks:
            await send.send([(cid, await self.get(cid))])

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        pass


class InPlace(Timed):
    in_place = True


async def never(_cid: Cid) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def fails(_cid: Cid) -> bytes:
    raise SourceFailed("it is down", "connect")


def after(seconds: float) -> Answer:
    async def answer(cid: Cid) -> bytes:
        await trio.sleep(seconds)
        return BLOCKS[cid]

    return answer


def pool_of(
    *sources: Timed, offline: bool = False, deadline: float = 30.0, asleep: Callable[[], float] = lambda: 0.0
) -> SourcePool:
    return SourcePool(sources, offline=offline, deadline=deadline, rng=random.Random(1), asleep=asleep)


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


class Takes:
    """Wants all blocks, or those for which `wants` returns True, and keeps those that come (implements
    `sources.base.Wanted`)."""

    def __init__(self, wants: Callable[[Cid], bool] = lambda _cid: True) -> None:
        self.wants = wants
        self.seen: list[Cid] = []
        self.got: dict[Cid, Fetched] = {}

    @property
    def blocks(self) -> dict[Cid, bytes]:
        return {cid: fetched.block for cid, fetched in self.got.items()}

    def came(self, cid: Cid, block: bytes) -> None:
        self.seen.append(cid)

    async def take(self, blocks: Mapping[Cid, Fetched]) -> None:
        assert not self.got.keys() & blocks.keys()
        assert list(blocks) == self.seen[len(self.got) : len(self.got) + len(blocks)]
        self.got.update(blocks)
