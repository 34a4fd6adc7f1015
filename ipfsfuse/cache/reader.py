"""Reads through the cache: from the disk, from a fetch under way, or from the sources.

Concurrency: every method may be called by many tasks at once. One fetch serves all callers of a block, and
belongs to none of them (`single_flight`). A fetch ends when its block is staged, or could not be staged.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import trio

from ipfsfuse.cache.base import Arrived, CacheItem, FileRef, LeafPart, Seen
from ipfsfuse.cache.single_flight import Batch, SingleFlight
from ipfsfuse.cache.store.store import MAX_PACKED, Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import MAX_PARSED_ON_LOOP, Leaf, Node
from ipfsfuse.errors import IpfsFuseError, StoreFailed
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import BlockFetcher, Fetched, LeafRange, Source, Subtree, Verified
from ipfsfuse.sources.streams import segments_of
from ipfsfuse.structures import Buffer

T = TypeVar("T")

MIN_SUBTREE_BLOCKS = 4
"""Fewer blocks are fetched one by one: that costs less than one answer with all blocks of a directory."""
ANSWER_PART = 1 / 3
"""The part of the deadline that such an answer may take. After that there is time to get its blocks
elsewhere."""
OF_BUDGET = 4
"""The largest part of the budget, as a divisor, that one answer may fill, so that its blocks don't evict each
other."""
REGISTERED_AT_A_TIME = 2000
"""Blocks of one answer that are registered in one step of the event loop: about 10 ms."""
LEAVES_TOGETHER = 4
"""Leaves that one `ahead` fetches in parallel, if it fetches them one by one."""
READ_TASKS = 2
"""Tasks that read staged leaves ahead: one reads while the other hashes."""

BEHIND_SECONDS = 0.01
"""Seconds after its reader got a block until it is staged. Small blocks are written on the event loop, so the
answer and the reader's next request would wait for that."""
MAX_UNWRITTEN = 16 << 20
"""Bytes that readers may have got, or that were fetched ahead, and that are not written yet. Without a limit,
a fast source would outrun a slow disk."""
DISK_PART = 1 / 3
"""The part of the deadline for which a fetch waits for the disk. If there is no room then, readers get the
bytes, and they are not staged."""


# -- keys ---------------------------------------------------------------------------------------------------


def block_key(cid: Cid) -> bytes:
    """The key of a block, the same for all spellings of its CID. A raw block may be a file of its own, so its
    key is its CID; other blocks are stored by their multihash."""
    return cids.canonical(cid) if cids.codec(cid) == cids.RAW else cids.multihash(cid)


def cid_of(key: bytes) -> Cid:
    """A CID with the multihash of a key: the key itself if it is a CID, else that of a dag-pb block."""
    return Cid(key) if key[:1] == b"\x01" else cids.make(cids.DAG_PB, key)


def spelled(key: bytes) -> str:
    """A key, or the CID that a caller asked for, as text for messages."""
    return cids.text(cid_of(key))


# -- results ------------------------------------------------------------------------------------------------


class FetchResult(NamedTuple):
    """A block, or the content of a leaf, as all waiters get it. `source` is None if it was staged."""

    content: Buffer
    source: Source | None = None
    block: Buffer = b""
    """The block as it arrived."""
    staged_at: tuple[Cid, int] | None = None
    """The file, and the offset in it, where the content is staged. None if it can't be in a staging file,
    because it is read in place, or because the content alone can't be verified."""
    interior: bool = False
    """Whether the block has children besides."""


async def _parsed(parse: Callable[[], T], cid: Cid, block: Buffer) -> T:
    """The result of `parse` for `block`. Runs in a thread if the block is large: it may have 40,000 links."""
    if len(block) <= MAX_PARSED_ON_LOOP or file_layout.is_canonical(cid, block):
        return parse()
    return await threads.run_sync(parse)


async def parsed_node(cid: Cid, block: bytes, most: int = MAX_PARSED_ON_LOOP) -> Node:
    """The node of `block`, parsed in a thread if the block has more than `most` bytes. Raises what
    `nodes.parse` raises."""
    if len(block) <= most:
        return nodes.parse(cid, block)
    return await threads.run_sync(nodes.parse, cid, block)


