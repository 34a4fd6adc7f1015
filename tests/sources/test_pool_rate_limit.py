"""Time for which our own rate limit holds an answer back does not count as silence of the source. Nothing is
broken off or asked for twice, and no source counts as failed."""

import itertools
import random
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trio.testing import wait_all_tasks_blocked

from ipfsfuse.cache.store.records import NameRecords
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import BlockTooLarge
from ipfsfuse.sources.base import SourceRequest, Subtree
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings, RateLimit
from ipfsfuse.sources.names.resolver import Resolver
from ipfsfuse.sources.pool.managed_source import ManagedSource
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.routing import LOOKUP_SECONDS, OTHER_ROUTERS_SECONDS, Network
from tests.sources.content import sample
from tests.sources.ipns import make, name_of
from tests.sources.servers import Ask, Behaviour, Server
from tests.sources.streamed import give_each
from tests.sources.test_pool_ranges import collect
from tests.sources.timed import BLOCK, BLOCKS, CID, Answer, Takes, Timed, never, pool_of, run


def limited(blocks: dict[Cid, bytes], seconds: float) -> Answer:
    """Answers at once. Our limit then holds each block back for `seconds`."""
    limit = RateLimit(1)

    async def answer(cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        await limit.spend(round(seconds))
        return blocks[cid]

    return answer


@pytest.mark.parametrize("others", [0, 1])
def test_a_range_that_the_limit_holds_back_is_not_broken_off(others: int) -> None:
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


def test_a_range_that_stalls_behind_the_limit_is_still_broken_off() -> None:
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


def test_a_range_that_drips_behind_the_limit_is_still_broken_off() -> None:
    """A byte that is held back must not give its source the whole time again."""
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


def test_a_source_that_drips_behind_a_limit_that_others_use_up_is_broken_off() -> None:
    """Each byte waits behind megabytes of other answers. That wait must not excuse the source."""
    file = sample(16, count=1)

    async def main() -> None:
        limit = RateLimit(1000)

        async def use_it_up() -> None:
            while True:
                await limit.spend(5000)

        async def drips(_cid: Cid) -> bytes:
            while True:
                await trio.sleep(0.1)
                await limit.spend(1, False)

        pool = pool_of(Timed("drips", drips), Timed("good", blocks=file.blocks))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use_it_up)
            with trio.fail_after(20):
                await collect(pool, file)
            nursery.cancel_scope.cancel()
        assert pool.statistics()[0].failures == {"timeout": 1}

    run(main)


def test_small_pieces_are_counted_one_by_one_and_waited_for_together() -> None:
    async def main() -> None:
        limit, start = RateLimit(1000), trio.current_time()
        with SourceRequest().current():
            for _ in range(99):
                await limit.spend(1, False)
            assert trio.current_time() - start == 0
            await limit.spend(1, False)
            assert trio.current_time() - start == pytest.approx(0.1)
            await limit.spend(50, False)
            await limit.spend(0, True)
            assert trio.current_time() - start == pytest.approx(0.15)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(limit.spend, 10_000)
                await wait_all_tasks_blocked()
                await limit.spend(0, True)  # it owes nothing, so it does not wait
                assert trio.current_time() - start == pytest.approx(0.15)

    run(main)


def whole(ask: Ask) -> None:
    ask.send(200, bytes(300_000))


def in_chunks(ask: Ask) -> None:
    ask.send_chunked([bytes(1000)] * 300)


@pytest.mark.parametrize("behave", [whole, in_chunks])
def test_the_rate_limit_learns_which_piece_is_the_end_of_an_answer(behave: Behaviour) -> None:
    """So the rest of the wait is waited for at the end of the answer."""
    calls = list[tuple[int, bool]]()

    class Listening(RateLimit):
        async def spend(self, count: int, ended: bool = True) -> None:
            calls.append((count, ended))

    async def main() -> None:
        with Server(BLOCKS, behave) as server:
            http = Http(parse_origin(server.url), HttpSettings(rate=Listening(1)))
            async with http.ask("GET", "/") as response:
                while await response.receive():
                    pass
            await http.aclose()

    trio.run(main)
    received = list(itertools.accumulate(count for count, _ended in calls))
    assert received[-1] == 300_000
    assert calls[-1][1]
    assert not any(
        ended for (_count, ended), all_so_far in zip(calls, received, strict=True) if all_so_far < 300_000
    )


