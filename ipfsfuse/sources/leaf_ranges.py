"""Ways to read consecutive leaves of a file: in stretches or block by block; and tasks that run side by side.

A slow `deliver` slows the requests down.
"""

from collections.abc import Awaitable, Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.fileio.buffers import together
from ipfsfuse.sources.base import Block, Deliver, LeafRange

DELIVERED_AT_ONCE = 2
"""Stretches of one request that are verified and written while the next one is read."""


def can_range(leaves: Sequence[Leaf]) -> bool:
    """Whether the bytes of the file can be cut into the blocks of these leaves: the leaves are raw, follow
    each other, and none is empty (there is no empty range in HTTP)."""
    end = leaves[0].offset
    for leaf in leaves:
        if leaf.offset != end or not leaf.size or cids.codec(leaf.cid) != cids.RAW:
            return False
        end += leaf.size
    return True


Read = Callable[[Sequence[Leaf]], Awaitable[tuple[Sequence[Block], Callable[[], None]]]]
"""Returns the blocks of leaves, or of the first of them, and a function to be called when they are not
needed any more."""


async def in_stretches(leaves: Sequence[Leaf], read: Read, deliver: Deliver) -> None:
    """Reads the next stretch while those before are delivered (verified and written in worker threads).
    Raises what `read` and `deliver` raise."""
    free, failed = trio.Semaphore(DELIVERED_AT_ONCE), list[Exception]()

    async def give(index: int, blocks: Sequence[Block], release: Callable[[], None]) -> None:
        try:
            await deliver(index, blocks)
        except Exception as exc:
            failed.append(exc)
            nursery.cancel_scope.cancel()
        finally:
            release()
            free.release()

    async with trio.open_nursery() as nursery:
        try:
            for index, sizes in together([leaf.size for leaf in leaves]):
                blocks, release = await read(leaves[index : index + len(sizes)])
                try:
                    await free.acquire()
                except trio.Cancelled:
                    release()
                    raise
                nursery.start_soon(give, index, blocks, release)
        except SourceFailed as exc:
            failed.append(exc)
    if failed:
        raise failed[0]


async def by_blocks(
    get: Callable[[Cid], Awaitable[bytes]], wanted: LeafRange, deliver: Deliver, connections: int
) -> None:
    """One request per block, `connections` at a time. Blocks that the source lacks are left out."""
    indexes = iter(range(len(wanted.leaves)))

    async def work() -> None:
        for index in indexes:
            try:
                block = await get(wanted.leaves[index].cid)
            except NotHere:
                continue
            await deliver(index, [block])

    await all_of([work] * min(connections, len(wanted.leaves)))


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
