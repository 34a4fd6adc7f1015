"""The pool: which source is asked when, and what wrong blocks and stalled sources cause."""

import random
import time

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid, too_large
from ipfsfuse.errors import BlockTooLarge, SourceFailed, Unavailable, Unsupported, WrongBlock
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool import managed_source
from ipfsfuse.sources.pool.pool import SourcePool
from tests.sources import evil
from tests.sources.servers import Ask, Server, answer_well
from tests.sources.timed import BLOCK, BLOCKS, CID, Answer, InPlace, Timed, after, fails, never, pool_of, run


def test_sources_in_place_are_asked_before_the_network() -> None:
    async def main() -> None:
        far, near = Timed("far"), InPlace("near")
        fetched = await pool_of(far, near).get(CID)
        assert (fetched.block, fetched.source, far.asked) == (BLOCK, near, [])

    run(main)


def test_a_block_that_two_sources_lack_is_fetched_from_the_third() -> None:
    async def main() -> None:
        assert (
            await pool_of(InPlace("a", blocks={}), Timed("b", blocks={}), Timed("c")).get(CID)
        ).source.name == "c"

    run(main)


def test_a_block_is_unavailable_at_once_offline_or_without_network_sources() -> None:
    async def main() -> None:
        start = trio.current_time()
        for pool in (
            pool_of(InPlace("a", blocks={})),
            pool_of(InPlace("a", blocks={}), Timed("node", blocks={}), offline=True),
            pool_of(),
        ):
            with pytest.raises(Unavailable, match="no source has"):
                await pool.get(CID)
            assert trio.current_time() == start

    run(main)


def test_no_source_is_asked_for_an_identity_cid_or_an_unsupported_hash() -> None:
    async def main() -> None:
        source = Timed("a")
        fetched = await pool_of(source).get(cids.make(cids.RAW, b"\x00\x05hello"))
        assert (fetched.block, fetched.source.in_place) == (b"hello", True)
        with pytest.raises(Unsupported):
            await pool_of(source).get(cids.make(cids.RAW, b"\xd5\x01\x10" + bytes(16)))
        assert source.asked == []

    run(main)


def test_a_source_that_lacks_a_block_is_asked_again_with_growing_pauses() -> None:
    async def main() -> None:
        source = Timed("node", blocks={})

        async def appears() -> None:
            await trio.sleep(10)
            source.blocks = BLOCKS

        async with trio.open_nursery() as nursery:
            nursery.start_soon(appears)
            assert (await pool_of(source).get(CID)).block == BLOCK
        assert 4 <= len(source.asked) <= 10  # with pauses that grow

    run(main)


def test_a_dead_source_is_asked_again_after_a_pause() -> None:
    async def main() -> None:
        dead, good = Timed("dead", fails), Timed("good")
        pool = pool_of(dead, good)
        for cid in BLOCKS:
            assert (await pool.get(cid)).source is good
        assert len(dead.asked) == 3
        state = pool.statistics()[0]
        assert (state.state, state.why, state.failures) == ("open", "it is down", {"connect": 3})
        await trio.sleep(1)
        assert (await pool.get(CID)).source is good
        # one request was tried; it failed, and the pause is longer
        assert (len(dead.asked), pool.statistics()[0].state) == (4, "open")
        dead.answer = None
        await trio.sleep(2)
        assert (await pool.get(CID)).source is dead
        assert pool.statistics()[0].state == "good"

    run(main)


async def refuse(cid: Cid) -> bytes:
    raise too_large("it", cid, 3 << 20)


@pytest.mark.logs("as a block of 3,145,728 bytes")
def test_a_block_that_is_too_large_is_refused_at_once_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        for sources in (
            [InPlace("a", refuse)],
            [Timed("a", refuse)],
            [Timed("a", refuse), Timed("b", blocks={}), Timed("c", fails)],
            [Timed("b", blocks={}), Timed("c", fails), Timed("a", refuse)],
            [InPlace("a", refuse), Timed("b", blocks={})],
        ):
            start = trio.current_time()
            caplog.clear()
            pool = pool_of(*sources)
            for _ in range(2):
                with pytest.raises(BlockTooLarge, match=cids.text(CID)):
                    await pool.get(CID)
            assert trio.current_time() - start < 2
            assert len(caplog.records) == 1
            assert all(
                each.state in ("untried", "good", "open") and not each.wrong for each in pool.statistics()
            )

    run(main)


@pytest.mark.logs("as a block of 3,145,728 bytes")
def test_a_false_refusal_of_a_block_as_too_large_does_not_hide_it_at_another_source() -> None:
    async def main() -> None:
        assert (await pool_of(InPlace("a", refuse), Timed("good")).get(CID)).block == BLOCK
        assert (
            await pool_of(Timed("a", refuse), Timed("b", blocks={}), Timed("good", after(2.0))).get(CID)
        ).block == BLOCK
        start = trio.current_time()
        with pytest.raises(BlockTooLarge):
            await pool_of(Timed("a", refuse), Timed("stalls", never)).get(CID)
        assert trio.current_time() - start == pool_of(Timed("a"), Timed("b")).patience, (
            "a source that stalls has that time to show that the first one lied"
        )

    run(main)


def busy_for(seconds: float) -> Answer:
    async def answer(_cid: Cid) -> bytes:
        raise SourceFailed("busy", "busy", retry_after=seconds)

    return answer


def test_retry_after_is_heeded_if_another_source_may_be_asked() -> None:
    async def main() -> None:
        busy, other = Timed("busy", busy_for(100)), Timed("other", blocks={})
        with trio.move_on_after(99):
            await pool_of(busy, other).get(CID)
        assert len(busy.asked) == 1
        assert len(other.asked) > 10

    run(main)


