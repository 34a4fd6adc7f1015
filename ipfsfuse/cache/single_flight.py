"""Single flight: one fetch serves all callers that want the same key at the same time.

Concurrency: everything runs on the event loop. A fetch runs in the nursery given at construction and belongs
to no caller. If its last waiter is cancelled, the fetch is cancelled. A cancelled fetch keeps its key until
it has rolled back; a caller that comes meanwhile waits for that, and then starts a new fetch. After a value
is resolved, only the waiters keep a reference to it.
"""

import copy
import logging
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import trio

from ipfsfuse.errors import IpfsFuseError, StoreFailed, Unavailable
from ipfsfuse.sources.base import Request, current_request

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MAX_REMEMBERED = 10_000
"""Failures that are remembered. Forgetting one early costs another fetch, nothing else."""
LONG_ENOUGH = 0.25
"""The part of the deadline that a caller must have waited for a key before its failure is remembered. A call
that spent its time on other keys says little about this one."""


@dataclass(slots=True, eq=False)
class Fetch(Request):
    """One running fetch of one key or of a batch. It is a request that is charged to the caller that began it
    and to the others that wait for it."""

    wanted_until: float = -math.inf
    interest: int = 0
    """How many callers wait for it. When the last one leaves, it is cancelled."""
    abandoned: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @contextmanager
    def waiting(self, until: float = math.inf) -> Iterator[None]:
        """A context manager in which one more caller waits for the fetch, at most until `until`."""
        self.interest += 1
        self.wanted_until = max(self.wanted_until, until)
        caller = current_request.get().caller
        if caller != self.caller:
            self.others.add(caller)
        for call in list(self.on_join):
            call()
        try:
            yield
        finally:
            self.interest -= 1
            if self.interest == 0:
                self.abandoned = True
                self.scope.cancel()


@dataclass(slots=True, eq=False)
class Flight(Generic[V]):
    """One key, and its fetch."""

    fetch: Fetch
    done: trio.Event = field(default_factory=trio.Event)
    """Set when there is a value or an error."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set when the value is staged, or the fetch has ended."""
    result: tuple[V] | None = None
    """The value in a tuple; None until there is one."""
    error: Exception | None = None


Fetching = Callable[[], AsyncGenerator[V]]
"""Yields the value of a key. Callers need not wait for what it does after that."""


