"""Our pins at Kubo nodes: a task for each node makes it hold the desired CIDs, in the background.

A node keeps content while any mount's folder there links it (`mfs`). The node's own pins are never read or
changed, so a pin that its user made is safe. `add` and `remove` only change which CIDs are desired; the task
follows in rounds. A node that is down or hangs delays only its own task.

Nothing is stored on disk. The desired CIDs are those that are staged here or pinned by the user. The CIDs
that a node holds are read back from it at the start, after each failure of the node, and once an hour.

A link to a block that a node does not have does no harm there, so we need not know which node a block came
from.

Concurrency: one event loop. Only a node's own task talks to the node.
"""

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from itertools import islice

import trio

from ipfsfuse.cache.base import Copies, PinStatus
from ipfsfuse.cache.pins import batches, lease
from ipfsfuse.cache.pins.batches import QUEUED, BatchPlanner, Round
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.cache.pins.mfs import PINNED_PREFIX, STAGED_PREFIX, Mfs, MfsPinFolder, NodeRpc
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.multihash import SHA2_256_PREFIX
from ipfsfuse.errors import IpfsFuseError, SourceFailed

log = logging.getLogger(__name__)

COLLECT_SECONDS = 0.5
"""Seconds for which new pins are collected into one batch."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
"""Seconds until a node that failed is asked again. They double with each failure."""
CLOSING_SECONDS = 2.0
"""Seconds for the last requests to the node when the mount ends."""
LOOKUPS_PER_TURN = 100
"""Small blocks that are looked up in the index, which takes some milliseconds, before other tasks run."""

REPAIRS_PER_ROUND = 100
"""DAGs that are repaired before the next round of pins."""


class KuboPins:
    """The pins at one node. While `run` runs, and after `reconcile` was called, the node follows what is
    desired."""

    def __init__(self, name: str, mfs: Mfs, mount_id: MountId) -> None:
        """`name`: the node's name for the log and for `Copies`."""
        self.name = name
        self._mfs = mfs
        self._folder = MfsPinFolder(mfs, mount_id)
        self._planners = {STAGED_PREFIX: BatchPlanner(), PINNED_PREFIX: BatchPlanner()}
        self._is_staged: Callable[[Cid], object]
        self._repair: BlockRepair
        self._read_back_due = -math.inf
        """When our folder must be read back, on trio's clock; -inf while its content is not known."""
        self._released = False
        self._failing = ""
        self._changed, self._full, self._ready = (trio.Event() for _ in range(3))
        self._changed.set()  # so that the task reads back first
        self._busy = trio.Lock()  # for requests to the node
        self._tasks = trio.CancelScope()

    async def run(self) -> None:
        """Runs until it is cancelled. What is pinned then stays pinned for the next start."""
        try:
            with self._tasks:
                await self._follow()
        finally:
            with trio.move_on_after(CLOSING_SECONDS, shield=True):
                await self._end_lease()

    # -- what is desired -------------------------------------------------------------------------------------

    def add(self, cid: Cid) -> None:
        self._want(STAGED_PREFIX, cid, True)

    def remove(self, cid: Cid) -> None:
        self._want(STAGED_PREFIX, cid, False)

    def state(self, cid: Cid) -> str:
        cid = cids.canonical(cid)
        pinned, staged = self._planners[PINNED_PREFIX].home(cid), self._planners[STAGED_PREFIX].home(cid)
        if pinned:
            return "user"
        if staged:
            return "cache"
        return "queued" if QUEUED in (pinned, staged) else ""

    def pin(self, cid: Cid) -> None:
        """Holds `cid` and everything below it until `unpin`, for the user."""
        self._want(PINNED_PREFIX, cid, True)

    def unpin(self, cid: Cid) -> None:
        self._want(PINNED_PREFIX, cid, False)

    def reconcile(
        self,
        staged: Iterable[Cid],
        pinned: Iterable[Cid],
        is_staged: Callable[[Cid], object],
        copies: Copies,
    ) -> None:
        """Call it once at the start with the staged files and the user's pins. Other CIDs that the node holds
        for this mount are released, unless `is_staged` (small blocks). If the node has lost blocks of what it
        holds, it gets them from `copies`."""
        self._is_staged = is_staged
        self._repair = BlockRepair(self._mfs, copies, self.name)
        for cid in staged:
            self.add(cid)
        for cid in pinned:
            self.pin(cid)
        self._ready.set()

    def status(self) -> PinStatus:
        planners = self._planners.values()
        queued = sum(planner.queued for planner in planners)
        held, count = sum(map(len, planners)) - queued, sum(len(planner.batches) for planner in planners)
        return PinStatus(held, queued, count, self._mfs.requests, self._folder.path, self._failing)

    async def release_all(self) -> None:
        """Releases everything and stops, at the end of an isolated mount."""
        self._released = True
        self._tasks.cancel()
        async with self._busy:
            try:
                await self._folder.release()
            except SourceFailed as exc:
                message = "%s still holds what this mount had staged, until a later mount releases it: %s"
                log.warning(message, self.name, exc)

    def _want(self, prefix: str, cid: Cid, wanted: bool) -> None:
        cid = cids.canonical(cid)
        if cids.inline_block(cid) is not None:
            return
        planner = self._planners[prefix]
        if planner.add(cid) if wanted else planner.remove(cid):
            self._changed.set()
            if planner.queued >= batches.MAX_MEMBERS:
                self._full.set()

    # -- the task --------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        await self._ready.wait()
        wait = FIRST_WAIT
        while True:
            with trio.CancelScope(deadline=self._read_back_due):
                await self._changed.wait()
            with trio.move_on_after(COLLECT_SECONDS):
                await self._full.wait()
            self._changed, self._full = trio.Event(), trio.Event()
            if await self._try_round():
                wait = FIRST_WAIT
            else:
                self._changed.set()
                await trio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    async def _try_round(self) -> bool:
        try:
            async with self._busy:
                await self._round()
        except Exception as exc:  # a bug too: it may cost the pins, but must not end the mount
            self._failed(exc)
            return False
        if self._failing:
            log.info("%s takes pins again", self.name)
        self._failing = ""
        return True

    def _failed(self, error: Exception) -> None:
        """Notes that the node failed. Logs it once, until the node takes pins again."""
        if not self._failing:
            bug = None if isinstance(error, IpfsFuseError) else error
            log.warning("pins wait until %s takes them: %s", self.name, error, exc_info=bug)
        self._failing, self._read_back_due = str(error) or repr(error), -math.inf

    async def _round(self) -> None:
        if trio.current_time() >= self._read_back_due or not self._folder.is_current:
            await self._read_back()
        for prefix, planner in self._planners.items():
            while step := planner.begin():
                await self._do(prefix, planner, step)
                if max(map(len, step)) < batches.MAX_PER_ROUND:
                    break
        if not await self._repair.repair(self.state):
            self._changed.set()

    async def _do(self, prefix: str, planner: BatchPlanner, step: Round) -> None:
        self._repair.note(planner, step, everything=prefix == PINNED_PREFIX)
        try:
            await self._folder.write(prefix, step)
        except BaseException:
            planner.abandon()
            raise
        planner.finish()
        await self._folder.drop(prefix, step)

    async def _read_back(self) -> None:
        found = await self._folder.read_back(self._planners)
        planner = self._planners[STAGED_PREFIX]
        for number, cid in enumerate(found[STAGED_PREFIX]):
            if number % LOOKUPS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            if planner.home(cid) is None and self._is_staged(cid):
                planner.add(cid)
        self._read_back_due = trio.current_time() + lease.RENEW

    async def _end_lease(self) -> None:
        if self._read_back_due > -math.inf and not self._released:
            try:
                await self._folder.renew_lease(resting=True)
            except SourceFailed as exc:
                log.info("%s did not take the last renewal of this mount's lease: %s", self.name, exc)