def test_retry_after_of_the_only_source_does_not_stop_requests_until_the_deadline() -> None:
    async def main() -> None:
        for deadline in (30, 2):
            source = Timed("busy", busy_for(1e300))
            with trio.move_on_after(deadline) as scope:
                await pool_of(source, deadline=deadline).get(CID)
            assert scope.cancelled_caught
            assert 3 <= len(source.asked) <= 4

    run(main)


@pytest.mark.logs("sent wrong bytes")
def test_a_slow_answer_spends_no_hedge_if_no_other_source_can_be_asked() -> None:
    """The hedge that is left can be spent on the next slow source."""

    def slowly(ask: Ask) -> None:
        time.sleep(0.8)  # longer than the slow answers of a gateway are assumed to take
        answer_well(ask)

    async def main() -> None:
        with Server(BLOCKS, evil.wrong_bytes) as lying, Server(BLOCKS, slowly) as slow:
            pool = pool_of(*(Gateway(Http(parse_origin(each.url)), each.url) for each in (lying, slow)))
            for cid in list(BLOCKS)[:2]:
                assert (await pool.get(cid)).block == BLOCKS[cid]
            assert [each.state for each in pool.statistics()] == ["quarantined", "good"]
            assert pool.hedges.spend()
            await pool.aclose()

    trio.run(main)


def test_a_slow_source_is_hedged_within_its_budget() -> None:
    async def main() -> None:
        slow, chance = set(list(BLOCKS)[40::25]), random.Random(5)

        async def answer(cid: Cid) -> bytes:
            await trio.sleep(2 if cid in slow else chance.uniform(0.05, 0.15))
            return BLOCKS[cid]

        first, second = Timed("first", answer), Timed("second", after(0.05))
        pool = pool_of(first, second)
        took = {}
        for cid in BLOCKS:
            start = trio.current_time()
            assert (await pool.get(cid)).block == BLOCKS[cid]
            took[cid] = trio.current_time() - start
        # they were asked of the second source after the 95th percentile
        assert sum(took[cid] < 0.25 for cid in slow) >= 3
        assert max(took.values()) < 2.1
        assert len(second.asked) == pool.statistics()[1].hedges <= 0.05 * len(BLOCKS) + 1
        assert first.cancelled >= sum(took[cid] < 0.25 for cid in slow)  # the slower request is cancelled

    run(main)


def test_a_stalled_source_delays_no_block_for_long_even_without_hedges() -> None:
    async def main() -> None:
        stalled, good = Timed("stalled", never), Timed("good")
        pool = pool_of(stalled, good)
        for cid in list(BLOCKS)[:20]:
            start = trio.current_time()
            assert (await pool.get(cid)).source is good
            assert trio.current_time() - start <= 3.1

    run(main)


def test_cancelling_the_reader_cancels_its_requests() -> None:
    async def main() -> None:
        one, two = Timed("one", never), Timed("two", never)
        with trio.move_on_after(10):
            await pool_of(one, two).get(CID)
        assert (one.cancelled, two.cancelled) == (1, 1)

    run(main)


def test_five_thousand_stalled_calls_delay_others_by_less_than_ten_milliseconds() -> None:
    async def main() -> None:
        chance = random.Random(4)
        stalled_cids = [cids.make(cids.RAW, b"\x12\x20" + chance.randbytes(32)) for _ in range(5000)]

        async def answer(cid: Cid) -> bytes:
            return BLOCKS[cid] if cid in BLOCKS else await never(cid)

        source = Timed("node", answer)
        pool = pool_of(source)
        async with trio.open_nursery() as nursery:
            for cid in stalled_cids:
                nursery.start_soon(pool.get, cid)
            await trio.sleep(60)
            for cid in BLOCKS:
                start = trio.current_time()
                assert (await pool.get(cid)).block == BLOCKS[cid]
                assert trio.current_time() - start <= 0.0101
            assert (
                len(source.asked) - len(BLOCKS) - source.cancelled
                <= managed_source.RUNNING + managed_source.LATE
            )
            assert source.cancelled > 1000  # the others got their turns
            nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.logs(
    "gateway-0 sent wrong bytes for .* and is not asked for 10 minutes",
    "and is not asked for 20 minutes",
    "has wrong bytes for",
)
def test_a_wrong_block_quarantines_a_remote_gateway_if_there_is_another() -> None:
    lying = [True]

    def lie(ask: Ask) -> None:
        ask.send(200, b"rubbish") if lying[0] else answer_well(ask)

    async def main() -> None:
        with Server(BLOCKS, lie) as bad, Server(BLOCKS) as good:
            sources = [
                Gateway(Http(parse_origin(server.url)), f"gateway-{index}")
                for index, server in enumerate([bad, good])
            ]
            pool = SourcePool(sources)
            for cid in [*BLOCKS][:5]:
                assert (await pool.get(cid)).source is sources[1]
            assert len(bad.asked) == 1
            assert (pool.statistics()[0].state, pool.statistics()[0].wrong) == ("quarantined", 1)
            await pool.aclose()

    trio.run(main)


@pytest.mark.logs("library has wrong bytes for .*: add its content again")
def test_a_wrong_block_in_place_affects_only_that_block_and_the_log_says_how_to_repair_it() -> None:
    async def main() -> None:
        library, far = InPlace("library", blocks=BLOCKS | {CID: b"rot"}), Timed("far")
        pool = pool_of(library, far)
        assert (await pool.get(CID)).source is far
        assert (await pool.get(list(BLOCKS)[1])).source is library
        with pytest.raises(WrongBlock):
            await pool_of(library).get(CID)

    run(main)
