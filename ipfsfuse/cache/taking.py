"""Blocks of one answer on their way into the cache: who waits for one has it as soon as it is kept, with
those that came with it.

Concurrency: the event loop's; one task takes.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping

from ipfsfuse.cache.arrival import Arrival
from ipfsfuse.cache.base import Seen
from ipfsfuse.cache.flights import Ride
from ipfsfuse.cache.keys import block_key
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.base import Fetched

Absent = Callable[[Iterable[Cid]], Iterable[bytes]]
"""The keys of those blocks that are not kept yet."""
Keep = Callable[[Mapping[Cid, Fetched]], Awaitable[Mapping[Cid, Arrival]]]


class Taking:
    """A `Taker` of the blocks that a ride expects."""

    def __init__(self, ride: Ride[bytes, Arrival], seen: Seen, absent: Absent, keep: Keep) -> None:
        self._ride, self._seen, self._absent, self._keep = ride, seen, absent, keep

    def wants(self, cid: Cid) -> bool:
        return block_key(cid) in self._ride

    def came(self, cid: Cid, block: bytes) -> None:
        self._ride.expect(self._absent(self._seen(cid, block)))

    async def take(self, blocks: Mapping[Cid, Fetched]) -> None:
        for cid, arrival in (await self._keep(blocks)).items():
            self._ride.land(block_key(cid), arrival)
            self._ride.kept(block_key(cid))
