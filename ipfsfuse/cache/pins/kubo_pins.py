"""Our pins at Kubo nodes: in the background, each node is made to hold what is desired.

Content stays at a node while it stands in any mount's folder there (`mfs`); the node's own pins
are never looked at, so a pin that its user made is never touched. `add` and `remove` only change what is
desired. A task for each node follows in rounds. A node that is down or hangs makes that task wait, and nobody
else.

Nothing is kept on the disk: what is desired is known from what is staged here and what the user pinned, and
what a node has is read back from it, at the start, after each failure of the node, and once an hour.

A child that a node does not have does no harm there, so nothing needs to know which node a block came from.

Concurrency: one event loop. A node is spoken to by its task alone.
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
from ipfsfuse.cache.pins.mfs import PINNED, STAGED, Mfs, MfsPinFolder, NodeRpc
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.multihash import SHA2_256_PREFIX
from ipfsfuse.errors import IpfsFuseError, SourceFailed

log = logging.getLogger(__name__)

LINGER = 0.5
"""Seconds in which pins are collected for one batch."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
"""Seconds until a node that failed is asked again: doubling."""
FAREWELL = 2.0
"""Seconds that an ending mount gives the node."""
LOOKUPS_PER_TURN = 100
"""Small blocks that are looked for in the index before other calls have their turn: some milliseconds."""

REPAIRS_PER_ROUND = 100
"""Files that are repaired before what changed meanwhile has its turn."""


class KuboPins:
    """The pins at one node. They follow what is desired while `run` runs, from when `reconcile` was
    called."""

    def __init__(self, name: str, mfs: Mfs, mount_id: MountId) -> None:
        """`name` is the node's, for the log and for `Copies`."""
        self.name = name
        self._mfs = mfs
        self._folder = MfsPinFolder(mfs, mount_id)
        self._planners = {STAGED: BatchPlanner(), PINNED: BatchPlanner()}
        self._is_staged: Callable[[Cid], object]
        self._repair: BlockRepair
        self._read_back_due = -math.inf
        """When our folder must be read back (trio's clock); -inf while what the node has is not known."""
        self._released = False
        self._failing = ""
        self._changed, self._full, self._ready = (trio.Event() for _ in range(3))
        self._changed.set()  # to read back
        self._busy = trio.Lock()  # with the node
        self._tasks = trio.CancelScope()

    async def run(self) -> None:
        """Until it is cancelled: what is pinned then stays pinned for the next start."""
        try:
            with self._tasks:
                await self._follow()
        finally:
            with trio.move_on_after(FAREWELL, shield=True):
                await self._rest()

    # -- what is desired -------------------------------------------------------------------------------------

    def add(self, cid: Cid) -> None:
        self._want(STAGED, cid, True)

    def remove(self, cid: Cid) -> None:
        self._want(STAGED, cid, False)

    def state(self, cid: Cid) -> str:
        cid = cids.canonical(cid)
        pinned, staged = self._planners[PINNED].home(cid), self._planners[STAGED].home(cid)
        if pinned:
            return "user"
        if staged:
            return "cache"
        return "queued" if QUEUED in (pinned, staged) else ""

    def pin(self, cid: Cid) -> None:
        """The user pinned `cid`: it is held with all below it until `unpin`, whatever is staged."""
        self._want(PINNED, cid, True)

    def unpin(self, cid: Cid) -> None:
        self._want(PINNED, cid, False)

    def reconcile(
        self,
        staged: Iterable[Cid],
        pinned: Iterable[Cid],
        is_staged: Callable[[Cid], object],
        copies: Copies,
    ) -> None:
        """Called once, at the start: `staged` are the files that are staged, `pinned` is what the user
        pinned. What the node holds besides is released, unless `is_staged` (a small block). The node is given
        those `copies` that it has lost of what it holds."""
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
        """Lets go of everything, and follows no more: at the end of an isolated mount."""
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
        if cids.inline(cid) is not None:
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
            with trio.move_on_after(LINGER):
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
        except Exception as exc:  # also a bug: it may cost the pins, but not the mount
            self._failed(exc)
            return False
        if self._failing:
            log.info("%s takes pins again", self.name)
        self._failing = ""
        return True

    def _failed(self, error: Exception) -> None:
        """A node that fails is logged once, until it takes pins again."""
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
        if not await self._repair.give_back(self.state):
            self._changed.set()

    async def _do(self, prefix: str, planner: BatchPlanner, step: Round) -> None:
        self._repair.note(planner, step, everything=prefix == PINNED)
        try:
            await self._folder.write(prefix, step)
        except BaseException:
            planner.abandon()
            raise
        planner.finish()
        await self._folder.drop(prefix, step)

    async def _read_back(self) -> None:
        found = await self._folder.read_back(self._planners)
        planner = self._planners[STAGED]
        for number, cid in enumerate(found[STAGED]):
            if number % LOOKUPS_PER_TURN == 0:
                await trio.lowlevel.checkpoint()
            if planner.home(cid) is None and self._is_staged(cid):
                planner.add(cid)
        self._read_back_due = trio.current_time() + lease.RENEW

    async def _rest(self) -> None:
        if self._read_back_due > -math.inf and not self._released:
            try:
                await self._folder.sign(resting=True)
            except SourceFailed as exc:
                log.info("%s did not take the last renewal of this mount's lease: %s", self.name, exc)


