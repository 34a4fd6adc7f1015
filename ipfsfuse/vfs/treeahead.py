"""Fetching ahead in directories: who uses a directory's children in the order it lists them finds the next on their way.

`Trail` is pure policy: it is told which children of one page of a listing were used, and says which to bring in. A
listing alone brings nothing in, and neither does a reader who picks. Concurrency: the event loop's; at most
SIDE_BY_SIDE blocks of a trail are on their way at a time.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError

FOLLOWING = 2
"""Uses, each following the one before, after which the next children are brought in."""
SLACK = 4
"""How far the next use may lie: some children may be known, or of no interest."""
WINDOW = 64
"""Children ahead of the reader."""
MAX_SIZE = 64 << 10
"""Bytes by its link's word of the largest raw child that is brought in: of larger files each reads ahead by itself."""
SIDE_BY_SIDE = 8
KEPT = 20_000
"""Children of the pages that are remembered."""


class Trail:
    """The children of one page, and how far their reader has come."""

    def __init__(self, children: Sequence[Cid]) -> None:
        self.children = children
        self.running = False
        """Whether someone is bringing children in."""
        self._last = -1
        self._following = 0
        self._next = self._goal = 0

    def note(self, index: int) -> bool:
        """Child `index` was used. True where some should be brought in now."""
        if index == self._last:
            return False
        follows = self._last < index <= self._last + SLACK
        self._following = self._following + 1 if follows and self._last >= 0 else 0
        self._last = index
        if self._following < FOLLOWING:
            self._goal = 0
            return False
        self._next = max(self._next, index + 1)
        self._goal = min(index + 1 + WINDOW, len(self.children))
        return self._goal - self._next >= min(WINDOW // 4, len(self.children) - self._next) > 0

    def take(self) -> Cid | None:
        """The next child to bring in; None where the reader should come nearer first."""
        if self._next >= self._goal:
            return None
        self._next += 1
        return self.children[self._next - 1]


class TreeAhead:
    """Trails of the pages listed last. `bring` fetches one child."""

    def __init__(self, nursery: trio.Nursery, bring: Callable[[Cid], Awaitable[object]], known: Callable[[Cid], object | None]) -> None:
        self._nursery = nursery
        self._bring = bring
        self._known = known
        self._trails: OrderedDict[tuple[Cid, int], Trail] = OrderedDict()
        self._places: dict[Cid, tuple[Trail, int]] = {}

    def listed(self, directory: Cid, after: int, children: Sequence[tuple[Cid, int]]) -> None:
        """A page of `directory` was listed from place `after`: (CID, claimed size) of its entries."""
        key = (directory, after)
        if key in self._trails:
            self._trails.move_to_end(key)
            return
        trail = self._trails[key] = Trail([cid for cid, size in children if cids.codec(cid) != cids.RAW or size <= MAX_SIZE])
        self._places.update((cid, (trail, index)) for index, cid in enumerate(trail.children))
        while len(self._places) > KEPT and len(self._trails) > 1:
            _key, old = self._trails.popitem(last=False)
            for cid in old.children:
                if self._places.get(cid, (None, 0))[0] is old:
                    del self._places[cid]

    def used(self, cid: Cid) -> None:
        """Someone asked for `cid` itself."""
        place = self._places.get(cid)
        if place is not None and place[0].note(place[1]) and not place[0].running:
            place[0].running = True
            self._nursery.start_soon(self._run, place[0])

    async def _run(self, trail: Trail) -> None:
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(SIDE_BY_SIDE):
                    nursery.start_soon(self._work, trail, nursery.cancel_scope)
        finally:
            trail.running = False

    async def _work(self, trail: Trail, scope: trio.CancelScope) -> None:
        while (cid := trail.take()) is not None:
            if self._known(cid) is None:
                try:
                    await self._bring(cid)
                except IpfsFuseError:
                    scope.cancel()  # whoever uses that child will hear
                    return
