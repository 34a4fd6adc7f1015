"""How many requests one source is sent at a time, and whose turn is next.

A stalled request must not keep others from starting, and neither must one caller's requests keep another's:

- At most `running` requests run that are not late. One that has had no answer within what its source usually
  takes is late and no longer counts; of late ones there are at most `late`. Where all places are taken, one
  is displaced, to be asked again later.
- A request that was never tried goes before those that were, and the newest of them goes first: a caller
  that has waited long is likely to wait for what nobody has, and its deadline is near. A new one, of the
  last `NEW` seconds, need not wait until others are late: only for those that began in the last `SETTLE`
  seconds, so that a crowd does not begin at once. Where all places are taken, and by none that is late,
  it takes one all the same, but only one in `SETTLE` seconds: else a crowd would leave nobody the time
  for an answer. Who lost a place so counts as never tried.
- Of several callers the one with the fewest requests in flight has its turn first. None holds more than three
  quarters of the places, and where one is to be displaced, it is one of the caller's that has most.
- A source that says that it is busy with what it was sent gets half as many from then on, and one more for
  each round of answers (additive increase, multiplicative decrease, as in TCP: D. Chiu, R. Jain, 1989).

Concurrency: one event loop, any number of tasks. Of those that wait one looks at the clock, the others cost
nothing.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import trio

from ipfsfuse.sources.base import Caller, Request, SourceRequest, current_request, current_source_request

SETTLE = 0.04
"""Seconds: see above. A new request starts within so many, unless still newer ones come faster than `running`
in it."""
NEW = 0.1
"""Seconds for which a request counts as new."""
ROTATE_FRESH, ROTATE_RETRIED = 1.0, 5.0
"""Seconds that a late request has before one that waits takes its place: a request that was never tried, one
that was. Where the source's usual answers take longer, it is twice as long as they take, or four times."""
LAST = 0.25
"""Seconds. A request that begins now gives no answer sooner."""
SHARE = 0.75
"""Of all places, how many one caller may hold. What is left is at once there for the next caller."""