class BlockRepair:
    """Gives blocks back to a node that has lost them, where what it is to hold hangs together by them.

    A mount asks a node for what it does not have itself. So after an eviction and a collection at the node it
    may ask for leaves alone, because it still has the blocks above them: held by a root that the node does
    not have, those would be collected. Each large file is looked after once, when it is linked anew. One task
    at a time."""

    def __init__(self, mfs: Mfs, copies: Copies, name: str) -> None:
        """`copies` of blocks that come from the node of that name, or are in packs."""
        self._mfs = mfs
        self._copies = copies
        self._name = name
        self._unsure: dict[Cid, None] = {}

    def note(self, planner: BatchPlanner, step: Round, *, everything: bool) -> None:
        """`step` is about to be done: what it links that no batch held may have been collected since it was
        fetched.

        Large files alone are looked after, or `everything`."""
        moved = {cid for number in step.drops for cid in planner.batches[number]}
        new = [cid for batch in step.writes for cid in batch.members if cid not in moved]
        self._unsure.update((cid, None) for cid in new if everything or self._copies.joins(cid))

    async def give_back(self, wanted: Callable[[Cid], object]) -> bool:
        """Repairs some of what was noted and is still `wanted`. Returns whether that was all."""
        for cid in list(islice(self._unsure, REPAIRS_PER_ROUND)):
            if wanted(cid):
                await self._give(cid)
            del self._unsure[cid]
        return not self._unsure

    async def _give(self, root: Cid) -> None:
        missing = [root]
        while missing:
            cid = missing.pop()
            if not cids.multihash(cid).startswith(SHA2_256_PREFIX) or await self._mfs.has(cid):
                continue
            try:
                found = await self._copies.copy(cid, self._name)
            except IpfsFuseError:  # nobody has it now
                continue
            if found is not None:
                await self._mfs.put(cid, found.block)
                missing += found.children


class NodePins:
    """Implements `Pins` over any number of nodes, or over none: each gets the same calls."""

    def __init__(self, nodes: Iterable[KuboPins]) -> None:
        self._nodes = list(nodes)
        self.anywhere = bool(self._nodes)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, rpcs: Mapping[str, Callable[[], NodeRpc]], mount_id: MountId, *, isolated: bool
    ) -> AsyncIterator["NodePins"]:
        """`rpcs`: the nodes' RPC APIs by the nodes' names. What is pinned stays pinned after the block, for
        the next start, unless the mount is `isolated`."""
        async with trio.open_nursery() as nursery:
            pins = cls(KuboPins(name, Mfs(rpc), mount_id) for name, rpc in rpcs.items())
            for node in pins._nodes:
                nursery.start_soon(node.run)
            try:
                yield pins
            finally:
                if isolated:
                    with trio.move_on_after(FAREWELL, shield=True):
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
        """That at the node which holds it most firmly."""
        states = {node.state(cid) for node in self._nodes}
        return next((state for state in ("user", "cache", "queued") if state in states), "")

    def pin(self, cid: Cid) -> None:
        """The user pinned `cid`."""
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
        """By node."""
        return {node.name: node.status() for node in self._nodes}
