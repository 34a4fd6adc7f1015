"""A Kubo node whose repository is on this machine: what that holds is read there, the rest is the node's to
find.

A block costs 0.1 ms so, and the node nothing; over its gateway port 1 ms of its time and ours. The node still
keeps it: what is read is pinned as if it had sent it. Concurrency: as every source; files are read in worker
threads.
"""

from collections.abc import Callable, Sequence

import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.fileio import threads
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Block, Deliver, DeliverBlocks, Run, Subtree
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http_settings import HttpSettings
from ipfsfuse.sources.local.kubo_repo import Flatfs, RepoWalk

STRETCHES = 8
"""Of leaves that may be in memory at a time, for all readers: of 4 MiB each."""
THREADS = 4


class LocalKubo(Kubo):
    def __init__(self, name: str, settings: HttpSettings, blocks: Flatfs, *, offline: bool = False) -> None:
        super().__init__(name, settings, offline=offline)
        self._blocks = blocks
        self._room = trio.Semaphore(STRETCHES)
        self._threads = trio.CapacityLimiter(THREADS)

    async def get(self, cid: Cid) -> bytes:
        block = await threads.run_sync(self._blocks.read, cid, limiter=self._threads)
        return block if block is not None else await super().get(cid)

    async def stream(self, run: Run, deliver: Deliver) -> None:
        wanted = [leaf.cid for leaf in run.leaves]
        if await threads.run_sync(self._blocks.have, wanted, limiter=self._threads):
            await runs.in_stretches(run.leaves, self._read_leaves, deliver)
        else:
            await super().stream(run, deliver)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        """Of the many small nodes of a listing the node makes one answer sooner than they are found here."""
        if not subtree.whole or not await self._all_below(subtree, deliver):
            await super().subtree(subtree, deliver)

    async def _all_below(self, subtree: Subtree, deliver: DeliverBlocks) -> bool:
        """Delivers what the repository has, as far as the limit goes. Whether that is all."""
        walk = RepoWalk(self._blocks.read_some, subtree.root, subtree.limit)
        while blocks := await threads.run_sync(walk.next_blocks, limiter=self._threads):
            await deliver(blocks)
        return not walk.incomplete

    async def _read_leaves(self, leaves: Sequence[Leaf]) -> tuple[Sequence[Block], Callable[[], None]]:
        await self._room.acquire()
        try:
            blocks = await threads.run_sync(self._blocks.read_each, leaves, limiter=self._threads)
        except BaseException:
            self._room.release()
            raise
        return blocks, self._room.release
