"""Reading through the cache: from the disk, from a fetch under way, or from the sources.

Concurrency: every method may be called by many tasks at once. Of all who want one block one fetch serves all,
and belongs to none of them (see `flights`). A fetch ends when its block is staged, or was found not to be.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import trio

from ipfsfuse.cache.arrival import Arrival, adjoin, content_of, of_leaf
from ipfsfuse.cache.base import Arrived, Content, FileRef, Seen
from ipfsfuse.cache.flights import Flights, Ride
from ipfsfuse.cache.keys import block_key, cid_of, leaf_key, spelled
from ipfsfuse.cache.readback import read_back
from ipfsfuse.cache.store.disk import SMALL
from ipfsfuse.cache.store.store import Store
from ipfsfuse.cache.taking import Taking
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.sources.base import Block, Blocks, Fetched, Run, Source, Subtree

FEW = 4
"""So many blocks that are asked for one by one cost less than one answer with all of a directory's."""
PATIENCE = 1 / 3
"""Part of the deadline that one such answer may take: who waits for a block of it has the rest to get that
elsewhere."""
OF_BUDGET = 4
"""The largest part of the budget, as a divisor, that one answer may fill: what comes must not push itself
out."""
AT_ONCE = 2000
"""Blocks of one answer that are registered in one step of the event loop: some 10 ms."""
SIDE_BY_SIDE = 4
"""Leaves that one `ahead` takes from elsewhere than a run at a time."""

MAX_BEHIND = 4 << 20
"""Bytes that readers may have been given and that are not written yet: more would let a fast source outrun a
slow disk."""


class WriteBehind:
    """What is kept behind the readers who have it already, within a bound."""

    def __init__(self) -> None:
        self._bytes = 0

    async def keep(
        self, size: int, give: Callable[[], None] | None, keep: Callable[[], Awaitable[None]]
    ) -> None:
        """Awaits `keep()`, of `size` bytes. Before, where the bound allows, it calls `give`, if that is asked
        for. Then nothing cancels the keeping any more: what was read is kept, even if the mount ends
        meanwhile."""
        if give is None or self._bytes + size > MAX_BEHIND:
            await keep()
            return
        self._bytes += size
        give()
        try:
            with trio.CancelScope(shield=True):
                await keep()
        finally:
            self._bytes -= size


