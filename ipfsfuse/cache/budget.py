"""The budget: no byte is written before there is room for it.

`used` counts, in file-system blocks, what staging files and packs take and may still take by writes under
way, what is pinned, and everything else in the cache folder with what that may grow. ARC says what
must leave. That has left the disk before the reservation returns, and no other reservation returns in
between. So the sum on disk never exceeds `limit`.

Until what an earlier run left has been `counted`, nothing is reserved and nothing leaves.

`limit` is the configured budget, or less where the file system is too full for it: a reserve stays free for
others. It follows the free space, which is asked for again after each `LOOK_BYTES` reserved and whenever
`refit` is called.

Concurrency: the event loop's; one reservation that must evict, or one removal, at a time.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from ipfsfuse.cache.arc import Arc
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.base import current_request

log = logging.getLogger(__name__)

Key = Cid | int
"""A staging file by its CID, a pack by its number."""

LOOK_BYTES = 4 << 20
"""Bytes reserved between two looks at the free space. One look takes some microseconds."""
RESERVE_PART, MAX_RESERVE = 20, 2 << 30
"""By default a twentieth of the file system stays free, at most 2 GiB."""
RETRY = 5.0
"""Seconds after a failed write in which nothing is written."""


@asynccontextmanager
async def holding(lock: trio.Lock) -> AsyncIterator[None]:
    """While it has `lock`. Where that is free, no other task gets a turn first, which costs 20 us."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Budget:
    def __init__(
        self,
        configured: int,
        evict: Callable[[Key], Awaitable[None]],
        spare: Callable[[], int | None],
    ) -> None:
        """`evict` removes one thing from the disk, and reports its own failure. `spare` says how many more
        bytes the file system can take before the reserve is touched: negative where others have taken from
        the reserve, None where that can't be known. `restore` is called with what an earlier run left, and
        then `counted` is set."""
        self.configured = configured
        self.limit = configured
        self.unit = 4096
        """Bytes of a file-system block."""
        self.counted = trio.Event()
        """Set when `used` has all that an earlier run left."""
        self.arc: Arc[Key] = Arc(configured)
        self.evictions = 0
        self.refused: set[Key] = set()
        """What should be pinned, but did not fit."""
        self._evict = evict
        self._spare = spare
        self._lock = trio.Lock()
        self._overhead = 0
        self._margin = 0
        self._stuck = 0
        self._exempt: dict[Key, int] = {}
        """Bytes of what may not be evicted: what is pinned or protected."""
        self._exempt_bytes = 0
        self._pinned: set[Key] = set()
        self._protected: dict[Key, bool] = {}
        """Whether ARC had it among what was used again."""
        self._pending = 0
        self._unlooked = 0

    @property
    def used(self) -> int:
        return self._overhead + self._margin + self._stuck + self._exempt_bytes + self.arc.bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of what is pinned."""
        protected = sum(self._exempt[key] for key in self._protected if key not in self._pinned)
        return self._exempt_bytes - protected

    @property
    def protected_bytes(self) -> int:
        """Bytes of what is protected."""
        return sum(self._exempt[key] for key in self._protected)

    def is_pinned(self, key: Key) -> bool:
        return key in self._pinned

    def size(self, key: Key) -> int:
        return self._exempt.get(key) or self.arc.size(key)

    async def reserve(self, key: Key, start: int, end: int) -> int:
        """Counts for `key` the bytes on disk that writing [start, end) can take at most, what the file system
        needs to find it included. What must leave for them has left before. Returns them, or 0 if they can't
        fit. The caller calls `settle` with them once the write has ended."""
        if not self.counted.is_set():
            return 0
        size = (-(-end // self.unit) - start // self.unit + 1) * self.unit
        self._unlooked += size
        async with holding(self._lock):
            if self._unlooked >= LOOK_BYTES:
                self._look()
            if size > self.arc.capacity:
                if key in self._pinned:
                    self.refused.add(key)
                return 0
            if key in self._exempt:
                self._add_exempt(key, size)
                await self._leave(self._shrink())
            elif leave := self.arc.admit(key, size, current_request.get().caller):
                await self._leave(leave)
                if self.used > self.limit:  # someone still reads what had to leave: its space is not free yet
                    await self._leave(self._shrink())
                    if key not in self.arc:
                        return 0
            self._pending += size
            return size

    def restore(self, key: Key, size: int, frequent: bool) -> None:
        """Counts `size` bytes that an earlier run left of `key`, which is the one used last so far."""
        if key in self._exempt:
            self._add_exempt(key, size)
        else:
            self.arc.restore(key, size, frequent)

    def settle(self, key: Key, by: int, reserved: int = 0) -> None:
        """Corrects what is counted for `key` by so many bytes: what was reserved meanwhile stays counted.
        `reserved` where a write has ended for which so many bytes were reserved."""
        self._pending -= reserved
        if not by:
            return
        size = self.size(key) + by
        if key in self._exempt:
            self._add_exempt(key, by)
        elif size <= 0:
            self.arc.remove(key)
        else:
            self.arc.set_size(key, size)

    def remove(self, key: Key) -> None:
        """`key` has left the disk for other reasons."""
        if key in self._exempt:
            self._add_exempt(key, -self._exempt[key])
        else:
            self.arc.remove(key)

    def pin(self, key: Key) -> None:
        """Exempts `key` from eviction, whether or not it is there yet."""
        self._pinned.add(key)
        self._exempt_from_arc(key)

    def unpin(self, key: Key) -> None:
        """`key` may be evicted again."""
        if key in self._pinned:
            self._pinned.remove(key)
            self._back_to_arc(key, True)

    def protect(self, key: Key) -> None:
        """Exempts `key` from eviction for as long as it is read past the cache."""
        if key not in self._protected:
            self._protected[key] = self.arc.frequent(key)
            self._exempt_from_arc(key)

    def evictable(self) -> list[Key]:
        """All that is not pinned: what is protected leaves too when a user asks for it."""
        return [*self.arc, *(key for key in self._protected if key not in self._pinned)]

    def unprotect(self, key: Key) -> None:
        """Ends what `protect` began."""
        if key in self._protected:
            self._back_to_arc(key, self._protected.pop(key))

    def _exempt_from_arc(self, key: Key) -> None:
        if key not in self._exempt:
            self._exempt[key] = 0
            size = self.arc.size(key)
            self.arc.remove(key)
            self._add_exempt(key, size)

    def _back_to_arc(self, key: Key, frequent: bool) -> None:
        if key in self._pinned or key in self._protected:
            return
        size = self._exempt[key]
        self.remove(key)
        del self._exempt[key]
        if size:
            self.arc.restore(key, size, frequent)
            self.arc.refresh(key)

    async def refit(self, overhead: int, margin: int) -> None:
        """Takes in what else lies in the cache folder (`overhead` bytes, which may grow by `margin` before
        this is called again) and how much room the file system has now. What is too much for either
        leaves."""
        async with self._lock:
            self._overhead, self._margin = overhead, margin
            self._look()
            await self._leave(self._shrink())

    async def resize(self, configured: int) -> None:
        """Takes another budget. What is too much for it leaves before this returns."""
        async with self._lock:
            self.configured = self.limit = configured
            self._look()
            await self._leave(self._shrink())

    def look_soon(self) -> None:
        """The next reservation looks at the free space first: a write has just found the disk full."""
        self._unlooked = LOOK_BYTES

    async def evict(self, key: Key) -> int:
        """Removes one thing on demand; returns the bytes freed."""
        async with self._lock:
            size = self.size(key)
            self.remove(key)
            with trio.CancelScope(shield=True):  # as in `_leave`
                await self._evict(key)
            return size

    def _look(self) -> None:
        """Sets the limit to what the file system lets us have now. Under the lock: what is leaving is counted
        nowhere."""
        self._unlooked = 0
        spare = self._spare() if self.counted.is_set() else None
        if spare is not None:
            # What is reserved and not written yet is still free there.
            on_disk = self.used - self._pending - self._margin
            self.limit = max(0, min(self.configured, on_disk + spare))
            self._set_capacity()

    def _add_exempt(self, key: Key, size: int) -> None:
        self._exempt[key] += size
        self._exempt_bytes += size
        self._set_capacity()

    @property
    def _room(self) -> int:
        """What is left of the limit for all that ARC may evict; negative where the rest alone is too much."""
        return self.limit - self._overhead - self._margin - self._stuck - self._exempt_bytes

    def _set_capacity(self) -> None:
        """Without evicting: what is too much leaves with the next reservation, or by `refit`."""
        self.arc.capacity = max(0, self._room)

    def _shrink(self) -> list[Key]:
        if not self.counted.is_set():
            return []
        return self.arc.set_capacity(self._room)

    def stuck(self, size: int) -> None:
        """Something of `size` bytes could not be removed: it is counted until the next start, or until this
        is called with a negative size."""
        self._stuck += size
        self._set_capacity()

    async def _leave(self, keys: list[Key]) -> None:
        with trio.CancelScope(
            shield=True
        ):  # what was decided is done: else it would be on disk and not counted
            for key in keys:
                await self._evict(key)
                self.evictions += 1


class FreeSpace:
    """How much more of its file system a cache folder may take, so that a reserve stays free for everybody
    else."""

    def __init__(self, folder: Path, reserve: int | None) -> None:
        """`reserve` in bytes; None for the default."""
        self._folder = folder
        self._wanted = reserve
        self.total = self.free = self.reserve = 0
        """Bytes, as of the last look. `free` is what an ordinary user may take. All are 0 where the file
        system, as some on the network, does not tell its size."""
        with contextlib.suppress(OSError):  # the folder can't be made yet: it is looked at again later
            self._look()

    def _look(self) -> None:
        info = os.statvfs(self._folder)
        self.total, self.free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
        self.reserve = min(self.total // RESERVE_PART, MAX_RESERVE) if self._wanted is None else self._wanted

    def spare(self) -> int | None:
        """Bytes that the file system lets us use beyond what we use; None if it can't be asked."""
        try:
            self._look()
        except OSError:  # the folder is gone, or its disk: writing says so
            return None
        return self.free - self.reserve if self.total else None


