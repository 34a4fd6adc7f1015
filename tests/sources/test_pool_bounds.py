"""Requests in flight at all sources together: they are bounded, and each source has its share."""

import random

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.sources.pool import managed_source
from tests.sources.timed import Timed, never, pool_of, run

SOURCES = 20


def test_requests_in_flight_at_twenty_sources_stay_within_the_total_bound() -> None:
    async def main() -> None:
        chance = random.Random(9)
        sources = [Timed(f"source {number}", never) for number in range(SOURCES)]
        pool = pool_of(*sources)
        most = 0
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(pool.get, cids.make(cids.RAW, b"\x12\x20" + chance.randbytes(32)))
            for _ in range(160):
                await trio.sleep(0.5)
                most = max(most, sum(len(source.asked) - source.cancelled for source in sources))
            assert all(source.asked for source in sources), "each source has its share"
            nursery.cancel_scope.cancel()
        assert SOURCES <= most <= 9 * managed_source.RUNNING_TOTAL

    run(main)