class BlockRepair:
    """Gives blocks that we have copies of back to a node that has lost them, so that it can hold what is
    below.

    A mount asks a node only for blocks that it does not have itself. After an eviction here and a garbage
    collection at the node, it may ask for a file's leaves only, because it still has the blocks above them.
    The node would link the file's root, but without the root's block it would collect the leaves. Each large
    file is repaired once, when a batch links it for the first time. One task at a time."""

    def __init__(self, mfs: Mfs, copies: Copies, name: str) -> None:
        """`name`: the node's name for `copies`."""
        self._mfs = mfs
        self._copies = copies
        self._name = name
        self._unchecked: dict[Cid, None] = {}

    def note(self, planner: BatchPlanner, step: Round, *, everything: bool) -> None:
        """Notes the CIDs that `step` links and no batch linked before: the node may have collected their
        blocks. Only roots of large files are noted, or all CIDs with `everything`."""
        moved = {cid for number in step.drops for cid in planner.batches[number]}
        new = [cid for batch in step.writes for cid in batch.members if cid not in moved]
        self._unchecked.update((cid, None) for cid in new if everything or self._copies.is_file_root(cid))

    async def repair(self, wanted: Callable[[Cid], object]) -> bool:
        """Repairs some of the noted CIDs that are still `wanted`. Returns whether none is left."""
        for cid in list(islice(self._unchecked, REPAIRS_PER_ROUND)):
            if wanted(cid):
                await self._repair_dag(cid)
            del self._unchecked[cid]
        return not self._unchecked

    async def _repair_dag(self, root: Cid) -> None:
        missing = [root]
        while missing:
            cid = missing.pop()
            if not cids.multihash(cid).startswith(SHA2_256_PREFIX) or await self._mfs.has(cid):
                continue
            try:
                found = await self._copies.copy(cid, self._name)
            except IpfsFuseError:  # it can't be read now
                continue
            if found is not None:
                await self._mfs.put(cid, found.block)
                missing += found.children


