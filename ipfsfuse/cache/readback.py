"""Staged leaves read back ahead of their reader, several by one thread's errand.

Concurrency: the event loop's. Each is a flight until it was read: who wants one meanwhile waits for that.
"""

from collections.abc import Iterator, Sequence

import trio

from ipfsfuse.cache.arrival import Arrival
from ipfsfuse.cache.base import Arrived, FileRef
from ipfsfuse.cache.flights import Flights, Ride
from ipfsfuse.cache.keys import leaf_key
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.fileio.buffers import together

SIDE_BY_SIDE = 2
"""Errands: one reads while the other hashes."""


async def read_back(
    store: Store, flights: Flights[bytes, Arrival], file: FileRef, leaves: Sequence[Leaf], arrived: Arrived
) -> set[Leaf]:
    """Hands over those of `leaves`, which seem to be staged, that are right, and returns them."""
    came: set[Leaf] = set()
    listening = True
    by_key: dict[bytes, Leaf] = {leaf_key(leaf): leaf for leaf in leaves}

    async def fetch(ride: Ride[bytes, Arrival]) -> None:
        queue = _stretches([by_key[key] for key in ride.keys])

        async def work() -> None:
            for stretch in queue:
                for leaf, data in zip(stretch, await store.leaves(file, stretch), strict=True):
                    if data is not None:
                        key = leaf_key(leaf)
                        ride.land(key, Arrival(data, None, False))
                        ride.kept(key)
                        if listening:
                            came.add(leaf)
                            arrived(leaf, data)

        async with trio.open_nursery() as nursery:
            for _ in range(SIDE_BY_SIDE):
                nursery.start_soon(work)

    try:
        await flights.run(by_key, fetch)
    finally:
        listening = False
    return came


def _stretches(leaves: Sequence[Leaf]) -> Iterator[Sequence[Leaf]]:
    """`leaves` cut where they do not lie one behind the other, and into what is worth reading at once."""
    first = 0
    for at in range(1, len(leaves) + 1):
        if at == len(leaves) or leaves[at].offset != leaves[at - 1].offset + leaves[at - 1].size:
            for start, sizes in together([leaf.size for leaf in leaves[first:at]]):
                yield leaves[first + start : first + start + len(sizes)]
            first = at