def disk_usage(folder: Path, but_in: Collection[Path] = ()) -> int:
    """Bytes on disk of `folder` and all below it, but for what lies in `but_in`. What vanishes meanwhile, or
    can't be looked at, counts nothing. No symlink is followed."""
    total = 0
    with contextlib.suppress(OSError):
        total += folder.lstat().st_blocks * 512
        if folder not in but_in:
            with os.scandir(folder) as items:
                for item in items:
                    with contextlib.suppress(OSError):
                        if item.is_dir(follow_symlinks=False):
                            total += disk_usage(Path(item.path), but_in)
                        else:
                            total += item.stat(follow_symlinks=False).st_blocks * 512
    return total


class WriteBackoff:
    """What is wrong with the disk just now. Reads go on uncached; `status` says why, and the log once."""

    def __init__(self) -> None:
        self.reason = ""
        """What is wrong, "" where nothing is."""
        self._until = 0.0

    @property
    def waiting(self) -> bool:
        """Whether it is too early to try again."""
        return bool(self.reason) and trio.current_time() < self._until

    def failed(self, what: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        text = reason if reason.startswith(what) else f"{what}: {reason}"
        if not self.reason:
            log.warning("%s; reads go on without the cache", text)
        self.reason = text
        self._until = trio.current_time() + RETRY

    def succeeded(self) -> None:
        if self.reason:
            log.info("the cache can be written again")
            self.reason = ""
