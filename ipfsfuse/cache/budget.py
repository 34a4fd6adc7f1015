"""The budget: nothing is written before room is reserved for it.

`used` is a number of bytes, in file-system blocks. It counts staging files and packs, what writes under way
may add to them, what is pinned, and everything else in the cache folder with what that may grow by. ARC
decides what is evicted. A reservation returns after the eviction is done on disk, and no other reservation
returns in between. So the sum on disk never exceeds `limit`.

Until the content of an earlier run has been `counted`, nothing is reserved and nothing is evicted.

`limit` is the configured budget, or less if the file system is too full for it: a reserve stays free for
others. It is computed again after each `LOOK_BYTES` reserved, and when `refit` is called.

Concurrency: on the event loop; one reservation that evicts, or one removal, at a time.
"""

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

import trio

from ipfsfuse.cache.arc import Arc
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.base import current_request

log = logging.getLogger(__name__)

Key = Cid | int
"""A staging file by its CID, a pack by its number."""

LOOK_BYTES = 4 << 20
"""Bytes reserved between two looks at the free space. A look takes some microseconds."""
RESERVE_PART, MAX_RESERVE = 20, 2 << 30
"""The default reserve: a twentieth of the file system, at most 2 GiB."""
RETRY = 5.0
"""Seconds after a failed write during which nothing is written."""


