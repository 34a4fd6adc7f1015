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
from ipfsfuse.dag.nodes import Node
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.sources.base import current_request, set_request
from ipfsfuse.vfs.gathering import SMALL

FOLLOWING = 2
"""Uses, each following the one before, after which the next children are brought in."""
SLACK = 4
"""How far the next use may lie: some children may be known, or of no interest."""
WINDOW = 64
"""Children ahead of the reader."""
SIDE_BY_SIDE = 8
DEEP = 4
"""Directories ahead of a reader who goes through what each of them holds."""
KEPT = 20_000
"""Children of the pages that are remembered."""


class Trail:
    """The children of one page, and how far their reader has come."""

    def __init__(self, directory: Cid, children: Sequence[Cid], above: "Trail | None" = None) -> None:
        """`above` is the trail that `directory` itself lies on."""
        self.directory = directory
        self.children = children
        self.above = above
        self.running = False
        """Whether someone is bringing children in."""
        self.deep = False
        """Whether the reader goes through what its directories hold, too."""
        self._last = -1
        self._following = 0
        self._next = self._goal = self._next_deep = 0

    def note(self, index: int) -> bool:
        """Child `index` was used. True where some should be brought in now."""
        if index == self._last:
            return False
        follows = self._last < index <= self._last + SLACK
        self._following = self._following + 1 if follows and self._last >= 0 else 0
        self._last = index
        if not self._following:
            self._next = self._next_deep = 0
        if self._following < FOLLOWING:
            self._goal = 0
            self.deep = self.deep and self._following > 0
            return self.deep
        self._next = max(self._next, index + 1)
        self._goal = min(index + 1 + WINDOW, len(self.children))
        return self.deep or self._goal - self._next >= min(WINDOW // 4, len(self.children) - self._next) > 0

    @property
    def followed(self) -> bool:
        """Whether its reader keeps to the order, so far."""
        return self._following > 0

    def take(self) -> Cid | None:
        """The next child to bring in; None where the reader should come nearer first."""
        if self._next >= self._goal:
            return None
        self._next += 1
        return self.children[self._next - 1]

    def take_deep(self) -> Cid | None:
        """The next child to bring in with all that it holds."""
        self._next_deep = max(self._next_deep, self._last + 1)
        if self._next_deep > self._last + DEEP or self._next_deep >= len(self.children):
            return None
        self._next_deep += 1
        return self.children[self._next_deep - 1]


Bring = Callable[[Cid], Awaitable[Node]]
Known = Callable[[Cid], object | None]
ContentsOf = Callable[[Node], trio.Event | None]


class TreeAhead:
    """Trails of the pages listed last. `bring` fetches one child; `contents_of` is `Gatherer.contents_of`."""

    def __init__(self, nursery: trio.Nursery, bring: Bring, known: Known, contents_of: ContentsOf) -> None:
        self._nursery = nursery
        self._bring = bring
        self._known = known
        self._contents_of = contents_of
        self._trails: OrderedDict[tuple[Cid, int], Trail] = OrderedDict()
        self._places: dict[Cid, tuple[Trail, int]] = {}

    def listed(self, directory: Cid, after: int, children: Sequence[tuple[Cid, int]]) -> None:
        """A page of `directory` was listed from place `after`: (CID, claimed size) of its entries."""
        key = (directory, after)
        if key in self._trails:
            self._trails.move_to_end(key)
            return
        above = self._places.get(directory, (None, 0))[0]
        small = [cid for cid, size in children if cids.codec(cid) != cids.RAW or size <= SMALL]
        trail = self._trails[key] = Trail(directory, small, above)
        self._places.update((cid, (trail, index)) for index, cid in enumerate(trail.children))
        while len(self._places) > KEPT and len(self._trails) > 1:
            _key, old = self._trails.popitem(last=False)
            for cid in old.children:
                if self._places.get(cid, (None, 0))[0] is old:
                    del self._places[cid]

    def behind(self, cid: Cid) -> Sequence[Cid]:
        """The children that follow `cid`, one window of them, where someone goes through them in order."""
        trail, index = self._places.get(cid, (None, 0))
        return trail.children[index + 1 : index + 1 + WINDOW] if trail is not None and trail.followed else ()

    def used(self, cid: Cid) -> None:
        """Someone asked for `cid` itself."""
        place = self._places.get(cid)
        if place is not None and place[0].note(place[1]) and not place[0].running:
            place[0].running = True
            self._nursery.start_soon(self._run, place[0])

    async def _run(self, trail: Trail) -> None:
        set_request(current_request().for_background())
        try:
            if trail.deep:
                while (cid := trail.take_deep()) is not None:
                    await self._contents(cid)
                return
            if await self._contents(trail.directory) and trail.above is not None:
                trail.above.deep = True
            async with trio.open_nursery() as nursery:
                for _ in range(SIDE_BY_SIDE):
                    nursery.start_soon(self._work, trail, nursery.cancel_scope)
        except IpfsFuseError:
            pass  # whoever uses that directory will hear
        finally:
            trail.running = False

    async def _contents(self, directory: Cid) -> bool:
        """Brings in what `directory` holds; False where that is not to be had at once."""
        come = self._contents_of(await self._bring(directory))
        if come is None:
            return False
        await come.wait()
        return True

    async def _work(self, trail: Trail, scope: trio.CancelScope) -> None:
        while (cid := trail.take()) is not None:
            if self._known(cid) is None:
                try:
                    await self._bring(cid)
                except IpfsFuseError:
                    scope.cancel()  # whoever uses that child will hear
                    return
