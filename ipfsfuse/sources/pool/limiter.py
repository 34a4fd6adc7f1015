"""Bounds that a stalled request can't use up: how many run at a time, and how many bytes are on their way.

A request that is late (no answer within what its source usually takes) no longer counts among the running ones; late
ones are bounded too, and the oldest is displaced, to be asked again later, when there are too many.

Concurrency: one event loop, any number of tasks; first come, first served. Waiting costs no slot of anything.
"""

from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

import trio


class Slot:
    """One request's place: an async context. Where the place goes to another, the body is cancelled, nothing is raised,
    and `displaced` is True."""

    __slots__ = ("_slots", "_stale", "displaced", "scope", "since")

    def __init__(self, limiter: "ConcurrencyLimiter", stale: bool) -> None:
        self._slots = limiter
        self._stale = stale
        self.since = 0.0
        self.scope = trio.CancelScope()
        self.displaced = False

    async def __aenter__(self) -> "Slot":
        await self._slots.wait(self, self._stale)
        self.scope.__enter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> bool:
        self._slots.leave(self)
        return bool(self.scope.__exit__(kind, exc, trace))


class ConcurrencyLimiter:
    """At most `running` requests that are not late, and `late` that are. `late_after` gives the seconds that make one late."""

    ROTATE = 5.0
    """A displaced request takes over from a late one only if that has had so many seconds."""

    def __init__(self, running: int, late: int, late_after: Callable[[], float]) -> None:
        self._running = running
        self._most_late = late
        self._late_after = late_after
        self._active: OrderedDict[Slot, None] = OrderedDict()
        self._late: OrderedDict[Slot, None] = OrderedDict()
        self._turn = trio.Lock()
        self._stale_turn = trio.Lock()
        self._freed = trio.Event()

    @property
    def in_flight(self) -> int:
        return len(self._active) + len(self._late)

    def enter(self, *, stale: bool = False) -> Slot:
        """A place to be entered. `stale` for a request that was displaced before: all fresh ones go first."""
        return Slot(self, stale)

    def leave(self, slot: Slot) -> None:
        self._active.pop(slot, None)
        self._late.pop(slot, None)
        self._freed.set()
        self._freed = trio.Event()

    async def wait(self, slot: Slot, stale: bool) -> None:
        """Until there is room for `slot`, which then counts as running."""
        lock = self._stale_turn if stale else self._turn
        if lock.locked() or not self._has_room(stale):
            async with lock:  # only the first of the queue looks, the others cost nothing
                while not self._has_room(stale):
                    with trio.move_on_at(self._next_chance(stale)):
                        await self._freed.wait()
                self._start(slot)
        else:
            self._start(slot)

    def _start(self, slot: Slot) -> None:
        slot.since = trio.current_time()
        self._active[slot] = None

    def _has_room(self, stale: bool) -> bool:
        if stale and self._turn.locked():
            return False
        now = trio.current_time()
        after = self._late_after()
        while self._active:
            oldest = next(iter(self._active))
            if now - oldest.since < after:
                break
            del self._active[oldest]
            self._late[oldest] = None
        if len(self._active) >= self._running:
            return False
        if len(self._late) < self._most_late or not self._late:
            return True
        oldest = next(iter(self._late))
        if stale and now - oldest.since < self.ROTATE:
            return False
        del self._late[oldest]
        oldest.displaced = True
        oldest.scope.cancel()
        return True

    def _next_chance(self, stale: bool) -> float:
        """When the oldest running request becomes late, or the oldest late one may be displaced."""
        now = trio.current_time()
        if stale or not self._active:
            return now + 0.1
        return max(next(iter(self._active)).since + self._late_after(), now + 0.0001)  # a sum of floats may end just before
