"""Limits how many requests one source is sent at a time, and decides which request is next.

A stalled request must not keep others from starting, and one caller's requests must not block another
caller's:

- At most `running` requests run that are not late. A request is late if it has had no answer for as long as
its source usually takes. Late requests don't count as running; there are at most `late` of them. If all
permits are taken, a late request is displaced: it is cancelled, and asked again later.
- A request that was never tried goes before those that were. Among the untried, the newest goes first: a
caller that has waited long is likely to wait for a block that nobody has, and its deadline is near.
- A new request (of the last `NEW` seconds) need not wait until others are late. It starts unless `running`
  requests began in the last `CROWD_SECONDS`, so that a crowd does not start at once. If all permits are taken
  and no request is late, it displaces one all the same, but only once in `CROWD_SECONDS`: otherwise a crowd
  would leave no request the time to be answered. A request that was displaced so early counts as never tried.
- Among several callers, the one with the fewest requests in flight is next. No caller holds more than three
  quarters of the permits. The request that is displaced belongs to the caller that has most.
- If a source answers that it is busy, it gets half as many requests from then on, and one more for each round
of answers (additive increase, multiplicative decrease, as in TCP: D. Chiu, R. Jain, 1989).

Concurrency: one event loop, any number of tasks. One of the waiting tasks wakes up by the clock, the others
sleep.
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

CROWD_SECONDS = 0.04
"""Seconds, see above. A new request starts within this time, unless more than `running` newer ones come in
it."""
NEW = 0.1
"""Seconds for which a request counts as new."""
ROTATE_FRESH, ROTATE_RETRIED = 1.0, 5.0
"""Seconds after which a waiting request may displace a late one: if the waiting request was never tried, and
if it was. If the source's usual answers take longer, it is two or four times that long."""
MIN_ANSWER = 0.25
"""Seconds that an answer takes at least. A request that is wanted for less time is not started, unless it is
new."""
CALLER_SHARE = 0.75
"""The part of all permits that one caller may hold. The rest is free for the next caller at once."""


