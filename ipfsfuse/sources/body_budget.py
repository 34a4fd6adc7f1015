"""How many bytes of bodies may be on their way from all sources together, and what part of that is each source's own.

Concurrency: one event loop, any number of tasks; first come, first served.
"""

import trio


class BodyBudget:
    """Bytes of bodies that may be on their way at a time, over all sources together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.freed = trio.Event()

    def give(self, size: int) -> None:
        self.used -= size
        self.freed.set()
        self.freed = trio.Event()


class BodyShare:
    """One source's part of a budget: first come, first served, and as much as `GUARANTEED` whatever the others hold, so
    that a source whose bodies drip or stall takes no room from another. A body larger than all of it passes alone."""

    GUARANTEED = 4 << 20
    """Bytes: two of the largest blocks."""

    def __init__(self, budget: BodyBudget) -> None:
        self.used = 0
        self._budget = budget
        self._turn = trio.Lock()

    async def take(self, size: int) -> None:
        async with self._turn:
            while self.used and self.used + size > self.GUARANTEED and self._budget.used + size > self._budget.limit:
                await self._budget.freed.wait()
            self.used += size
            self._budget.used += size

    def give(self, size: int) -> None:
        self.used -= size
        self._budget.give(size)
