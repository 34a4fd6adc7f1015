"""Consecutive leaves of a file, read in stretches or block by block; and calls that run side by side.

Concurrency: each call runs its own few requests; a slow `deliver` slows them down.
"""

from collections.abc import Awaitable, Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.fileio.buffers import together
from ipfsfuse.sources.base import Block, Deliver, Run

DELIVERED_AT_ONCE = 2
"""Stretches of one request that are being proved and written while the next one is read."""


def can_range(leaves: Sequence[Leaf]) -> bool:
    """Whether the leaves' contents are their blocks (raw) and follow each other, so that bytes can be cut
    into blocks.

    Not of leaves that claim no bytes: no range has none, and a server's word about such a one would be no
    word about ranges."""
    end = leaves[0].offset
    for leaf in leaves:
        if leaf.offset != end or not leaf.size or cids.codec(leaf.cid) != cids.RAW:
            return False
        end += leaf.size
    return True


Read = Callable[[Sequence[Leaf]], Awaitable[tuple[Sequence[Block], Callable[[], None]]]]
"""Gives the blocks of leaves, or of the first of them, and what is to be called once nobody needs them any
more."""


async def in_stretches(leaves: Sequence[Leaf], read: Read, deliver: Deliver) -> None:
    """Reads some leaves, while the ones before are delivered: proved and written in worker threads. Raises
    what they raise."""
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


async def by_blocks(
    get: Callable[[Cid], Awaitable[bytes]], run: Run, deliver: Deliver, connections: int
) -> None:
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