def result_of_block(cid: Cid, fetched: Fetched) -> FetchResult:
    """The result for the waiters of a block. A raw block may be a whole file, and is staged as one."""
    block, source = fetched.block, fetched.source
    staged_at = None if cids.codec(cid) != cids.RAW or source.in_place else (cids.canonical(cid), 0)
    return FetchResult(block, source, block, staged_at)


async def result_of_leaf(file: FileRef, leaf: Leaf, block: Buffer, source: Source) -> FetchResult:
    """The result for the waiters of a leaf of `file`, from its block."""
    raw, interior = cids.codec(leaf.cid) == cids.RAW, False
    if raw:
        content = memoryview(block)
    else:
        found = await _parsed(lambda: file_layout.block_content(leaf.cid, block), leaf.cid, block)
        content, interior = found.data, found.interior
    if source.in_place:
        return FetchResult(content, source, interior=interior)
    provable = file.size > MAX_PACKED and (raw or file_layout.is_canonical(leaf.cid, block))
    return FetchResult(content, source, block, (file.cid, leaf.offset) if provable else None, interior)


def _whole(cid: Cid, size: int) -> tuple[FileRef, Leaf]:
    """The block of `cid`, of `size` bytes, as a file with one leaf."""
    return FileRef(cids.canonical(cid), size), Leaf(cid, 0, size)


class _Unwritten:
    """The bytes that wait to be written: at most `MAX_UNWRITTEN`."""

    def __init__(self, store: Store, patience: float) -> None:
        """`patience`: seconds for which `add` waits for the disk."""
        self._store, self._patience = store, patience
        self._bytes = 0
        self._fewer = trio.Event()
        self._turn = trio.Lock()
        """Held by the first caller that waits for room: the others, even of less, come after it."""
        self._removals = 0
        self.is_stuck = False
        """Whether `add` has waited for the disk in vain, and nothing was written since."""

    async def add(self, size: int) -> bool:
        """Counts `size` more bytes, once there is room for them, and returns True. Returns False if the disk
        makes too little room in time. If it makes none, later calls do not wait until it does."""
        if self._bytes <= MAX_UNWRITTEN - size and not self._turn.locked():
            self._bytes += size
            return True
        removals = self._removals
        with trio.move_on_after(0 if self.is_stuck else self._patience):
            async with self._turn:
                while self._bytes > MAX_UNWRITTEN - size:
                    await self._fewer.wait()
                self._bytes += size
                return True
        if removals == self._removals and not self.is_stuck:
            self.is_stuck = True
            late = StoreFailed(f"the disk does not keep up: it took nothing for {self._patience:.1f} s")
            self._store.backoff.failed(str(self._store.folder), late)
        return False

    def remove(self, size: int) -> None:
        self._bytes -= size
        self._removals += 1
        self.is_stuck = False
        self._fewer.set()
        self._fewer = trio.Event()


class _Expected:
    """The blocks of one answer that a batch expects (implements `sources.base.Wanted`)."""

    def __init__(self, reader: "Reader", batch: Batch[bytes, FetchResult], seen: Seen) -> None:
        self._reader, self._batch, self._seen = reader, batch, seen
        self._came = set[bytes]()

    def wants(self, cid: Cid) -> bool:
        key = block_key(cid)
        return key in self._batch and key not in self._came

    def came(self, cid: Cid, block: bytes) -> None:
        self._came.add(block_key(cid))
        below = self._seen(cid, block)
        if below:
            self._batch.expect(self._reader.absent(below))


# -- the reader ---------------------------------------------------------------------------------------------


