"""Requests in flight at all sources together: they are bounded, and each source has its share."""

import random

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.sources.base import request_of
from ipfsfuse.sources.pool.managed_source import RUNNING_TOTAL, ManagedSource
from tests.sources.timed import Timed, never, pool_of, run

SOURCES = 20
RUNNING, LATE = RUNNING_TOTAL // SOURCES, 8 * RUNNING_TOTAL // SOURCES
"""The share of each source: requests that are not late, and requests that are."""


class Remote(Timed):
    local = False


@pytest.mark.parametrize(("callers", "running", "most"), [(10, RUNNING, RUNNING + LATE), (1, 2, 21)])
def test_requests_in_flight_at_twenty_sources_stay_within_the_total_bounds(
    callers: int, running: int, most: int
) -> None:
    """A caller alone may have three quarters of each source's share."""

    async def main() -> None:
        chance = random.Random(9)
        sources = [Remote(f"source {number}", never) for number in range(SOURCES)]
        pool = pool_of(*sources)

        async def ask(managed: ManagedSource, caller: int) -> None:
            with request_of(caller):
                await managed.ask(cids.make(cids.RAW, b"\x12\x20" + chance.randbytes(32)))

        def in_flight() -> list[int]:
            return [len(source.asked) - source.cancelled for source in sources]

        async with trio.open_nursery() as nursery:
            for managed in pool._network:
                for number in range(100):
                    nursery.start_soon(ask, managed, number % callers)
            await trio.sleep(0.03)  # none is late
            assert in_flight() == [running] * SOURCES
            for _ in range(30):
                await trio.sleep(0.5)
                assert max(in_flight()) <= most
            assert in_flight() == [most] * SOURCES
            nursery.cancel_scope.cancel()

    run(main)