@dataclass(slots=True, eq=False)
class Permit:
    """One request's permit (`ConcurrencyLimiter.permit`)."""

    request: Request
    caller: Caller
    """The caller that the permit is charged to."""
    retried: bool
    """Whether the request was tried before. Requests that were not go first."""
    again: bool
    """Whether it lost a permit before. It is not new then."""
    queued: float
    """When it was queued."""
    alive: float = 0.0
    """When something last came for it."""
    asked: SourceRequest = field(default_factory=SourceRequest)
    """How long our own limits hold the request back. After that it becomes late no sooner than a request that
    starts then."""
    since: float = -math.inf
    """When it started."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    event: trio.Event = field(default_factory=trio.Event)
    displaced: bool = False
    """Whether another request took its permit."""
    early: bool = False
    """Whether it was displaced before it was late."""
    answered: bool = False
    """Whether the source has answered. The user of the permit sets it."""

    def is_started(self) -> bool:
        return self.since > -math.inf

    def progress(self) -> None:
        """Notes that something came, so the request is not stalled."""
        self.alive = trio.current_time()


class _Queue:
    """The waiting requests of one caller."""

    __slots__ = ("fresh", "retried")

    def __init__(self) -> None:
        self.fresh: OrderedDict[Permit, None] = OrderedDict()
        self.retried: OrderedDict[Permit, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.fresh) + len(self.retried)

    def put(self, permit: Permit) -> None:
        (self.retried if permit.retried else self.fresh)[permit] = None

    def remove(self, permit: Permit) -> None:
        (self.retried if permit.retried else self.fresh).pop(permit, None)

    def head(self) -> Permit:
        return next(reversed(self.fresh)) if self.fresh else next(iter(self.retried))


class ConcurrencyLimiter:
    """At most `running` requests that are not late, and `late` that are. `late_after` returns the seconds
    after which a request is late."""

    def __init__(self, running: int, late: int, late_after: Callable[[], float]) -> None:
        self._running = running
        self._most = running + late
        self._limit = float(self._most)
        self._lowered_at = self._early_at = -math.inf
        self._late_after = late_after
        self._active: OrderedDict[Permit, None] = OrderedDict()
        """Requests in flight that are not late, the oldest first."""
        self._late: OrderedDict[Permit, None] = OrderedDict()
        self._active_of: Counter[Caller] = Counter()
        self._all_of: Counter[Caller] = Counter()
        self._queues: dict[Caller, _Queue] = {}
        self._watcher: Permit | None = None
        """The waiting request whose task wakes up by the clock."""

    @property
    def in_flight(self) -> int:
        return len(self._active) + len(self._late)

    @property
    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def limit(self) -> int:
        """The most requests in flight; lower after the source answered that it is busy."""
        return int(self._limit)

    @property
    def caller_limit(self) -> int:
        """The most requests in flight of one caller."""
        return _share(self.limit)

    @asynccontextmanager
    async def permit(self, retried: bool = False, again: bool = False) -> AsyncIterator[Permit]:
        """Waits for a permit and holds it. If another request takes the permit, the body is cancelled,
        nothing is raised, and `Permit.displaced` is True. For `retried` and `again` see `Permit`."""
        request = current_request.get()
        permit = Permit(request, request.caller, retried, again, queued=trio.current_time())
        try:
            if self._active or self._late or self._queues:
                await self._wait(permit)
            else:  # the usual case
                self._add(permit)
            token = current_source_request.set(permit.asked)
            try:
                with permit.scope:
                    yield permit
            finally:
                current_source_request.reset(token)
        finally:
            self._remove(permit)
            if permit.answered and self._limit < self._most:
                self._limit = min(self._limit + 1 / self._limit, float(self._most))
            if self._queues:
                self._dispatch()

    def note_busy(self, asked: float, more: int = 0) -> bool:
        """A request that began at `asked` was refused because too many run at the source. Returns True if our
        own requests, those in flight and `more`, may be the reason. Then fewer are sent from now on."""
        together = self.in_flight + more
        if together < 2:
            return False
        if asked > self._lowered_at:  # a request that began before the limit was lowered says nothing new
            self._limit = max(1.0, min(self._limit, together) / 2)
            self._lowered_at = trio.current_time()
        return True

    # -- which request is next -------------------------------------------------------------------------------

    async def _wait(self, permit: Permit) -> None:
        """Waits until `permit` is in flight."""
        if not self._queues:  # a short cut, which saves half of the work
            self._age(permit.queued)
            if self._has_room(permit, permit.queued):
                self._add(permit)
                return
        self._put(permit)
        self._dispatch()
        if permit.is_started():
            return
        joined = partial(self._join, permit)
        permit.request.on_join.add(joined)
        try:
            while not permit.is_started():
                if self._watcher is None:
                    self._watcher = permit
                if self._watcher is permit:
                    # 0.1 ms more, so that rounding does not wake it just before the time
                    with trio.move_on_after(min(CROWD_SECONDS, self._late_after()) + 0.0001):
                        await permit.event.wait()
                    self._dispatch()
                else:
                    await permit.event.wait()
                    if not permit.is_started():
                        permit.event = trio.Event()  # it was woken to become the watcher
        finally:
            permit.request.on_join.discard(joined)
            if not permit.is_started():
                self._withdraw(permit)
            if self._watcher is permit or self._watcher is None:
                self._watcher = None
                if self._queues:
                    next(iter(self._queues.values())).head().event.set()

    def _join(self, permit: Permit) -> None:
        """Another call waits for the same block. `permit` is queued anew, as if that call had just queued
        it."""
        if not permit.is_started():
            self._withdraw(permit)
            permit.queued = trio.current_time()
            self._put(permit)
            self._dispatch()

    def _put(self, permit: Permit) -> None:
        """Queues `permit`. Charges it to the one of its callers that has least in flight."""
        request = permit.request
        if request.others:
            permit.caller = min((request.caller, *request.others), key=lambda caller: self._all_of[caller])
        queue = self._queues.get(permit.caller)
        if queue is None:
            queue = self._queues[permit.caller] = _Queue()
        queue.put(permit)

    def _withdraw(self, permit: Permit) -> None:
        queue = self._queues.get(permit.caller)
        if queue is not None:
            queue.remove(permit)
            if not queue:
                del self._queues[permit.caller]

    def _dispatch(self) -> None:
        """Starts every request that may start now."""
        while self._queues:
            now = trio.current_time()
            self._age(now)
            heads = [queue.head() for queue in self._queues.values()]
            # Requests whose callers leave before an answer can come are removed from the queue. Otherwise,
            # when a crowd reaches its deadline, each that leaves would start another one's last, useless
            # request.
            useless = [
                head
                for head in heads
                if head.request.wanted_until - now < MIN_ANSWER and not self._is_new(head, now)
            ]
            if useless:
                for head in useless:
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

    def _is_new(self, permit: Permit, now: float) -> bool:
        return not permit.retried and not permit.again and now - permit.queued <= NEW

    def _age(self, now: float) -> None:
        after = self._late_after()
        late = list[Permit]()
        for permit in self._active:
            if now - permit.since < after:
                break
            if now - permit.asked.free_since >= after:
                late.append(permit)
        for permit in late:
            del self._active[permit]
            self._active_of[permit.caller] -= 1
            self._late[permit] = None

    def _has_room(self, permit: Permit, now: float) -> bool:
        """Whether `permit` may start now. Displaces requests to make room for it."""
        new = self._is_new(permit, now)
        running = min(self._running, self.limit)
        if permit.retried:
            running = max(1, running // 2)  # the other half stays free for requests that were never tried
        full = len(self._active) >= running or self._active_of[permit.caller] >= _share(running)
        if full and not (new and self._is_no_crowd(permit.caller, running, now)):
            return False
        late = self._late_after()
        if new:
            least = max(CROWD_SECONDS, late)
        else:
            least = max(ROTATE_RETRIED, 4 * late) if permit.retried else max(ROTATE_FRESH, 2 * late)
        while (own := self._all_of[permit.caller] >= self.caller_limit) or self.in_flight >= self.limit:
            if self._displace(permit.caller, own, now - least):
                continue
            # not if the source accepts few requests: it needs its time to answer
            early = (
                new and self._limit >= self._most > self._running and now - self._early_at >= CROWD_SECONDS
            )
            if not early or not self._displace(permit.caller, own, now - CROWD_SECONDS, early=True):
                return False
            self._early_at = now
        return True

    def _is_no_crowd(self, caller: Caller, running: int, now: float) -> bool:
        """Whether so few requests began in the last CROWD_SECONDS that one more of `caller` may begin."""
        of_caller = 0
        for began, permit in enumerate(reversed(self._active), 1):
            if now - permit.since >= CROWD_SECONDS:
                break
            of_caller += permit.caller == caller
            if began >= running or of_caller >= _share(running):
                return False
        return True

    def _displace(self, caller: Caller, own: bool, before: float, *, early: bool = False) -> bool:
        """Cancels the oldest request without progress since `before`: one of the caller that has most, or of
        `caller` with `own`. `early`: it may not be late yet."""
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

    def _add(self, permit: Permit) -> None:
        permit.since = trio.current_time()
        self._active[permit] = None
        self._active_of[permit.caller] += 1
        self._all_of[permit.caller] += 1

    def _remove(self, permit: Permit) -> None:
        if permit in self._active:
            del self._active[permit]
            self._active_of[permit.caller] -= 1
        elif permit in self._late:
            del self._late[permit]
        else:
            return  # it was displaced before
        self._all_of[permit.caller] -= 1
        if not self._all_of[permit.caller]:
            del self._all_of[permit.caller], self._active_of[permit.caller]


def _share(permits: int) -> int:
    """How many of `permits` one caller may hold."""
    return max(1, int(permits * CALLER_SHARE))