@dataclass(slots=True, eq=False)
class Place:
    """One request's place (`ConcurrencyLimiter.place`)."""

    request: Request
    caller: Caller
    """On whose account it is."""
    retried: bool
    """Whether it was tried before: fresh ones go first."""
    again: bool
    """Whether it lost its place `early`: it goes with the fresh ones, and is not new."""
    queued: float
    alive: float = 0.0
    asked: SourceRequest = field(default_factory=SourceRequest)
    """It is not late while our own limits hold it back, and then no sooner than one that starts."""
    since: float = -math.inf
    """When it started."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    event: trio.Event = field(default_factory=trio.Event)
    displaced: bool = False
    """Whether its place went to another."""
    early: bool = False
    """Whether it was displaced while an answer could still have come."""
    answered: bool = False
    """Whether the source has answered: who asks says so."""

    def is_started(self) -> bool:
        return self.since > -math.inf

    def progress(self) -> None:
        """Something came for it: it is not taken for stalled."""
        self.alive = trio.current_time()


class _Queue:
    """What one caller has waiting."""

    __slots__ = ("fresh", "retried")

    def __init__(self) -> None:
        self.fresh: OrderedDict[Place, None] = OrderedDict()
        self.retried: OrderedDict[Place, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.fresh) + len(self.retried)

    def put(self, place: Place) -> None:
        (self.retried if place.retried else self.fresh)[place] = None

    def remove(self, place: Place) -> None:
        (self.retried if place.retried else self.fresh).pop(place, None)

    def head(self) -> Place:
        return next(reversed(self.fresh)) if self.fresh else next(iter(self.retried))


class ConcurrencyLimiter:
    """At most `running` requests that are not late, and `late` that are. `late_after` gives the seconds that
    make one late."""

    def __init__(self, running: int, late: int, late_after: Callable[[], float]) -> None:
        self._running = running
        self._most = running + late
        self._limit = float(self._most)
        self._lowered_at = self._early_at = -math.inf
        self._late_after = late_after
        self._active: OrderedDict[Place, None] = OrderedDict()
        """In flight and not late, the oldest first."""
        self._late: OrderedDict[Place, None] = OrderedDict()
        self._active_of: Counter[Caller] = Counter()
        self._all_of: Counter[Caller] = Counter()
        self._queues: dict[Caller, _Queue] = {}
        self._watcher: Place | None = None
        """Which of those that wait looks at the clock."""

    @property
    def in_flight(self) -> int:
        return len(self._active) + len(self._late)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def limit(self) -> int:
        """The most requests in flight, as the source bears it."""
        return int(self._limit)

    @property
    def caller_limit(self) -> int:
        """The most of them that may be one caller's."""
        return _share(self.limit)

    @asynccontextmanager
    async def place(self, retried: bool = False, again: bool = False) -> AsyncIterator[Place]:
        """A place, waited for and then held. Where it goes to another, the body is cancelled, nothing is
        raised, and `Place.displaced` is True. `retried` and `again` as in `Place`."""
        request = current_request.get()
        place = Place(request, request.caller, retried, again, queued=trio.current_time())
        try:
            if self._active or self._late or self._queues:
                await self._wait(place)
            else:  # as most often
                self._add(place)
            token = current_source_request.set(place.asked)
            try:
                with place.scope:
                    yield place
            finally:
                current_source_request.reset(token)
        finally:
            self._remove(place)
            if place.answered and self._limit < self._most:
                self._limit = min(self._limit + 1 / self._limit, float(self._most))
            if self._queues:
                self._dispatch()

    def note_busy(self, asked: float, besides: int = 0) -> bool:
        """A request that began at `asked` was refused, as too many run there. True if that may be for ours,
        those in flight and so many `besides`; then fewer are sent from now on."""
        together = self.in_flight + besides
        if together < 2:
            return False
        if asked > self._lowered_at:  # else it began before the last time, and tells the same again
            self._limit = max(1.0, min(self._limit, together) / 2)
            self._lowered_at = trio.current_time()
        return True

    # -- whose turn it is ------------------------------------------------------------------------------------

    async def _wait(self, place: Place) -> None:
        """Until there is room for `place`, which is then in flight."""
        if not self._queues:  # half of the work
            self._age(place.queued)
            if self._has_room(place, place.queued):
                self._add(place)
                return
        self._put(place)
        self._dispatch()
        if place.is_started():
            return
        joined = partial(self._join, place)
        place.request.on_join.add(joined)
        try:
            while not place.is_started():
                if self._watcher is None:
                    self._watcher = place
                if self._watcher is place:
                    with trio.move_on_after(
                        min(SETTLE, self._late_after()) + 0.0001
                    ):  # floats: not just before
                        await place.event.wait()
                    self._dispatch()
                else:
                    await place.event.wait()
                    if not place.is_started():
                        place.event = trio.Event()  # it was called to watch
        finally:
            place.request.on_join.discard(joined)
            if not place.is_started():
                self._withdraw(place)
            if self._watcher is place or self._watcher is None:
                self._watcher = None
                if self._queues:
                    next(iter(self._queues.values())).head().event.set()

    def _join(self, place: Place) -> None:
        """Another call waits for the same as `place`, which is as fresh as that call."""
        if not place.is_started():
            self._withdraw(place)
            place.queued = trio.current_time()
            self._put(place)
            self._dispatch()

    def _put(self, place: Place) -> None:
        """Queues `place` on the account of that one of its callers that has least in flight."""
        request = place.request
        if request.others:
            place.caller = min((request.caller, *request.others), key=lambda caller: self._all_of[caller])
        queue = self._queues.get(place.caller)
        if queue is None:
            queue = self._queues[place.caller] = _Queue()
        queue.put(place)

    def _withdraw(self, place: Place) -> None:
        queue = self._queues.get(place.caller)
        if queue is not None:
            queue.remove(place)
            if not queue:
                del self._queues[place.caller]

    def _dispatch(self) -> None:
        """Starts all whose turn it is."""
        while self._queues:
            now = trio.current_time()
            self._age(now)
            heads = [queue.head() for queue in self._queues.values()]
            # Those whose callers will have gone before an answer can come leave the queue: when a crowd's
            # deadline comes, each that leaves would begin another's last request.
            late = [
                head
                for head in heads
                if head.request.wanted_until - now < LAST and not self._is_new(head, now)
            ]
            if late:
                for head in late:
                    self._withdraw(head)
                continue
            if len(heads) > 1:
                heads.sort(
                    key=lambda head: (not self._is_new(head, now), self._all_of[head.caller], head.retried)
                )
            for head in heads:
                if self._has_room(head, now):
                    self._withdraw(head)
                    self._add(head)
                    head.event.set()
                    break
            else:
                return

    def _is_new(self, place: Place, now: float) -> bool:
        return not place.retried and not place.again and now - place.queued <= NEW

    def _age(self, now: float) -> None:
        after = self._late_after()
        late = list[Place]()
        for place in self._active:
            if now - place.since < after:
                break
            if now - place.asked.free_since >= after:
                late.append(place)
        for place in late:
            del self._active[place]
            self._active_of[place.caller] -= 1
            self._late[place] = None

    def _has_room(self, place: Place, now: float) -> bool:
        """Whether `place` may start now; makes room for it where there is none."""
        new = self._is_new(place, now)
        running = min(self._running, self.limit)
        if place.retried:
            running = max(1, running // 2)  # the other half is there at once for what was never tried
        full = len(self._active) >= running or self._active_of[place.caller] >= _share(running)
        if full and not (new and self._is_settled(place.caller, running, now)):
            return False
        late = self._late_after()
        if new:
            least = max(SETTLE, late)
        else:
            least = max(ROTATE_RETRIED, 4 * late) if place.retried else max(ROTATE_FRESH, 2 * late)
        while (own := self._all_of[place.caller] >= self.caller_limit) or self.in_flight >= self.limit:
            if self._displace(place.caller, own, now - least):
                continue
            # a source that takes few requests is given time to answer
            early = new and self._limit >= self._most > self._running and now - self._early_at >= SETTLE
            if not early or not self._displace(place.caller, own, now - SETTLE, early=True):
                return False
            self._early_at = now
        return True

    def _is_settled(self, caller: Caller, running: int, now: float) -> bool:
        """Whether so few began a moment ago that one more may."""
        its = 0
        for began, place in enumerate(reversed(self._active)):
            if now - place.since >= SETTLE:
                break
            its += place.caller == caller
            if began + 1 >= running or its >= _share(running):
                return False
        return True

    def _displace(self, caller: Caller, own: bool, before: float, *, early: bool = False) -> bool:
        """Ends the oldest request that began at `before` or earlier: of the caller who has most, or
        `caller`'s own. `early` where it has not had its time."""
        heaviest = caller if own else max(self._all_of, key=lambda each: self._all_of[each], default=caller)
        if self._all_of[heaviest] <= self._all_of[caller]:
            heaviest = caller
        for victim in chain(self._late, self._active):
            moved = max(victim.since, victim.alive, victim.asked.free_since)
            if victim.caller == heaviest and moved <= before:
                self._remove(victim)
                victim.displaced, victim.early = True, early
                victim.scope.cancel()
                return True
        return False

    def _add(self, place: Place) -> None:
        place.since = trio.current_time()
        self._active[place] = None
        self._active_of[place.caller] += 1
        self._all_of[place.caller] += 1

    def _remove(self, place: Place) -> None:
        if place in self._active:
            del self._active[place]
            self._active_of[place.caller] -= 1
        elif place in self._late:
            del self._late[place]
        else:
            return  # it was displaced
        self._all_of[place.caller] -= 1
        if not self._all_of[place.caller]:
            del self._all_of[place.caller], self._active_of[place.caller]


def _share(places: int) -> int:
    """One caller's part of so many places."""
    return max(1, int(places * SHARE))