class NodePins:
    """Implements `Pins` for any number of nodes, also for none. Each node gets the same calls."""

    def __init__(self, nodes: Iterable[KuboPins]) -> None:
        self._nodes = list(nodes)
        self.anywhere = bool(self._nodes)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, rpcs: Mapping[str, Callable[[], NodeRpc]], mount_id: MountId, *, isolated: bool
    ) -> AsyncIterator["NodePins"]:
        """`rpcs`: the RPC API of each node, by name. What is pinned stays pinned after the `async with`
        block, for the next start, unless the mount is `isolated`."""
        async with trio.open_nursery() as nursery:
            pins = cls(KuboPins(name, Mfs(rpc), mount_id) for name, rpc in rpcs.items())
            for node in pins._nodes:
                nursery.start_soon(node.run)
            try:
                yield pins
            finally:
                if isolated:
                    with trio.move_on_after(CLOSING_SECONDS, shield=True):
                        async with trio.open_nursery() as releasing:
                            for node in pins._nodes:
                                releasing.start_soon(node.release_all)
                nursery.cancel_scope.cancel()

    def add(self, cid: Cid) -> None:
        for node in self._nodes:
            node.add(cid)

    def remove(self, cid: Cid) -> None:
        for node in self._nodes:
            node.remove(cid)

    def state(self, cid: Cid) -> str:
        """The strongest state that any node has for `cid`."""
        states = {node.state(cid) for node in self._nodes}
        return next((state for state in ("user", "cache", "queued") if state in states), "")

    def pin(self, cid: Cid) -> None:
        """Holds `cid` at each node until `unpin`."""
        for node in self._nodes:
            node.pin(cid)

    def unpin(self, cid: Cid) -> None:
        for node in self._nodes:
            node.unpin(cid)

    def reconcile(
        self, staged: Iterable[Cid], pinned: Iterable[Cid], is_staged: Callable[[Cid], object], copies: Copies
    ) -> None:
        """Calls `KuboPins.reconcile` of each node."""
        files, roots = list(staged), list(pinned)
        for node in self._nodes:
            node.reconcile(files, roots, is_staged, copies)

    def status(self) -> dict[str, PinStatus]:
        """The status of each node, by name."""
        return {node.name: node.status() for node in self._nodes}
