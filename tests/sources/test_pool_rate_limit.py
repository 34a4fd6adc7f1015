"""What our own rate limit holds back is not a source's silence: nothing is broken off, asked for twice or held
against anybody."""

import random

import pytest
import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import BlockTooLarge
from ipfsfuse.sources.base import Subtree
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings, RateLimit
from ipfsfuse.sources.pool.managed_source import ManagedSource
from ipfsfuse.sources.pool.pool import SourcePool
from tests.sources.content import sample
from tests.sources.servers import Server
from tests.sources.streamed import give_each
from tests.sources.test_pool_ranges import collect
from tests.sources.timed import BLOCK, BLOCKS, CID, Answer, Takes, Timed, never, pool_of, run


def limited(blocks: dict[Cid, bytes], seconds: float) -> Answer:
    """Answers at once; our limit then holds each block back for so many seconds."""
    limit = RateLimit(1)

    async def answer(cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        await limit.spend(round(seconds))
        return blocks[cid]

    return answer


@pytest.mark.parametrize("others", [0, 1])
def test_a_run_is_not_broken_off(others: int) -> None:
    file = sample(12, count=6)

    async def main() -> None:
        one = Timed("one", limited(file.blocks, 20), file.blocks)
        more = [Timed("other", blocks=file.blocks) for _ in range(others)]
        pool = pool_of(one, *more)
        got = await collect(pool, file)
        assert {index: block for index, (block, _source) in got.items()} == file.expected
        assert len(one.asked) == 6
        assert [each.failures for each in pool.statistics()] == [{}] * (1 + others)
        assert not any(each.asked for each in more)

    run(main)


def test_a_run_that_stalls_behind_the_limit_is_broken_off_all_the_same() -> None:
    file = sample(13, count=6)

    async def main() -> None:
        held = limited(file.blocks, 20)

        async def answer(cid: Cid) -> bytes:
            return await (held if cid == file.leaves[0].cid else never)(cid)

        start = trio.current_time()
        pool = pool_of(Timed("stalls", answer), Timed("good", blocks=file.blocks))
        got = await collect(pool, file)
        assert {index: block for index, (block, _source) in got.items()} == file.expected
        assert 20 + pool.patience <= trio.current_time() - start <= 20 + pool.patience + 1
        assert pool.statistics()[0].failures == {"timeout": 1}

    run(main)


def test_a_run_that_drips_behind_the_limit_is_broken_off_all_the_same() -> None:
    """Each byte that was held back gave its source all of its time again."""
    file = sample(15, count=1)

    async def main() -> None:
        limit = RateLimit(1)

        async def drips(_cid: Cid) -> bytes:
            while True:
                await trio.sleep(0.9)
                await limit.spend(1)

        pool = pool_of(Timed("drips", drips), Timed("good", blocks=file.blocks))
        with trio.fail_after(60):
            await collect(pool, file)

    run(main)


@pytest.mark.parametrize(("seconds", "failures"), [(0, {"timeout": 1}), (5, {})])
def test_what_is_held_back_comes_when_it_is_let_go(seconds: int, failures: dict[str, int]) -> None:
    """A request without an answer counts against its source only if nothing came from that meanwhile."""

    async def main() -> None:
        managed = ManagedSource(Timed("one", limited(BLOCKS, seconds)), random.Random(1), 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(managed.ask, CID)
            await trio.sleep(3)
            asked = trio.current_time()
            await trio.sleep(10)
        managed.overtaken(asked)
        assert managed.statistics().failures == failures

    run(main)


def test_an_answer_with_a_directory_is_not_given_up() -> None:
    async def main() -> None:
        one, other = Timed("one", limited(BLOCKS, 2), BLOCKS), Timed("other")
        pool, takes = pool_of(one, other), Takes()
        await give_each(pool.subtree(Subtree(CID, True, 1 << 20), takes), takes.take)
        assert takes.blocks == BLOCKS
        assert not other.asked

    run(main)


def test_a_block_is_asked_of_nobody_else_and_makes_no_source_slow() -> None:
    async def main() -> None:
        one, other = Timed("one", limited(BLOCKS, 10)), Timed("other")
        pool = pool_of(one, other)
        for cid in list(BLOCKS)[:5]:
            assert (await pool.get(cid)).block == BLOCKS[cid]
        found = pool.statistics()[0]
        assert (len(one.asked), other.asked, found.failures, found.hedges) == (5, [], {}, 0)
        assert found.p95 == 0.0

    run(main)


@pytest.mark.logs("it has 3,000,000 bytes")
def test_who_says_that_a_block_is_too_large_does_not_spoil_one_that_is_held_back() -> None:
    async def main() -> None:
        async def lies(_cid: Cid) -> bytes:
            raise BlockTooLarge("it has 3,000,000 bytes")

        pool = pool_of(Timed("lies", lies), Timed("one", limited(BLOCKS, 10)))
        assert (await pool.get(CID)).block == BLOCK

    run(main)


def test_a_crowd_that_is_held_back_takes_no_place_from_each_other() -> None:
    async def main() -> None:
        one = Timed("one", limited(BLOCKS, 1))
        pool = pool_of(one)

        async def get(cid: Cid) -> None:
            assert (await pool.get(cid)).block == BLOCKS[cid]

        async with trio.open_nursery() as nursery:
            for cid in BLOCKS:
                nursery.start_soon(get, cid)
        assert (len(one.asked), one.cancelled) == (len(BLOCKS), 0)

    run(main)


def test_a_range_of_a_real_answer_comes_by_one_request() -> None:
    """Each leaf is held back for longer than the pool waits for a source that is silent: 2 seconds."""
    file = sample(14, count=4)

    async def main() -> None:
        with Server({}, files=(file,)) as server:
            settings = HttpSettings(rate=RateLimit(30_000))
            source = Gateway(Http(parse_origin(server.url), settings), server.url, local=True)
            pool = SourcePool([source], deadline=4.0)
            try:
                got = await collect(pool, file)
            finally:
                await pool.aclose()
            assert {index: block for index, (block, _source) in got.items()} == file.expected
            assert (len(server.asked), pool.statistics()[0].failures) == (1, {})

    trio.run(main)