@pytest.mark.parametrize(("seconds", "failures"), [(0, {"timeout": 1}), (5, {})])
def test_an_overtaken_request_is_a_failure_only_if_its_source_sent_nothing_meanwhile(
    seconds: int, failures: dict[str, int]
) -> None:
    """A request without an answer counts as a failure only if nothing came from its source meanwhile."""

    async def main() -> None:
        managed = ManagedSource(Timed("one", limited(BLOCKS, seconds)), random.Random(1), 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(managed.ask, CID)
            await trio.sleep(3)
            asked = trio.current_time()
            await trio.sleep(10)
        managed.note_overtaken(asked)
        assert managed.statistics().failures == failures

    run(main)


def test_a_directory_that_the_limit_holds_back_is_not_given_up() -> None:
    async def main() -> None:
        one, other = Timed("one", limited(BLOCKS, 2), BLOCKS), Timed("other")
        pool, takes = pool_of(one, other), Takes()
        await give_each(pool.subtree(Subtree(CID, True, 1 << 20), takes), takes.take)
        assert takes.blocks == BLOCKS
        assert not other.asked

    run(main)


def test_a_block_that_is_held_back_is_not_hedged_and_does_not_make_its_source_slow() -> None:
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
def test_a_false_refusal_as_too_large_does_not_hide_a_block_that_is_held_back() -> None:
    async def main() -> None:
        async def refuse(_cid: Cid) -> bytes:
            raise BlockTooLarge("it has 3,000,000 bytes")

        pool = pool_of(Timed("lies", refuse), Timed("one", limited(BLOCKS, 10)))
        assert (await pool.get(CID)).block == BLOCK

    run(main)


def test_many_requests_that_are_held_back_are_not_cancelled_or_repeated() -> None:
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


def test_a_range_that_is_held_back_comes_in_one_answer_of_a_real_server() -> None:
    """Each leaf is held back for more than 2 seconds, for which the pool waits for a silent source."""
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


def test_the_time_of_a_lookup_stands_still_while_the_limit_holds_it_back() -> None:
    """A router whose answer waits behind other answers must not count as silent."""

    class Held:
        """A router whose answer our limit holds back for `seconds`. Then it stalls."""

        name = "http://router.example"

        def __init__(self, seconds: float) -> None:
            self.limit, self.seconds = RateLimit(1), round(seconds)

        async def providers(self, _cid: Cid) -> AsyncGenerator[Sequence[str], None]:
            await self.limit.spend(self.seconds)
            yield ["/dns4/provider.example/tcp/443/https"]
            await trio.sleep_forever()

    async def main() -> None:
        start = trio.current_time()
        one, other = Held(3 * LOOKUP_SECONDS), Held(4 * LOOKUP_SECONDS)
        network = Network([one, other], HttpSettings())  # type: ignore[list-item]
        lookup = await network._look_up(CID)
        assert (lookup.failure, len(network.statistics())) == (None, 1)
        # the other router has the grace time, which stands still while its answer is held back
        assert trio.current_time() - start == pytest.approx(4 * LOOKUP_SECONDS + OTHER_ROUTERS_SECONDS)

    run(main)


def test_the_time_of_a_record_stands_still_while_the_limit_holds_it_back(tmp_path: Path) -> None:
    """The source of a record that waits behind other answers must not count as silent."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    path = f"/ipfs/{cids.text(CID)}"

    class Held:
        name = "http://gateway.example"
        limit = RateLimit(1)

        async def ipns_record(self, _name: str) -> bytes:
            await self.limit.spend(30)
            return make(key, path)

    class HeldDns:
        limit = RateLimit(1)

        async def texts(self, _domain: str) -> tuple[Sequence[str], float]:
            await self.limit.spend(30)
            return [f"dnslink={path}"], 60.0

        async def aclose(self) -> None:
            pass

    async def main() -> None:
        resolver = Resolver([Held()], NameRecords(tmp_path), HeldDns(), seconds=5.0)
        for name in (str(name_of(key)), "name.example"):
            assert str((await resolver.resolve_text(name)).path) == path

    run(main)
