"""A directory in one answer, through the pool. It is verified, comes from the first source that may be asked,
and is given up if it stops."""

from collections.abc import Awaitable, Callable, Mapping

import pytest
import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.base import Fetched, Subtree
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.managed_source import SLOW_REMOTE
from ipfsfuse.sources.pool.pool import FIRST_BLOCK_FACTOR, STALL, SourcePool
from tests.sources.content import SampleTree, encode_car, trees
from tests.sources.servers import CAR, Ask, Server
from tests.sources.streamed import give_each
from tests.sources.timed import InPlace, Takes, Timed, fails, never, pool_of, run

TREE = trees()["hamt"]
CIDS = list(TREE.blocks)
SUBTREE = Subtree(TREE.root, True, 1 << 20)
SLOWEST = 2 * STALL
"""Seconds after which an answer is given up at the latest. The pool checks at intervals."""


def everything(_cid: Cid) -> bool:
    return True


async def fetched_subtree(
    pool: SourcePool, wants: Callable[[Cid], bool] = everything, subtree: Subtree = SUBTREE
) -> dict[Cid, Fetched]:
    takes = Takes(wants)
    await give_each(pool.subtree(subtree, takes), takes.take)
    return takes.got


def blocks_of(got: dict[Cid, Fetched]) -> dict[Cid, bytes]:
    return {cid: fetched.block for cid, fetched in got.items()}


def test_all_blocks_come_from_the_first_source_and_count_as_its_blocks() -> None:
    async def main() -> None:
        one, two = Timed("one", blocks=TREE.blocks), Timed("two", blocks=TREE.blocks)
        pool = pool_of(one, two)
        assert blocks_of(await fetched_subtree(pool)) == TREE.blocks
        first, second = pool.statistics()
        assert (first.requests, first.blocks, second.requests) == (1, len(TREE.blocks), 0)
        assert (one.subtrees, two.subtrees) == ([SUBTREE], [])

    run(main)


def test_unwanted_blocks_are_dropped_unverified_and_no_source_is_blamed() -> None:
    unwanted = {cid: block + b"!" for cid, block in list(TREE.blocks.items())[::2]}

    async def main() -> None:
        pool = pool_of(Timed("one", blocks=TREE.blocks | unwanted))
        got = await fetched_subtree(pool, lambda cid: cid not in unwanted)
        assert blocks_of(got) == {cid: block for cid, block in TREE.blocks.items() if cid not in unwanted}
        assert pool.statistics()[0].wrong == 0

    run(main)


def test_the_network_is_not_asked_if_a_source_in_place_has_the_root() -> None:
    async def main() -> None:
        near, far = (
            InPlace("near", blocks={TREE.root: TREE.blocks[TREE.root]}),
            Timed("far", blocks=TREE.blocks),
        )
        assert await fetched_subtree(pool_of(near, far)) == {}
        assert (near.subtrees, far.subtrees, far.asked) == ([], [], [])
        elsewhere = InPlace("elsewhere", blocks={})
        assert blocks_of(await fetched_subtree(pool_of(elsewhere, far))) == TREE.blocks

    run(main)


def test_a_source_that_rests_is_not_asked() -> None:
    async def main() -> None:
        down = Timed("down", fails, blocks=TREE.blocks)
        pool = pool_of(down)
        for _ in range(3):
            assert await fetched_subtree(pool) == {}
        assert pool.statistics()[0].state == "open"
        assert await fetched_subtree(pool) == {}
        assert len(down.subtrees) == 3
        up = Timed("up", blocks=TREE.blocks)
        pool = pool_of(down, up)
        for _ in range(3):
            await fetched_subtree(pool)
        assert blocks_of(await fetched_subtree(pool)) == TREE.blocks
        assert len(up.subtrees) == 1

    run(main)


@pytest.mark.parametrize("before", [0.0, 0.009, 1.0], ids=["at once", "soon", "late"])
def test_an_answer_that_stops_is_given_up_soon_whether_it_began_early_or_late(before: float) -> None:
    """Also if the source is usually slow, and its first block had a long time."""

    async def main() -> None:
        async def answer(cid: Cid) -> bytes:
            if cid == CIDS[0]:
                await trio.sleep(before)
            return TREE.blocks[cid] if cid != CIDS[5] else await never(cid)

        source = Timed("stops", answer, blocks=TREE.blocks)
        pool = pool_of(source)
        health = pool.network()[0].health
        for _ in range(20):
            health.record_success(1.0, 1)
        assert health.slow_after() == 1.0
        start = trio.current_time()
        assert list(await fetched_subtree(pool)) == CIDS[:5]
        assert before + STALL <= trio.current_time() - start <= before + SLOWEST
        assert (source.cancelled, pool.statistics()[0].failures) == (1, {})

    run(main)