class Reading:
    """Blocks and leaves, as `Cache` says."""

    def __init__(self, store: Store, blocks: Blocks, nursery: trio.Nursery, deadline: float) -> None:
        self.store = store
        self.hits = 0
        self.misses = 0
        self._blocks = blocks
        self._patience = deadline * PATIENCE
        self._behind = WriteBehind()
        self._flights: Flights[bytes, Arrival] = Flights(
            nursery, deadline, name=spelled, cause=lambda key: blocks.said(cid_of(key))
        )

    # -- blocks ----------------------------------------------------------------------------------------------

    async def block(self, cid: Cid) -> bytes:
        """As `Cache.block`."""
        carried = cids.known(cid)
        if carried is not None:
            return carried
        kept = await self.store.block(cid)
        if kept is not None:
            self.hits += 1
            return kept
        arrival = await self._flights.join(block_key(cid), lambda: self._bring_block(cid))
        return arrival.content if isinstance(arrival.content, bytes) else bytes(arrival.content)

    async def _bring_block(self, cid: Cid) -> Arrival:
        """A block that is in no pack: a staged raw file, or fetched."""
        own = cids.canonical(cid)
        if cids.codec(cid) == cids.RAW and (entry := self.store.staging.entries.get(own)) is not None:
            content = await self.store.leaf(FileRef(own, entry.size), Leaf(cid, 0, entry.size))
            if content is not None:
                self.hits += 1
                return Arrival(content, None, False)
        return (await self._arrive({cid: await self._blocks.get(cid)}))[cid]

    async def _arrive(self, blocks: Mapping[Cid, Fetched]) -> Mapping[Cid, Arrival]:
        """Blocks that came together, staged: a large raw one as a file, those that packs hold by few
        writes."""
        self.misses += len(blocks)
        to_stage = {cid: of for cid, of in blocks.items() if not of.source.in_place}
        files = {
            cid: of for cid, of in to_stage.items() if cids.codec(cid) == cids.RAW and len(of.block) > SMALL
        }
        if len(to_stage) > len(files):
            await self.store.keep_blocks((cid, of.block) for cid, of in to_stage.items() if cid not in files)
        for cid, of in files.items():
            size = len(of.block)
            await self.store.keep_leaf(
                FileRef(cids.canonical(cid), size), Leaf(cid, 0, size), of.block, of.source.name
            )
        return {
            cid: Arrival(of.block, of.source, cid in to_stage and cids.codec(cid) == cids.RAW)
            for cid, of in blocks.items()
        }

    def gather(self, subtree: Subtree, wanted: Iterable[Cid], seen: Seen) -> trio.Event:
        """As `Cache.gather`."""

        some = list(wanted) if subtree.limit <= self.store.budget.limit // OF_BUDGET else []
        rest = some[AT_ONCE:]

        async def fetch(ride: Ride[bytes, Arrival]) -> None:
            for at in range(0, len(rest), AT_ONCE):
                await trio.lowlevel.checkpoint()
                ride.expect(self._absent(rest[at : at + AT_ONCE]))
            if len(ride.keys) >= FEW:
                with trio.move_on_after(self._patience):
                    await self._blocks.subtree(subtree, Taking(ride, seen, self._absent, self._arrive))

        return self._flights.launch(self._absent(some[:AT_ONCE]), fetch, more=bool(rest)).ended

    def _absent(self, wanted: Iterable[Cid]) -> list[bytes]:
        """The keys of those blocks that are not staged."""
        return [
            block_key(cid)
            for cid in wanted
            if cids.inline(cid) is None and self.store.place(cid) is None and not self._is_staged_file(cid)
        ]

    def _is_staged_file(self, cid: Cid) -> bool:
        """Whether it is a raw file, and whole, as far as is known without looking at the disk."""
        entry = self.store.staging.entries.get(cids.canonical(cid)) if cids.codec(cid) == cids.RAW else None
        return entry is not None and entry.whole()

    # -- leaves ----------------------------------------------------------------------------------------------

    async def leaf(self, file: FileRef, leaf: Leaf, *, early: bool = False) -> Content:
        """As `Cache.leaf`."""
        if file.size <= SMALL or cids.inline(leaf.cid) is not None:
            return await content_of(leaf, await self.block(leaf.cid))
        if cids.codec(leaf.cid) != cids.RAW:
            block = await self.store.block(leaf.cid)
            if block is not None:
                self.hits += 1
                return await content_of(leaf, block)
        arrival = await self._flights.join_early(
            leaf_key(leaf),
            lambda land: self._bring_leaf(file, leaf, land if early else None),
            ended=not early,
        )
        # no failure to remember: another file may tell the truth about this leaf
        if len(arrival.content) != leaf.size:
            return await content_of(leaf, await self.block(leaf.cid))
        if arrival.stage and arrival.home != (file.cid, leaf.offset) and not await self._has(file, leaf):
            # another file's leaf, or another place in this one, of the same bytes
            await self._keep(file, leaf, arrival)
        return arrival.content

    async def _bring_leaf(self, file: FileRef, leaf: Leaf, land: Callable[[Arrival], None] | None) -> Arrival:
        staged = await self.store.leaf(file, leaf)
        if staged is not None:
            self.hits += 1
            return Arrival(staged, None, False)
        self.misses += 1
        fetched = await self._blocks.get(leaf.cid)
        arrival = await of_leaf(file, leaf, fetched.block, fetched.source)
        await self._behind.keep(
            leaf.size, land and (lambda: land(arrival)), lambda: self._stage(file, leaf, arrival)
        )
        return arrival

    async def _stage(self, file: FileRef, leaf: Leaf, arrival: Arrival) -> None:
        """Keeps what came."""
        if arrival.stage:
            await self._keep(file, leaf, arrival)
        elif arrival.source is not None and not arrival.source.in_place:
            await self.store.keep_blocks([(leaf.cid, bytes(arrival.block))])

    async def _stage_all(self, file: FileRef, came: Sequence[tuple[Leaf, Arrival]]) -> None:
        """As `_stage`, at once where they lie one behind the other in the file."""
        first = came[0][1]
        if len(came) > 1 and first.source is not None and adjoin(came):
            leaves, contents = [leaf for leaf, _arrival in came], [arrival.content for _leaf, arrival in came]
            if await self.store.keep_leaves(file, leaves, contents, first.source.name):
                return
        for leaf, arrival in came:
            await self._stage(file, leaf, arrival)

    async def _keep(self, file: FileRef, leaf: Leaf, arrival: Arrival) -> None:
        # else its parent lied: not for a file to hold
        if len(arrival.content) == leaf.size and arrival.source is not None:
            await self.store.keep_leaf(file, leaf, arrival.content, arrival.source.name)

    async def _has(self, file: FileRef, leaf: Leaf) -> bool:
        """Whether it seems to be staged."""
        if cids.inline(leaf.cid) is not None:
            return True
        in_pack = file.size <= SMALL or cids.codec(leaf.cid) != cids.RAW
        return (in_pack and self.store.place(leaf.cid) is not None) or await self.store.has_leaf(file, leaf)

    # -- ahead -----------------------------------------------------------------------------------------------

    async def ahead(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None = None) -> None:
        """As `Cache.ahead`."""
        missing: list[Leaf] = []
        staged: list[Leaf] = []
        rest: list[Leaf] = []
        for leaf in leaves:
            flies = leaf_key(leaf) in self._flights
            if not flies and file.size > SMALL and await self.store.has_leaf(file, leaf):
                staged.append(leaf)
            else:
                (rest if flies or await self._has(file, leaf) else missing).append(leaf)
        came: set[Leaf] = set()
        if staged and arrived is not None:
            came = await read_back(self.store, self._flights, file, staged, arrived)
            self.hits += len(came)
        if missing:
            came |= await self._run(file, missing, arrived)
        if arrived is not None:
            await self._hand_over(
                file, [leaf for leaf in (*staged, *rest, *missing) if leaf not in came], arrived
            )

    async def _run(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None) -> set[Leaf]:
        """One run from the sources; returns what came and was handed over."""
        came: set[Leaf] = set()
        listening = True
        by_key: dict[bytes, list[Leaf]] = {}
        for leaf in leaves:  # a file may hold one leaf many times: that is asked for once
            by_key.setdefault(leaf_key(leaf), []).append(leaf)

        async def fetch(ride: Ride[bytes, Arrival]) -> None:
            keys = ride.keys

            async def deliver(index: int, blocks: Sequence[Block], source: Source) -> None:
                self.misses += len(blocks)
                came_now: list[tuple[Leaf, Arrival]] = []
                for key, block in zip(keys[index:], blocks, strict=False):
                    arrival = await of_leaf(file, by_key[key][0], block, source)
                    ride.land(key, arrival)  # a reader need not wait until it is written
                    came_now.append((by_key[key][0], arrival))
                    for leaf in by_key[key]:
                        if (
                            listening
                            and arrived is not None
                            and leaf not in came
                            and len(arrival.content) == leaf.size
                        ):
                            came.add(leaf)
                            arrived(leaf, arrival.content)
                await self._stage_all(file, came_now)
                for key, (_leaf, arrival) in zip(keys[index:], came_now, strict=False):
                    for leaf in by_key[key][1:]:
                        if arrival.stage and not await self._has(file, leaf):
                            await self._keep(file, leaf, arrival)
                    ride.kept(key)

            await self._blocks.stream(Run(file.cid, file.size, [by_key[key][0] for key in keys]), deliver)

        try:
            await self._flights.run(by_key, fetch)
        finally:
            listening = False
        return came

    async def _hand_over(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived) -> None:
        """Each of `leaves`, some at a time; gives up with the first that can't be had."""
        queue = iter(leaves)

        async def work(scope: trio.CancelScope) -> None:
            for leaf in queue:
                try:
                    arrived(leaf, await self.leaf(file, leaf))
                except IpfsFuseError:
                    scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(min(SIDE_BY_SIDE, len(leaves))):
                nursery.start_soon(work, nursery.cancel_scope)
