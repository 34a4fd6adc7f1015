"""Single flight: of all who want one key at one time, one fetch serves all.

Concurrency: everything runs on the event loop. A fetch runs in the nursery given at construction and belongs to no
caller: a cancelled caller leaves, and the fetch is cancelled with its last waiter. A cancelled fetch holds its slot
until it has rolled back: who comes meanwhile waits for that, then starts anew. Values are held by nobody but the
waiters once they have landed.
"""

import copy
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import trio

from ipfsfuse.errors import IpfsFuseError, Unavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

Land = Callable[[K, V], None]
"""Called with each key of a run and its value, as it comes."""

MAX_REMEMBERED = 10_000
"""Failures kept at a time: what is forgotten early is only asked for once more."""


class _Fetch:
    """One running fetch, of one key or of a run of them."""

    __slots__ = ("abandoned", "interest", "scope")

    def __init__(self) -> None:
        self.interest = 0
        self.abandoned = False
        self.scope = trio.CancelScope()

    def leave(self) -> None:
        self.interest -= 1
        if self.interest == 0:
            self.abandoned = True
            self.scope.cancel()


class _Flight(Generic[V]):
    __slots__ = ("done", "error", "fetch", "landed", "value")

    def __init__(self, fetch: _Fetch) -> None:
        self.fetch = fetch
        self.done = trio.Event()
        self.landed = False
        self.value: V | None = None
        self.error: Exception | None = None


class Flights(Generic[K, V]):
    """Fetches under way by key, and the failures of the last seconds."""

    def __init__(self, nursery: trio.Nursery, deadline: float = 30.0, remember: float = 5.0, name: Callable[[K], str] = repr) -> None:
        """`deadline` and `remember` in seconds; `name` spells a key for messages."""
        self._nursery = nursery
        self._deadline = deadline
        self._remember = remember
        self._name = name
        self._flights: dict[K, _Flight[V]] = {}
        self._failed: OrderedDict[K, tuple[float, Exception]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        flight = self._flights.get(key)
        return flight is not None and not flight.fetch.abandoned

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: K, fetch: Callable[[], Awaitable[V]]) -> V:
        """The value of `key`: that of the fetch under way, else of a new `fetch()`. Raises the fetch's error, and
        Unavailable after the deadline; both are raised at once to who asks again within the next seconds."""
        self._raise_remembered(key)
        with trio.move_on_after(self._deadline):
            while True:
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._start(key, fetch)
                await self._wait(flight)
                if flight.landed:
                    return flight.value  # type: ignore[return-value]  # V itself may be Optional: `landed` says it is set
                if flight.error is not None:
                    raise copy.copy(flight.error) from flight.error
        late = Unavailable(f"{self._name(key)}: no source gave it within {self._deadline:g} s")
        self._note_failure(key, late)
        raise late

    async def run(self, keys: Iterable[K], fetch: Callable[[Sequence[K], Land[K, V]], Awaitable[None]]) -> None:
        """One `fetch(keys, land)` for those of `keys` that are not under way; it calls `land(key, value)` for each as it comes.

        Returns when it has ended. What has not landed then is left to who waits for it: they ask for it alone. The
        caller counts as one who waits; gives up when for a whole deadline nothing has landed; raises nothing."""
        ride = _Fetch()
        mine = [key for key in dict.fromkeys(keys) if key not in self._flights]
        for key in mine:
            self._flights[key] = _Flight(ride)
        if not mine:
            return
        ride.interest = 1
        ended, news = trio.Event(), [trio.Event()]
        self._nursery.start_soon(self._ride, ride, mine, fetch, ended, news)
        try:
            while not ended.is_set():
                with trio.move_on_after(self._deadline) as patience:
                    await news[0].wait()
                    news[0] = trio.Event()
                if patience.cancelled_caught:
                    return
        finally:
            ride.leave()

    async def _ride(
        self, ride: _Fetch, mine: list[K], fetch: Callable[[Sequence[K], Land[K, V]], Awaitable[None]], ended: trio.Event, news: list[trio.Event]
    ) -> None:
        flights = {key: self._flights[key] for key in mine}

        def land(key: K, value: V) -> None:
            flight = flights.get(key)
            if flight is not None and not flight.landed:
                self._land(key, flight, value)
                news[0].set()

        try:
            with ride.scope:
                try:
                    await fetch(mine, land)
                except Exception:  # whoever waits asks for its block alone, and hears what is wrong with that one
                    pass
        finally:
            for key, flight in flights.items():
                if not flight.landed:
                    self._end(key, flight)
            ended.set()
            news[0].set()

    def _start(self, key: K, fetch: Callable[[], Awaitable[V]]) -> _Flight[V]:
        flight: _Flight[V] = _Flight(_Fetch())
        self._flights[key] = flight
        self._nursery.start_soon(self._fly, key, flight, fetch)
        return flight

    async def _fly(self, key: K, flight: _Flight[V], fetch: Callable[[], Awaitable[V]]) -> None:
        try:
            with flight.fetch.scope:
                try:
                    self._land(key, flight, await fetch())
                except Exception as exc:
                    if not flight.fetch.abandoned:
                        flight.error = exc
                        if isinstance(exc, IpfsFuseError):
                            self._note_failure(key, exc)
        finally:
            if not flight.landed:
                if flight.error is None and not flight.fetch.abandoned:
                    flight.error = Unavailable(f"{self._name(key)}: the cache is being closed")
                self._end(key, flight)

    async def _wait(self, flight: _Flight[V]) -> None:
        if flight.fetch.abandoned:
            await flight.done.wait()
            return
        flight.fetch.interest += 1
        try:
            await flight.done.wait()
        finally:
            flight.fetch.leave()

    def _land(self, key: K, flight: _Flight[V], value: V) -> None:
        flight.value, flight.landed = value, True
        self._failed.pop(key, None)
        self._end(key, flight)

    def _end(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.done.set()

    def _note_failure(self, key: K, error: Exception) -> None:
        self._failed.pop(key, None)
        self._failed[key] = (trio.current_time() + self._remember, error)
        if len(self._failed) > MAX_REMEMBERED:
            self._failed.popitem(last=False)

    def _raise_remembered(self, key: K) -> None:
        known = self._failed.get(key)
        if known is None:
            return
        if trio.current_time() < known[0]:
            raise copy.copy(known[1]) from known[1]
        del self._failed[key]
