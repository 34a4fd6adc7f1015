"""How many bytes of bodies may be on their way at a time, and each source's part of them.

Concurrency: one event loop, any number of tasks.
"""

import trio


class InFlight:
    """Bytes of bodies that may be on their way, over all sources together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.freed = trio.Event()


class InFlightShare:
    """One source's part: first come, first served, and as much as `GUARANTEED` whatever the others hold, so that a
    source whose bodies drip or stall takes nothing from another. A body larger than all of it passes alone."""

    GUARANTEED = 4 << 20
    """Bytes: two of the largest blocks."""

    def __init__(self, whole: InFlight) -> None:
        self.used = 0
        self._whole = whole
        self._turn = trio.Lock()

    async def take(self, size: int) -> None:
        async with self._turn:
            while self.used and self.used + size > self.GUARANTEED and self._whole.used + size > self._whole.limit:
                await self._whole.freed.wait()
            self.used += size
            self._whole.used += size

    def give(self, size: int) -> None:
        self.used -= size
        self._whole.used -= size
        self._whole.freed.set()
        self._whole.freed = trio.Event()
