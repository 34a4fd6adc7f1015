"""The budget: no byte is written before there is room for it.

`used` counts, in file-system blocks, what staging files and packs take and may still take by writes under way, what
is kept for good, and the index with what it may grow. ARC says what must leave; that has left the disk before the
reservation returns, and no other reservation returns in between: so the sum on disk never exceeds the budget.

Concurrency: the event loop's; one reservation that must evict, or one removal, at a time.
"""

from collections.abc import Awaitable, Callable

import trio

from ipfsfuse.cache.arc import Arc
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.base import current_request

Key = Cid | int
"""A staging file by its CID, a pack by its number."""


class Room:
    def __init__(self, budget: int, evict: Callable[[Key], Awaitable[None]]) -> None:
        """`evict` removes one thing from the disk, and reports its own trouble."""
        self.budget = budget
        self.arc: Arc[Key] = Arc(budget)
        self.evictions = 0
        self.refused: set[Key] = set()
        """What shall be kept for good and has not found room."""
        self._evict = evict
        self._lock = trio.Lock()
        self._overhead = 0
        self._stuck = 0
        self._kept: dict[Key, int] = {}
        self._kept_bytes = 0

    @property
    def used(self) -> int:
        return self._overhead + self._stuck + self._kept_bytes + self.arc.bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept for good."""
        return self._kept_bytes

    def kept(self, key: Key) -> bool:
        return key in self._kept

    def size(self, key: Key) -> int:
        return self._kept.get(key) or self.arc.size(key)

    async def reserve(self, key: Key, size: int) -> bool:
        """Counts `size` more bytes for `key`, after what must leave for them has left. False: they can't fit."""
        if self._lock.locked() or self.used + size > self.budget:
            async with self._lock:
                return await self._reserve(key, size)
        if key in self._kept:
            self._keep(key, size)
        else:
            self.arc.admit(key, size, current_request().caller)
        return True

    async def _reserve(self, key: Key, size: int) -> bool:
        if size > self.arc.capacity:
            if key in self._kept:
                self.refused.add(key)
            return False
        if key in self._kept:
            self._keep(key, size)
            await self._leave(self._refit())
        else:
            await self._leave(self.arc.admit(key, size, current_request().caller))
        return True

    def adjust(self, key: Key, by: int) -> None:
        """Corrects what is counted for `key` by so many bytes: what was reserved meanwhile stays counted."""
        if not by:
            return
        size = self.size(key) + by
        if key in self._kept:
            self._keep(key, by)
        elif size <= 0:
            self.arc.remove(key)
        else:
            self.arc.set_size(key, size)

    def remove(self, key: Key) -> None:
        """`key` has left the disk for other reasons."""
        if key in self._kept:
            self._keep(key, -self._kept[key])
        else:
            self.arc.remove(key)

    def keep(self, key: Key) -> None:
        """Exempts `key` from eviction, whether or not it is there yet."""
        if key not in self._kept:
            self._kept[key] = 0
            held = self.arc.size(key)
            self.arc.remove(key)
            self._keep(key, held)

    def release(self, key: Key) -> None:
        """`key` may be evicted again."""
        if key in self._kept:
            held = self._kept[key]
            self.remove(key)
            del self._kept[key]
            if held:
                self.arc.restore(key, held, True)

    async def set_overhead(self, size: int) -> None:
        """What the index takes, and may take before this is called again."""
        async with self._lock:
            self._overhead = size
            await self._leave(self._refit())

    async def evict(self, key: Key) -> int:
        """Removes one thing on demand; returns the bytes freed."""
        async with self._lock:
            size = self.size(key)
            self.remove(key)
            with trio.CancelScope(shield=True):  # as in `_leave`
                await self._evict(key)
            return size

    def _keep(self, key: Key, size: int) -> None:
        self._kept[key] = self._kept.get(key, 0) + size
        self._kept_bytes += size
        self.arc.capacity = max(0, self.budget - self._overhead - self._stuck - self._kept_bytes)

    def _refit(self) -> list[Key]:
        return self.arc.set_capacity(self.budget - self._overhead - self._stuck - self._kept_bytes)

    def stuck(self, size: int) -> None:
        """Something of `size` bytes could not be removed: it is counted until the next start."""
        self._stuck += size
        self.arc.capacity = max(0, self.arc.capacity - size)

    async def _leave(self, keys: list[Key]) -> None:
        with trio.CancelScope(shield=True):  # what was decided is done: else it would be on disk and not counted
            for key in keys:
                await self._evict(key)
                self.evictions += 1