class SingleFlight(Generic[K, V]):
    """The fetches under way, by key, and the failures of the last seconds."""

    def __init__(
        self,
        nursery: trio.Nursery,
        deadline: float = 30.0,
        remember: float = 5.0,
        name: Callable[[K], str] = repr,
        cause: Callable[[K], str] = lambda _key: "",
    ) -> None:
        """`deadline` and `remember` are in seconds. `name` makes a text of a key for messages. `cause` says
        why a running fetch of a key has not ended yet."""
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

    async def join(self, key: K, fetch: Fetching[V], spelled: K | None = None, *, ended: bool = False) -> V:
        """The value of `key`, from the fetch under way or from a new `fetch()`. A fetch that has yielded its
        value serves all callers until it ends, and is not cancelled when they leave. With `ended`, waits
        until the fetch has ended. `spelled`: this caller's spelling of the key, for messages.

        Raises the error of the fetch. Raises Unavailable after the deadline, or at the deadline of the
        current request; StoreFailed if only the end of the fetch did not come until then. A caller that asks
        again within the next seconds gets the same error at once, but for StoreFailed."""
        name = partial(self._name, key if spelled is None else spelled)
        began = trio.current_time()
        known = self._failed.get(key)
        if known is not None:
            if began < known[0]:
                raise copy.copy(known[1]) from known[1]
            del self._failed[key]
        until = min(began + self._deadline, current_request.get().deadline)
        came = False
        with trio.move_on_at(until):
            while trio.current_time() < until:
                flight = self._flights.get(key)
                if flight is None:
                    asked = current_request.get()
                    flight = self._flights[key] = Flight(Fetch(asked.caller, number=asked.number))
                    self._nursery.start_soon(self._run_fetch, key, flight, fetch, name)
                if flight.fetch.abandoned:
                    await flight.done.wait()
                else:
                    with flight.fetch.waiting(until):
                        await flight.done.wait()
                if flight.result is not None:
                    came = True
                    if ended and not flight.ended.is_set():
                        await flight.ended.wait()
                    return flight.result[0]
                if flight.error is not None:
                    raise copy.copy(flight.error) from flight.error
        waited = trio.current_time() - began
        if came:
            raise StoreFailed(f"{name()}: the disk has not written it within {round(waited, 1):g} s")
        cause = self._cause(key)
        message = f"{name()}: no source gave it within {round(min(waited, self._deadline), 1):g} s"
        late = Unavailable(f"{message}: {cause}" if cause else message)
        if waited >= self._deadline * LONG_ENOUGH:
            self._note_failure(key, late)
        try:
            raise late
        finally:
            del late  # otherwise it and this frame would refer to each other

    def arrived(self, key: K) -> V | None:
        """The value of `key`, if its fetch has yielded it and has not ended."""
        flight = self._flights.get(key)
        return flight.result[0] if flight is not None and flight.result is not None else None

    async def wait_until_staged(self) -> None:
        """Returns when all fetches that have yielded their values have ended."""
        for flight in list(self._flights.values()):
            if flight.result is not None:
                await flight.ended.wait()

    def start_batch(
        self, keys: Iterable[K], fetch: Callable[["Batch[K, V]"], Awaitable[None]], more: bool = False
    ) -> "Batch[K, V]":
        """Starts one `fetch(batch)` for those of `keys` that are not under way. `fetch` calls `batch.resolve`
        for each key that arrives, and may call `batch.expect` with more keys. Without keys it is not started,
        unless `more` is True: it will expect some.

        If a key is not resolved when `fetch` ends, its waiters fetch it alone. Exceptions of `fetch` are not
        raised. It is cancelled when its last waiter leaves."""
        asked = current_request.get()
        batch = Batch(asked.caller, number=asked.number, wanted_until=math.inf, flights=self)
        batch.expect(keys)
        if batch.keys or more:
            self._nursery.start_soon(self._run_batch_fetch, batch, fetch)
        else:
            batch.end()
        return batch

    async def run_batch(self, keys: Iterable[K], fetch: Callable[["Batch[K, V]"], Awaitable[None]]) -> None:
        """Starts a batch and waits for it. Returns when it has ended, or when no key was resolved for a whole
        deadline."""
        batch = self.start_batch(keys, fetch)
        with batch.waiting():
            while not batch.ended.is_set():
                with trio.move_on_after(self._deadline) as patience:
                    await batch.arrived.wait()
                    batch.arrived = trio.Event()
                if patience.cancelled_caught:
                    return

    async def _run_batch_fetch(
        self, batch: "Batch[K, V]", fetch: Callable[["Batch[K, V]"], Awaitable[None]]
    ) -> None:
        current_request.set(batch)
        try:
            with batch.scope:
                try:
                    await fetch(batch)
                except* IpfsFuseError:
                    # each waiter fetches its block alone and gets the error of that block
                    pass
                except* Exception:
                    log.exception("a fetch of several blocks ended unexpectedly; each block is fetched alone")
        finally:
            batch.end()

    async def _run_fetch(
        self, key: K, flight: Flight[V], fetch: Fetching[V], name: Callable[[], str]
    ) -> None:
        current_request.set(flight.fetch)
        try:
            with flight.fetch.scope:
                try:
                    async with aclosing(fetch()) as values:
                        async for value in values:
                            flight.fetch.interest += 1  # so that it goes on when all callers have left
                            self._resolve(key, flight, value)
                except Exception as exc:
                    if flight.result is not None:
                        log.exception("a fetch failed unexpectedly after it had given its value")
                    elif not flight.fetch.abandoned:
                        flight.error = exc
                        if isinstance(exc, IpfsFuseError):
                            exc.__traceback__ = None  # it would keep this frame and the flight alive
                            self._note_failure(key, exc)
        finally:
            if flight.result is None and flight.error is None and not flight.fetch.abandoned:
                flight.error = Unavailable(f"{name()}: the cache is being closed")
            self._end(key, flight)

    def _resolve(self, key: K, flight: Flight[V], value: V) -> None:
        flight.result = (value,)
        self._failed.pop(key, None)
        flight.done.set()

    def _end(self, key: K, flight: Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.done.set()
        flight.ended.set()

    def _note_failure(self, key: K, error: Exception) -> None:
        self._failed.pop(key, None)
        bare = copy.copy(error)  # without its traceback, which would keep the call's objects alive
        self._failed[key] = (trio.current_time() + self._remember, bare)
        if len(self._failed) > MAX_REMEMBERED:
            self._failed.popitem(last=False)


@dataclass(slots=True, eq=False, kw_only=True)
class Batch(Fetch, Generic[K, V]):
    """A fetch of several keys. The function that fetches them calls `expect`, `resolve` and `staged`."""

    flights: SingleFlight[K, V]
    ended: trio.Event = field(default_factory=trio.Event)
    arrived: trio.Event = field(default_factory=trio.Event)
    """Set when a key is resolved, and at the end."""
    _waiting: dict[K, Flight[V]] = field(default_factory=dict)
    _resolved: dict[K, Flight[V] | None] = field(default_factory=dict)
    """None once it is staged."""

    @property
    def keys(self) -> Sequence[K]:
        """The keys that have not arrived yet."""
        return list(self._waiting)

    def __contains__(self, key: K) -> bool:
        return key in self._waiting

    def expect(self, keys: Iterable[K]) -> None:
        """Adds `keys` to this fetch, so that their callers wait for it. Skips keys of other running
        fetches."""
        under_way = self.flights._flights
        for key in keys:
            if key not in self._resolved and key not in under_way:
                self._waiting[key] = under_way[key] = Flight(self)

    def resolve(self, key: K, value: V) -> None:
        """`key` has arrived. Its value serves all callers until `staged` is called."""
        flight = self._waiting.pop(key, None)
        if flight is not None:
            self._resolved[key] = flight
            self.flights._resolve(key, flight, value)
            self.arrived.set()

    def staged(self, key: K) -> None:
        """The value of `key` is staged, or could not be staged. Later callers look on the disk."""
        flight = self._resolved.get(key)
        if flight is not None:
            self._resolved[key] = None
            self.flights._end(key, flight)

    def end(self) -> None:
        """No more keys arrive."""
        for key, flight in [*self._waiting.items(), *self._resolved.items()]:
            if flight is not None:
                self.flights._end(key, flight)
        self.ended.set()
        self.arrived.set()