class Budget:
    def __init__(
        self,
        configured: int,
        evict: Callable[[Key], Awaitable[None]],
        spare: Callable[[], int | None],
    ) -> None:
        """`evict` removes one staging file or pack from the disk, and reports its own failure. `spare`
        returns how many more bytes the file system can take before the reserve is used: negative if the
        reserve is already used in part, None if it is unknown. The caller calls `restore` with each item of
        an earlier run, and then sets `counted`."""
        self.configured = configured
        self.limit = configured
        self.unit = 4096
        """Bytes of a file-system block."""
        self.counted = trio.Event()
        """Set when `used` includes everything of an earlier run."""
        self.arc: Arc[Key] = Arc(configured)
        self.evictions = 0
        self.refused: set[Key] = set()
        """Items that should be pinned but did not fit."""
        self._evict = evict
        self._spare = spare
        self._lock = trio.Lock()
        self._overhead = 0
        self._margin = 0
        self._stuck = 0
        self._exempt: dict[Key, int] = {}
        """Bytes of each item that may not be evicted because it is pinned or protected."""
        self._exempt_bytes = 0
        self._pinned: set[Key] = set()
        self._protected: dict[Key, bool] = {}
        """For each protected item, whether it was used more than once (ARC's second list)."""
        self._pending = 0
        self._unlooked = 0

    @property
    def used(self) -> int:
        return self._overhead + self._margin + self._stuck + self._exempt_bytes + self.arc.bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of all pinned items."""
        protected = sum(self._exempt[key] for key in self._protected if key not in self._pinned)
        return self._exempt_bytes - protected

    @property
    def protected_bytes(self) -> int:
        """Bytes of all protected items."""
        return sum(self._exempt[key] for key in self._protected)

    def is_pinned(self, key: Key) -> bool:
        return key in self._pinned

    def size(self, key: Key) -> int:
        return self._exempt.get(key) or self.arc.size(key)

    async def reserve(self, key: Key, start: int, end: int) -> int:
        """Reserves for `key` the most bytes on disk that writing [start, end) can take, with the file
        system's own. Evicts what must make room for them before it returns. Returns the number of bytes, or 0
        if they can't fit. The caller calls `adjust` with it when the write has ended."""
        if not self.counted.is_set():
            return 0
        size = (-(-end // self.unit) - start // self.unit + 1) * self.unit
        self._unlooked += size
        async with self._lock:
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
                if self.used > self.limit:  # an evicted item is still read, so its space is not free yet
                    await self._leave(self._shrink())
                    if key not in self.arc:
                        return 0
            self._pending += size
            return size

    def restore(self, key: Key, size: int, frequent: bool) -> None:
        """Counts `size` bytes of `key` from an earlier run. Call it in the order of use."""
        if key in self._exempt:
            self._add_exempt(key, size)
        else:
            self.arc.restore(key, size, frequent)

    def adjust(self, key: Key, by: int, reserved: int = 0) -> None:
        """Adds `by` bytes, which may be negative, to what is counted for `key`. Bytes that others reserved
        meanwhile stay counted. `reserved`: the bytes that were reserved for a write that has ended."""
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
        """`key` was removed from the disk for another reason than eviction."""
        if key in self._exempt:
            self._add_exempt(key, -self._exempt[key])
        else:
            self.arc.remove(key)

    def pin(self, key: Key) -> None:
        """Exempts `key` from eviction. It need not exist yet."""
        self._pinned.add(key)
        self._exempt_from_arc(key)

    def unpin(self, key: Key) -> None:
        """Lets `key` be evicted again."""
        if key in self._pinned:
            self._pinned.remove(key)
            self._back_to_arc(key, True)

    def protect(self, key: Key) -> None:
        """Exempts `key` from eviction while the kernel reads its staging file itself."""
        if key not in self._protected:
            self._protected[key] = self.arc.frequent(key)
            self._exempt_from_arc(key)

    def evictable(self) -> list[Key]:
        """All items that are not pinned. They include protected ones, which a user may evict."""
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
            self.arc.bring_back(key, size, frequent)

    async def refit(self, overhead: int, margin: int) -> None:
        """Counts everything else in the cache folder (`overhead` bytes, which may grow by `margin` before the
        next call), and looks at the free space. Evicts what no longer fits."""
        async with self._lock:
            self._overhead, self._margin = overhead, margin
            self._look()
            await self._leave(self._shrink())

    async def resize(self, configured: int) -> None:
        """Changes the budget. Evicts what no longer fits before it returns."""
        async with self._lock:
            self.configured = self.limit = configured
            self._look()
            await self._leave(self._shrink())

    def look_soon(self) -> None:
        """Makes the next reservation look at the free space first, because a write has found the disk
        full."""
        self._unlooked = LOOK_BYTES

    async def evict(self, key: Key) -> int:
        """Evicts one item on demand. Returns the bytes freed."""
        async with self._lock:
            size = self.size(key)
            self.remove(key)
            with trio.CancelScope(shield=True):  # as in `_leave`
                await self._evict(key)
            return size

    def _look(self) -> None:
        """Sets the limit to what the file system has room for now. Call it with the lock, because items that
        are being evicted are not counted."""
        self._unlooked = 0
        spare = self._spare() if self.counted.is_set() else None
        if spare is not None:
            # bytes that are reserved and not written yet are still free on disk
            on_disk = self.used - self._pending - self._margin
            self.limit = max(0, min(self.configured, on_disk + spare))
            self._set_capacity()

    def _add_exempt(self, key: Key, size: int) -> None:
        self._exempt[key] += size
        self._exempt_bytes += size
        self._set_capacity()

    @property
    def _room(self) -> int:
        """The part of the limit that is left for items that ARC may evict; negative if the others alone are
        too much."""
        return self.limit - self._overhead - self._margin - self._stuck - self._exempt_bytes

    def _set_capacity(self) -> None:
        """Sets ARC's capacity. Does not evict: the next reservation or `refit` does."""
        self.arc.capacity = max(0, self._room)

    def _shrink(self) -> list[Key]:
        if not self.counted.is_set():
            return []
        return self.arc.set_capacity(self._room)

    def stuck(self, size: int) -> None:
        """Counts `size` bytes that could not be removed, until the next start or a call with a negative
        size."""
        self._stuck += size
        self._set_capacity()

    async def _leave(self, keys: list[Key]) -> None:
        with trio.CancelScope(shield=True):  # ARC no longer counts them, so they must be removed
            for key in keys:
                await self._evict(key)
                self.evictions += 1


class FreeSpace:
    """How many more bytes of its file system a cache folder may take, so that a reserve stays free for
    others."""

    def __init__(self, folder: Path, reserve: int | None) -> None:
        """`reserve` in bytes; None for the default."""
        self._folder = folder
        self._wanted = reserve
        self.total = self.free = self.reserve = 0
        """Bytes at the last look. `free` is what an ordinary user may take. All are 0 if the file system does
        not tell its size, as some network file systems do not."""
        with contextlib.suppress(OSError):  # the folder does not exist yet: `spare` looks again
            self._look()

    def _look(self) -> None:
        info = os.statvfs(self._folder)
        self.total, self.free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
        self.reserve = min(self.total // RESERVE_PART, MAX_RESERVE) if self._wanted is None else self._wanted

    def spare(self) -> int | None:
        """The bytes that we may use in addition; None if that is unknown."""
        try:
            self._look()
        except OSError:  # the folder or its disk is gone: a write reports that
            return None
        return self.free - self.reserve if self.total else None


def disk_usage(folder: Path, but_in: Collection[Path] = ()) -> int:
    """Bytes on disk of `folder` and everything below it, without the content of the folders `but_in`. What
    vanishes meanwhile or can't be read counts as nothing. Follows no symlink."""
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
    """Remembers that a write failed, so that nothing is written for RETRY seconds. Reads go on without the
    cache; `status` says why, and the log says it once."""

    def __init__(self) -> None:
        self.reason = ""
        """Why the last write failed; "" if it succeeded."""
        self._until = 0.0

    @property
    def waiting(self) -> bool:
        """Whether it is too early to write again."""
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