def test_the_time_for_the_first_block_follows_the_slow_answers_of_its_source() -> None:
    async def main() -> None:
        source = Timed("never", never, blocks=TREE.blocks)
        start = trio.current_time()
        assert await fetched_subtree(pool_of(source)) == {}
        assert STALL <= trio.current_time() - start <= SLOWEST
        pool = pool_of(source)
        for _ in range(20):
            pool.network()[0].health.record_success(SLOW_REMOTE, 1)
        start = trio.current_time()
        assert await fetched_subtree(pool) == {}
        first = FIRST_BLOCK_FACTOR * SLOW_REMOTE
        assert first <= trio.current_time() - start <= first + STALL

    run(main)


def test_a_slow_reader_does_not_count_as_a_source_that_stops() -> None:
    async def main() -> None:
        class Slow(Takes):
            async def take(self, blocks: Mapping[Cid, Fetched]) -> None:
                await trio.sleep(10)
                await super().take(blocks)

        slow = Slow()
        await give_each(pool_of(Timed("one", blocks=TREE.blocks)).subtree(SUBTREE, slow), slow.take)
        assert list(slow.got) == CIDS

    run(main)


def test_a_failure_of_the_reader_does_not_count_against_the_source() -> None:
    async def main() -> None:
        pool = pool_of(Timed("one", blocks=TREE.blocks))

        class Broken(Takes):
            async def take(self, blocks: Mapping[Cid, Fetched]) -> None:
                raise ValueError("the reader's trouble")

        with pytest.raises(ValueError, match="reader's trouble"):
            await give_each(pool.subtree(SUBTREE, Broken()), Broken().take)
        assert pool.statistics()[0].failures == {}

    run(main)


def serving(
    tree: SampleTree, damaged: Cid | None = None, stops_before: Cid | None = None
) -> Callable[[Ask], None]:
    def behave(ask: Ask) -> None:
        pairs = [(cid, block + b"!" if cid == damaged else block) for cid, block in tree.blocks.items()]
        stops = [index for index, (cid, _block) in enumerate(pairs) if cid == stops_before]
        body = encode_car(tree.root, pairs[: stops[0]] if stops else pairs)
        if stops:
            ask.connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % CAR.encode()
            )
            ask.connection.sendall(b"%x\r\n%s" % (len(body) + 1, body))
            ask.stall()
        else:
            ask.send_chunked([body])

    return behave


def through(servers: list[Server], main: Callable[[SourcePool], Awaitable[None]]) -> None:
    async def opened() -> None:
        pool = SourcePool([Gateway(Http(parse_origin(server.url)), server.url) for server in servers])
        try:
            await main(pool)
        finally:
            await pool.aclose()

    trio.run(opened)


@pytest.mark.logs("sent wrong bytes for .* and is not asked for 10 minutes", "has wrong bytes for")
def test_wrong_bytes_end_the_answer_and_quarantine_a_gateway_if_there_is_another() -> None:
    with Server({}, serving(TREE, damaged=CIDS[4])) as liar, Server({}, serving(TREE)) as good:

        async def with_another(pool: SourcePool) -> None:
            assert list(await fetched_subtree(pool)) == CIDS[:4]
            assert (pool.statistics()[0].state, pool.statistics()[0].wrong) == ("quarantined", 1)
            assert blocks_of(await fetched_subtree(pool)) == TREE.blocks
            assert len(liar.asked) == 1

        async def alone(pool: SourcePool) -> None:
            assert list(await fetched_subtree(pool)) == CIDS[:4]
            assert (pool.statistics()[0].state, pool.statistics()[0].wrong) == ("good", 1)

        through([liar, good], with_another)
        through([liar], alone)


def test_a_server_that_stops_within_its_answer_is_given_up_soon() -> None:
    with Server({}, serving(TREE, stops_before=CIDS[7])) as server:

        async def main(pool: SourcePool) -> None:
            with trio.fail_after(20):
                assert list(await fetched_subtree(pool)) == CIDS[:7]
            assert pool.statistics()[0].failures == {}

        through([server], main)


def test_a_broken_car_and_an_absent_root_are_counted_and_not_raised() -> None:
    def broken(ask: Ask) -> None:
        ask.send_chunked([TREE.car(), b"\xff" * 500])

    def absent(ask: Ask) -> None:
        ask.send(404, b"no", "text/plain")

    with Server({}, broken) as one, Server({}, absent) as two:

        async def first(pool: SourcePool) -> None:
            assert blocks_of(await fetched_subtree(pool)).items() <= TREE.blocks.items()
            assert pool.statistics()[0].failures == {"car": 1}

        async def second(pool: SourcePool) -> None:
            assert await fetched_subtree(pool) == {}
            assert (pool.statistics()[0].absent, pool.statistics()[0].failures) == (1, {})

        through([one], first)
        through([two], second)
