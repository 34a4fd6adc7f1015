"""Small blocks in packs: given hashed, kept within the budget.

Concurrency: the event loop's; one block is appended at a time.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from ipfsfuse.cache.store.disk import Disk
from ipfsfuse.cache.store.packs import PackSet, Place, Section, rewrite_block, section
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Unsupported, WrongBlock
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import current_request

log = logging.getLogger(__name__)

ON_LOOP = 32 << 10
"""Blocks of up to so many bytes are read and hashed on the event loop: 10 to 30 us, less than a thread
costs."""
WRITE_ON_LOOP = 64 << 10
"""Bytes of sections that are written on the event loop too: 30 us."""
RECENT_PACKS = 2
"""A use of a block in one of the last packs is part of the same use that brought it."""


class BlockStore(Disk):
    """Blocks by their multihash."""

    async def block(self, cid: Cid) -> bytes | None:
        """The block, hashed after it was read; None where it is not kept, or not right (then it is
        forgotten)."""
        place = self.place(cid)
        if place is None:
            return None
        self._used_pack(place.pack)
        try:
            if place.size <= ON_LOOP:
                return _proved(self.packs.read, cid, place)
            return await threads.run_sync(_proved, self.packs.read_apart, cid, place, limiter=self.reading)
        except WrongBlock:
            log.warning("%s: wrong bytes in the cache, set aside", cids.text(cid))
            self.set_aside[cids.multihash(cid)] = place
        except OSError as exc:
            if place.pack in self.packs.sizes:
                self.backoff.failed(str(self.packs.path(place.pack)), exc)
        self.packs.forget(cids.multihash(cid))
        self.tell_index()
        return None

    async def take_back(self, cid: Cid, place: Place) -> bool:
        """Whether what lies at `place` is the block: then the index has it again."""
        try:
            await threads.run_sync(_proved, self.packs.read_apart, cid, place, limiter=self.reading)
        except (WrongBlock, Unsupported, OSError):
            return False
        if place.pack not in self.packs.sizes:
            return False
        if self.packs.pending.get(cids.multihash(cid)) is None:
            self.packs.pending[cids.multihash(cid)] = place
        self.tell_index()
        return True

    def _used_pack(self, pack: int) -> None:
        if pack < self.packs.last - RECENT_PACKS:
            self.budget.arc.use(pack, current_request().caller)
        else:
            self.budget.arc.refresh(pack)

    async def keep_block(self, cid: Cid, block: bytes, pack_set: PackSet | None = None) -> bool:
        """Whether it is kept now, in a pack of `pack_set` (by default anywhere, else one of those that are
        never evicted)."""
        if self.backoff.waiting:
            return False
        made = section(cids.canonical(cid), block)
        async with self._my_turn():
            place = self.place(cid)
            if place is not None and (pack_set is None or place.pack in pack_set.packs):
                return True
            return await self._repaired(made, pack_set) or await self._append(
                pack_set or self.pack_set, [made]
            )

    async def keep_blocks(self, blocks: Iterable[tuple[Cid, bytes]]) -> None:
        """As `keep_block` for several that were not kept when they were asked for, in few writes: opening a
        pack costs as much as writing a small block to it."""
        if self.backoff.waiting:
            return
        async with self._my_turn():
            together: list[Section] = []
            room = self.packs.limit - self.packs.sizes.get(self.pack_set.pack, 0)
            for made in (section(cids.canonical(cid), block) for cid, block in blocks):
                if self.set_aside and await self._repaired(made, None):
                    continue
                if len(made.data) > room:
                    if together:
                        await self._append(self.pack_set, together)
                    together, room = [], self.packs.limit  # a new pack is begun
                together.append(made)
                room -= len(made.data)
            if together:
                await self._append(self.pack_set, together)

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        if self.appending.locked():
            await self.appending.acquire()
        else:
            # without a turn of the event loop, which costs as much as the writing
            self.appending.acquire_nowait()
        try:
            yield
        finally:
            self.appending.release()

    async def _repaired(self, made: Section, pack_set: PackSet | None) -> bool:
        """Whether the block is right again where a wrong one was set aside: what is kept for good stays
        so."""
        cid, data, head = made
        place = self.set_aside.pop(cids.multihash(cid), None)
        if place is None or place.pack not in (self.packs.sizes if pack_set is None else pack_set.packs):
            return False
        try:
            done = await threads.run_sync(rewrite_block, self.packs, place, data, head, limiter=self.writing)
        except OSError as exc:
            self.backoff.failed(str(self.packs.path(place.pack)), exc)
            return False
        if not done or place.pack not in self.packs.sizes:
            return False
        self.packs.pending[cids.multihash(cid)] = place
        self.tell_index()
        return True

    async def _room_in(self, pack_set: PackSet, size: int) -> tuple[int, int] | None:
        """The pack of `pack_set` that has room for `size` more bytes, and the bytes reserved for them, which
        the caller settles; None where there is no room."""
        while True:
            pack = self.packs.choose(pack_set, size)
            if pack_set is not self.pack_set:
                self.budget.keep(pack)
            held = self.packs.sizes.get(pack, 0)
            cost = self.staging.cost(held, held + size)
            if not await self.budget.reserve(pack, cost):
                return None
            if self.packs.sizes.get(pack, 0) == held:
                return pack, cost
            self.budget.settle(cost)
            # it had to leave, to make room for itself: its number is not used again
            self.budget.adjust(pack, -cost)

    async def _append(self, pack_set: PackSet, sections: Sequence[Section]) -> bool:
        """Writes `sections` behind what the last pack of `pack_set` holds, in one piece; False where there is
        no room."""
        data = sections[0].data if len(sections) == 1 else b"".join(made.data for made in sections)
        found = await self._room_in(pack_set, len(data))
        if found is None:
            return False
        pack, cost = found
        try:
            return await self._write(pack, data, sections)
        finally:
            self.budget.settle(cost)
            self._settle_pack(pack)

    async def _write(self, pack: int, data: bytes, sections: Sequence[Section]) -> bool:
        at = self.packs.sizes.setdefault(pack, 0)
        try:
            if len(data) <= WRITE_ON_LOOP:
                self.packs.write(pack, at, data)
            else:
                await threads.run_sync(self.packs.write, pack, at, data, limiter=self.writing)
        except OSError as exc:
            self.backoff.failed(str(self.packs.path(pack)), exc)
            self.budget.look_soon()
            self.packs.drop_empty(pack)
            return False
        else:
            if pack not in self.packs.sizes:  # evicted while a thread wrote
                self.packs.drop_empty(pack)
                return False
            self.backoff.succeeded()
            self.packs.note(pack, at, sections)
            self.tell_index()
            return True

    def _settle_pack(self, pack: int) -> None:
        size, unit = self.packs.sizes.get(pack, 0), self.staging.unit
        charge = -(-size // unit) * unit + unit if size else 0
        self.budget.adjust(pack, charge - self.budget.size(pack))


def _proved(read: Callable[[Place], bytes], cid: Cid, place: Place) -> bytes:
    block = read(place)
    if not multihashes.matches(cids.multihash(cid), (block,)):
        raise WrongBlock(cids.text(cid))
    return block