class Reader:
    """Reads blocks and leaves. Implements `cache.base.Cache`, which describes the methods."""

    def __init__(self, store: Store, blocks: BlockFetcher, nursery: trio.Nursery, deadline: float) -> None:
        self.store = store
        self.hits = 0
        self.misses = 0
        self._blocks = blocks
        self._patience = deadline * ANSWER_PART
        self._unwritten = _Unwritten(store, deadline * DISK_PART)
        self._flights: SingleFlight[bytes, FetchResult] = SingleFlight(
            nursery, deadline, name=spelled, cause=lambda key: blocks.answers_so_far(cid_of(key))
        )

    # -- uses ------------------------------------------------------------------------------------------------

    def opened(self, file: FileRef) -> None:
        # The cheap checks come first: looking in the index takes as long as the rest of opening a small file.
        pins = self.store.pins
        if pins.anywhere and not pins.state(file.cid) and self.store.holds(file.cid):
            pins.add(file.cid)
        self.store.note_use(file)

    def item_of(self, cid: Cid) -> CacheItem | None:
        return self.store.item_of(cid)

    def used(self) -> int:
        return self.store.budget.used

    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        self.store.blocks.when_blocks_leave.append(call)

    # -- blocks ----------------------------------------------------------------------------------------------

    async def block(self, cid: Cid, *, early: bool = False) -> bytes:
        return bytes(await self._block(cid, early))

    async def block_size(self, cid: Cid, *, early: bool = False) -> int:
        return len(await self._block(cid, early))

    async def _block(self, cid: Cid, early: bool) -> Buffer:
        carried = cids.inline_or_empty_block(cid)
        if carried is not None:
            return carried
        staged = await self.store.blocks.get(cid)
        if staged is not None:
            self.hits += 1
            return staged
        own = cids.canonical(cid)
        fetch = partial(self._bring, cid, None, early)
        result = await self._flights.join(block_key(cid), fetch, own, ended=not early)
        return result.content

    async def staged_block(self, cid: Cid, *, use: bool = True) -> bytes | None:
        """The verified block if it is staged as a block or as a raw file. Asks no source. `use`: as in
        `Packs.get`."""
        found: Buffer | None = cids.inline_or_empty_block(cid)
        if found is None:
            found = await self.store.blocks.get(cid, use=use)
        if found is None:
            found = await self._raw_file(cid)
        return None if found is None else bytes(found)

    async def _raw_file(self, cid: Cid) -> Buffer | None:
        """The only block of a staged raw file."""
        own = cids.canonical(cid)
        entry = self.store.staging.find(own) if cids.codec(cid) == cids.RAW else None
        if entry is None:
            return None
        return await self.store.leaf(FileRef(own, entry.size), Leaf(cid, 0, entry.size))

    async def _bring(
        self, cid: Cid, leaf_of: tuple[FileRef, Leaf] | None, early: bool
    ) -> AsyncGenerator[FetchResult]:
        """Yields the block of `cid`, or with `leaf_of` the content of that leaf, from a staging file or from
        a source, and then stages what it fetched. If too much waits to be staged, it waits for that before it
        yields. `early`: whether its reader does not wait until it is staged."""
        own = cids.canonical(cid) if leaf_of is None else leaf_of[0].cid
        if self.store.staging.find(own) is not None:
            staged = await (self._raw_file(cid) if leaf_of is None else self.store.leaf(*leaf_of))
            if staged is not None:
                self.hits += 1
                yield FetchResult(staged)
                return
        fetched = await self._blocks.get(cid)
        self.misses += 1
        size = len(fetched.block)
        if leaf_of is None:
            file, leaf = _whole(cid, size)
            result = result_of_block(cid, fetched)
        else:
            file, leaf = leaf_of
            result = await result_of_leaf(file, leaf, fetched.block, fetched.source)
        if fetched.source.in_place:
            yield result
            return
        if not await self._unwritten.add(size):
            self.store.note_not_kept(file.cid)
            yield result
            return
        self.store.arriving[own] += 1
        try:
            yield result
            with trio.CancelScope(shield=True):  # what was read is staged, even if the mount ends
                if early:
                    await trio.sleep(BEHIND_SECONDS)
                await self._stage([(file, leaf, result)])
        finally:
            self._unwritten.remove(size)
            self.store.arriving[own] -= 1
            if not self.store.arriving[own]:
                del self.store.arriving[own]
                if self.store.pins.anywhere and not self.store.holds(own):  # it could not be staged
                    self.store.pins.remove(own)

    def arrived(self, cid: Cid) -> Buffer | None:
        result = self._flights.arrived(block_key(cid))
        return None if result is None else result.content

    async def wait_until_staged(self) -> None:
        await self._flights.wait_until_staged()

    async def _stage(self, arrived: Iterable[tuple[FileRef, Leaf, FetchResult]]) -> None:
        """Stages what arrived together: adjacent leaves of a file in one write, small blocks in a few
        writes."""
        small: list[tuple[tuple[Cid, bytes], FileRef]] = []
        runs: list[tuple[FileRef, str, list[Leaf], list[Buffer]]] = []
        for file, leaf, result in arrived:
            if result.source is None or result.source.in_place:
                continue
            if result.staged_at is None or file.size <= MAX_PACKED:
                small.append(((leaf.cid, bytes(result.block)), file))
            elif len(result.content) == leaf.size:  # otherwise its parent states a wrong size
                last = runs[-1][2][-1] if runs and runs[-1][0] == file else None
                if last is None or leaf.offset != last.offset + last.size:
                    runs.append((file, result.source.name, [], []))
                runs[-1][2].append(leaf)
                runs[-1][3].append(result.content)
        for file, source, leaves, contents in runs:
            kept = await self.store.put_leaves(file, leaves, contents, source)
            if not kept and len(leaves) > 1:
                kept = True
                for leaf, content in zip(leaves, contents, strict=True):  # there may be room for some of them
                    kept &= await self.store.put_leaves(file, [leaf], [content], source)
            if not kept:
                self.store.note_not_kept(file.cid)
        if small and not await self.store.blocks.put_many([each for each, _file in small]):
            for _each, file in small:
                self.store.note_not_kept(file.cid)

    def gather(self, subtree: Subtree, wanted: Iterable[Cid], seen: Seen) -> trio.Event:
        some = list(wanted) if subtree.limit <= self.store.budget.limit // OF_BUDGET else []
        rest = some[REGISTERED_AT_A_TIME:]

        async def fetch(batch: Batch[bytes, FetchResult]) -> None:
            for at in range(0, len(rest), REGISTERED_AT_A_TIME):
                await trio.lowlevel.checkpoint()
                batch.expect(self.absent(rest[at : at + REGISTERED_AT_A_TIME]))
            if len(batch.keys) >= MIN_SUBTREE_BLOCKS:
                with trio.move_on_after(self._patience):
                    async with self._blocks.subtree(subtree, _Expected(self, batch, seen)) as stream:
                        async for blocks in stream:
                            self.misses += len(blocks)
                            came = {cid: result_of_block(cid, fetched) for cid, fetched in blocks.items()}
                            await self._stage((*_whole(cid, len(came[cid].block)), came[cid]) for cid in came)
                            for cid, result in came.items():
                                batch.resolve(block_key(cid), result)
                                batch.staged(block_key(cid))

        batch = self._flights.start_batch(self.absent(some[:REGISTERED_AT_A_TIME]), fetch, more=bool(rest))
        batch.interest += 1  # it goes on even if all callers leave
        return batch.ended

    def absent(self, wanted: Iterable[Cid]) -> list[bytes]:
        """The keys of those of `wanted` that are not staged."""
        some = [
            cid for cid in wanted if cids.inline_or_empty_block(cid) is None and not self._is_staged_file(cid)
        ]
        packed = self.store.blocks.locate_each(some)
        return [block_key(cid) for cid in some if cids.multihash(cid) not in packed]

    def _is_staged_file(self, cid: Cid) -> bool:
        """Whether it is a complete raw file, as far as that is known without looking at the disk."""
        entry = self.store.staging.find(cids.canonical(cid)) if cids.codec(cid) == cids.RAW else None
        return entry is not None and entry.whole()

    # -- leaves ----------------------------------------------------------------------------------------------

    async def leaf(self, file: FileRef, leaf: Leaf, *, early: bool = False) -> Buffer:
        return (await self.part(file, leaf, 0, leaf.size, early=early)).content

    async def part(
        self, file: FileRef, leaf: Leaf, start: int, stop: int, *, early: bool = False
    ) -> LeafPart:
        is_staged = self.store.staging.find(file.cid) is not None
        if is_staged:
            proved = await self.store.part(file, leaf, start, stop)
            if proved is not None:
                self.hits += 1
                return proved
        block: bytes | None = None
        if file.size <= MAX_PACKED or cids.inline_or_empty_block(leaf.cid) is not None:
            block = await self.block(leaf.cid, early=early)
        elif cids.codec(leaf.cid) != cids.RAW:
            block = await self.store.blocks.get(leaf.cid)
            self.hits += block is not None
        content: Buffer = b""
        if block is None:
            fetch = partial(self._bring, leaf.cid, (file, leaf), early)
            result = await self._flights.join(cids.canonical(leaf.cid), fetch, ended=not early)
            content = result.content
            if not leaf.has_content(len(content), result.interior):
                # no failure of this leaf: another file may state its size correctly
                block = await self.block(leaf.cid, early=early)
            elif result.staged_at not in (None, (file.cid, leaf.offset)) and not await self._has(file, leaf):
                # the fetch was for a leaf of the same bytes in another file, or elsewhere in this one
                await self._stage([(file, leaf, result)])
        if block is not None:
            content = await _parsed(partial(file_layout.leaf_content, leaf, block), leaf.cid, block)
        if stop - start < leaf.size:
            content = memoryview(content)[start:stop]
        return LeafPart(content, self.store.pieces(file, leaf) if is_staged else None)

    async def _has(self, file: FileRef, leaf: Leaf) -> bool:
        """Whether the leaf seems to be staged."""
        if cids.inline_or_empty_block(leaf.cid) is not None:
            return True
        in_pack = file.size <= MAX_PACKED or cids.codec(leaf.cid) != cids.RAW
        return (in_pack and self.store.blocks.locate(leaf.cid) is not None) or await self.store.has_leaf(
            file, leaf
        )

    # -- ahead -----------------------------------------------------------------------------------------------

    async def ahead(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None = None) -> None:
        missing: list[Leaf] = []
        staged: list[Leaf] = []
        rest: list[Leaf] = []
        for leaf in leaves:
            flies = cids.canonical(leaf.cid) in self._flights
            if not flies and file.size > MAX_PACKED and await self.store.has_leaf(file, leaf):
                staged.append(leaf)
            else:
                (rest if flies or await self._has(file, leaf) else missing).append(leaf)
        came: set[Leaf] = set()
        if staged and arrived is not None:
            came = await self._read_staged(file, staged, arrived)
            self.hits += len(came)
        if missing:
            came |= await self._run(file, missing, arrived)
        if arrived is not None:
            await self._hand_over(
                file, [leaf for leaf in (*staged, *rest, *missing) if leaf not in came], arrived
            )

    async def _read_staged(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived) -> set[Leaf]:
        """Reads leaves that seem to be staged, several by one call in a thread. Calls `arrived` with those
        that are correct, and returns them. A caller that wants one of them meanwhile waits for this."""
        came: set[Leaf] = set()
        listening = True
        by_key: dict[bytes, Leaf] = {cids.canonical(leaf.cid): leaf for leaf in leaves}

        async def fetch(batch: Batch[bytes, FetchResult]) -> None:
            queue = _segments([by_key[key] for key in batch.keys])

            async def work() -> None:
                for segment in queue:
                    for leaf, data in zip(segment, await self.store.leaves(file, segment), strict=True):
                        if data is not None:
                            key = cids.canonical(leaf.cid)
                            batch.resolve(key, FetchResult(data))
                            batch.staged(key)
                            if listening:
                                came.add(leaf)
                                arrived(leaf, data)

            async with trio.open_nursery() as nursery:
                for _ in range(READ_TASKS):
                    nursery.start_soon(work)

        try:
            await self._flights.run_batch(by_key, fetch)
        finally:
            listening = False
        return came

    async def _run(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None) -> set[Leaf]:
        """Fetches leaves by one request. Calls `arrived` with those that come, and returns them."""
        came: set[Leaf] = set()
        listening = True
        cloned: dict[int, object] = {}
        """The buffers of leaves that were read from clones and are not verified yet, by the leaf's offset in
        the file."""
        by_key: dict[bytes, list[Leaf]] = {}
        for leaf in leaves:  # a file may hold one leaf many times: it is fetched once
            by_key.setdefault(cids.canonical(leaf.cid), []).append(leaf)

        async def clone(wanted: Sequence[Leaf], files: Sequence[str], source: str) -> Sequence[Buffer]:
            if self._unwritten.is_stuck:
                return []
            found = await self.store.clone_leaves(file, wanted, files, source)
            cloned.update((leaf.offset, data.obj) for leaf, data in zip(wanted, found, strict=False))
            return found

        async def fetch(batch: Batch[bytes, FetchResult]) -> None:
            keys = batch.keys
            wanted = LeafRange(file.cid, file.size, [by_key[key][0] for key in keys], clone)
            async with trio.open_nursery() as nursery, self._blocks.stream(wanted) as stream:
                async for delivery in stream:
                    # what readers have got is staged, even if they leave
                    with trio.CancelScope(shield=True):
                        came_now = await give(batch, keys, delivery)
                        size = sum(map(len, delivery.blocks))
                        if await self._unwritten.add(size):
                            nursery.start_soon(stage, batch, came_now, delivery.release, size)
                        else:
                            leave(batch, came_now, delivery.release)

        def leave(
            batch: Batch[bytes, FetchResult],
            came_now: Sequence[tuple[bytes, FetchResult]],
            release: Callable[[], None],
        ) -> None:
            """Stages nothing of a delivery."""
            for key, _result in came_now:
                cloned.pop(by_key[key][0].offset, None)
                batch.staged(key)
            self.store.note_not_kept(file.cid)
            release()

        async def give(
            batch: Batch[bytes, FetchResult], keys: Sequence[bytes], delivery: Verified
        ) -> Sequence[tuple[bytes, FetchResult]]:
            """Gives the blocks of a delivery to their readers, before they are staged."""
            self.misses += len(delivery.blocks)
            came_now: list[tuple[bytes, FetchResult]] = []
            for key, block in zip(keys[delivery.first :], delivery.blocks, strict=False):
                result = await result_of_leaf(file, by_key[key][0], block, delivery.source)
                batch.resolve(key, result)
                came_now.append((key, result))
                for leaf in by_key[key]:
                    fits = leaf.has_content(len(result.content), result.interior)
                    if listening and arrived is not None and fits and leaf not in came:
                        came.add(leaf)
                        arrived(leaf, result.content)
            return came_now

        async def stage(
            batch: Batch[bytes, FetchResult],
            came_now: Sequence[tuple[bytes, FetchResult]],
            release: Callable[[], None],
            size: int,
        ) -> None:
            try:
                first = [(file, by_key[key][0], result) for key, result in came_now]
                with trio.CancelScope(shield=True):
                    are_clones = [
                        memoryview(result.content).obj is cloned.pop(leaf.offset, self)
                        for _file, leaf, result in first
                    ]
                    if all(are_clones):
                        self.store.note_proved(file, [leaf for _file, leaf, _result in first])
                    else:
                        await self._stage(first)
                    for key, result in came_now:
                        for leaf in by_key[key][1:]:
                            if result.staged_at is not None and not await self._has(file, leaf):
                                await self._stage([(file, leaf, result)])
                        batch.staged(key)
            finally:
                release()
                self._unwritten.remove(size)

        try:
            await self._flights.run_batch(by_key, fetch)
        finally:
            listening = False
        return came

    async def _hand_over(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived) -> None:
        """Calls `arrived` with each of `leaves`, some in parallel. Gives up at the first that can't be
        read."""
        queue = iter(leaves)

        async def work(scope: trio.CancelScope) -> None:
            for leaf in queue:
                try:
                    arrived(leaf, await self.leaf(file, leaf))
                except IpfsFuseError:
                    scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(min(LEAVES_TOGETHER, len(leaves))):
                nursery.start_soon(work, nursery.cancel_scope)


def _segments(leaves: Sequence[Leaf]) -> Iterator[Sequence[Leaf]]:
    """Splits `leaves` into segments: where they are not adjacent, and where a segment is large
    enough."""
    first = 0
    for at in range(1, len(leaves) + 1):
        if at == len(leaves) or leaves[at].offset != leaves[at - 1].offset + leaves[at - 1].size:
            for _start, segment in segments_of(leaves[first:at]):
                yield segment
            first = at
