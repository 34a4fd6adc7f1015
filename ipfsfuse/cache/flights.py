"""Single flight: of all who want one key at one time, one fetch serves all.

Concurrency: everything runs on the event loop. A fetch runs in the nursery given at construction and belongs
to no caller: a cancelled caller leaves, and the fetch is cancelled with its last waiter. A cancelled fetch
holds its slot until it has rolled back: who comes meanwhile waits for that, then starts anew. Values are held
by nobody but the waiters once they have landed.
"""

import copy
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import trio

from ipfsfuse.cache.flight import Fetch, Flight
from ipfsfuse.errors import IpfsFuseError, Unavailable
from ipfsfuse.sources.base import current_request, set_request

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_REMEMBERED = 10_000
"""Failures kept at a time: what is forgotten early is only asked for once more."""
LONG_ENOUGH = 0.25
"""Part of the deadline that a key must have been waited for, for its failure to be remembered: a call that
had spent its time on other keys says little about this one."""


class Flights(Generic[K, V]):
    """Fetches under way by key, and the failures of the last seconds."""

    def __init__(
        self,
        nursery: trio.Nursery,
        deadline: float = 30.0,
        remember: float = 5.0,
        name: Callable[[K], str] = repr,
        cause: Callable[[K], str] = lambda _key: "",
    ) -> None:
        """`deadline` and `remember` in seconds; `name` spells a key for messages, and `cause` says what has
        kept its fetch, which is under way, from ending."""
        self._nursery = nursery
        self._deadline = deadline
        self._remember = remember
        self._name = name
        self._cause = cause
        self._flights: dict[K, Flight[V]] = {}
        self._failed: OrderedDict[K, tuple[float, Exception]] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        flight = self._flights.get(key)
        return flight is not None and not flight.fetch.abandoned

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: K, fetch: Callable[[], Awaitable[V]]) -> V:
        """The value of `key`: that of the fetch under way, else of a new `fetch()`. Raises the fetch's error,
        and Unavailable after the deadline, or where the call that this is for comes to the end of its own;
        both are raised at once to who asks again within the next seconds."""
        return await self.join_early(key, lambda _land: fetch())

    async def join_early(
        self, key: K, fetch: Callable[[Callable[[V], None]], Awaitable[V]], *, ended: bool = False
    ) -> V:
        """As `join`, of a fetch that may land its value before it ends: from then on it serves who comes, and
        is cancelled with nobody. With `ended`, returns when it has ended."""
        self._raise_remembered(key)
        began = trio.current_time()
        until = min(began + self._deadline, current_request().deadline)
        with trio.move_on_at(until):
            while trio.current_time() < until:
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._start(key, fetch)
                await self._wait(flight, until)
                if flight.landed:
                    if ended and not flight.ended.is_set():
                        await flight.ended.wait()
                    return flight.value  # type: ignore[return-value]  # V itself may be Optional: `landed` says it is set
                if flight.error is not None:
                    raise copy.copy(flight.error) from flight.error
        cause = self._cause(key)
        waited = trio.current_time() - began
        said = f"{self._name(key)}: no source gave it within {min(waited, self._deadline):.3g} s"
        late = Unavailable(f"{said}: {cause}" if cause else said)
        if waited >= self._deadline * LONG_ENOUGH:
            self._note_failure(key, late)
        raise late

    def launch(
        self, keys: Iterable[K], fetch: Callable[["Ride[K, V]"], Awaitable[None]], more: bool = False
    ) -> "Ride[K, V]":
        """Starts one `fetch(ride)` for those of `keys` that are not under way; it lands each as it comes, and
        may expect more. It is not started where there are none, unless it has `more` to expect.

        What has not landed when it ends is left to who waits for it: they ask for it alone. It raises
        nothing. The caller counts as one who waits, until it leaves."""
        ride: Ride[K, V] = Ride(self)
        ride.expect(keys)
        ride.join()
        if ride.keys or more:
            self._nursery.start_soon(self._ride, ride, fetch)
        else:
            ride.end()
        return ride

    async def run(self, keys: Iterable[K], fetch: Callable[["Ride[K, V]"], Awaitable[None]]) -> None:
        """As `launch`; returns when it has ended, or when for a whole deadline nothing has landed."""
        ride = self.launch(keys, fetch)
        try:
            while not ride.ended.is_set():
                with trio.move_on_after(self._deadline) as patience:
                    await ride.news.wait()
                    ride.news = trio.Event()
                if patience.cancelled_caught:
                    return
        finally:
            ride.leave()

    async def _ride(self, ride: "Ride[K, V]", fetch: Callable[["Ride[K, V]"], Awaitable[None]]) -> None:
        set_request(ride.request)
        try:
            with ride.scope:
                try:
                    await fetch(ride)
                except IpfsFuseError:
                    # whoever waits asks for its block alone, and hears what is wrong with that one
                    pass
                except Exception:
                    log.exception(
                        "a fetch of several blocks ended by what no one foresaw; each is asked for alone"
                    )
        finally:
            ride.end()

    def _board(self, key: K, fetch: Fetch) -> Flight[V] | None:
        """A flight of `key` by `fetch`; None where one is under way."""
        if key in self._flights:
            return None
        flight = self._flights[key] = Flight[V](fetch)
        return flight

    def _start(self, key: K, fetch: Callable[[Callable[[V], None]], Awaitable[V]]) -> Flight[V]:
        flight: Flight[V] = Flight(Fetch())
        self._flights[key] = flight
        self._nursery.start_soon(self._fly, key, flight, fetch)
        return flight

    async def _fly(
        self, key: K, flight: Flight[V], fetch: Callable[[Callable[[V], None]], Awaitable[V]]
    ) -> None:
        def land(value: V) -> None:
            flight.fetch.interest += 1  # its own
            self._land(key, flight, value)

        set_request(flight.fetch.request)
        try:
            with flight.fetch.scope:
                try:
                    value = await fetch(land)
                    if not flight.landed:
                        self._land(key, flight, value)
                except Exception as exc:
                    if flight.landed:
                        log.exception("a fetch whose value had landed ended by what no one foresaw")
                    elif not flight.fetch.abandoned:
                        flight.error = exc
                        if isinstance(exc, IpfsFuseError):
                            self._note_failure(key, exc)
        finally:
            if not flight.landed and flight.error is None and not flight.fetch.abandoned:
                flight.error = Unavailable(f"{self._name(key)}: the cache is being closed")
            self._end(key, flight)

    async def _wait(self, flight: Flight[V], until: float) -> None:
        if flight.fetch.abandoned:
            await flight.done.wait()
            return
        flight.fetch.join(until)
        try:
            await flight.done.wait()
        finally:
            flight.fetch.leave()

    def _land(self, key: K, flight: Flight[V], value: V) -> None:
        flight.value, flight.landed = value, True
        self._failed.pop(key, None)
        flight.done.set()

    def _end(self, key: K, flight: Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.done.set()
        flight.ended.set()

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


class Ride(Fetch, Generic[K, V]):
    """A fetch of several keys, as it sees itself."""

    __slots__ = ("_flights", "_landed", "_waiting", "ended", "news")

    def __init__(self, flights: Flights[K, V]) -> None:
        super().__init__()
        self.ended = trio.Event()
        self.news = trio.Event()
        """Set with each landing."""
        self._flights = flights
        self._waiting: dict[K, Flight[V]] = {}
        self._landed: dict[K, Flight[V] | None] = {}
        """None once it is kept."""

    @property
    def keys(self) -> Sequence[K]:
        """What is still expected."""
        return list(self._waiting)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def expect(self, keys: Iterable[K]) -> None:
        """`keys` come too: who wants one waits for this fetch, unless another one is under way."""
        for key in keys:
            if key not in self._landed and (flight := self._flights._board(key, self)) is not None:
                self._waiting[key] = flight

    def land(self, key: K, value: V) -> None:
        """`key` has come, and serves who comes until it is `kept`."""
        flight = self._waiting.pop(key, None)
        if flight is not None:
            self._landed[key] = flight
            self._flights._land(key, flight, value)
            self.news.set()

    def kept(self, key: K) -> None:
        """Where `key` was to be kept, it is."""
        flight = self._landed.get(key)
        if flight is not None:
            self._landed[key] = None
            self._flights._end(key, flight)

    def end(self) -> None:
        """Nothing more comes."""
        for key, flight in [*self._waiting.items(), *self._landed.items()]:
            if flight is not None:
                self._flights._end(key, flight)
        self.ended.set()
        self.news.set()
