"""Any exception of a source counts as its failure: the next source is asked in the same call, and the log
stays short."""

import logging
from collections.abc import Callable, Sequence

import pytest
import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed, Unavailable
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Fetched, LeafRange, Source, Subtree
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.managed_source import FAULT, LOG_EVERY
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.streams import BlockBatch, Delivery, Send
from ipfsfuse.structures import Buffer
from tests.sources.content import sample, trees
from tests.sources.servers import Ask, Server
from tests.sources.streamed import give_each
from tests.sources.timed import BLOCKS, CID, Answer, InPlace, Takes, Timed, pool_of, run

TREE = trees()["hamt"]
FILE = sample(8, count=6)
pytestmark = pytest.mark.logs("it counts as a failure of that source")


def raising(make: Callable[[], BaseException]) -> Answer:
    async def answer(_cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        raise make()

    return answer


async def in_a_nursery(_cid: Cid) -> bytes:
    """Fails like a source that runs two tasks."""

    async def fail() -> None:
        raise OverflowError("date value out of range")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        nursery.start_soon(trio.sleep_forever)
    raise AssertionError


async def no_bytes(_cid: Cid) -> bytes:
    return None  # type: ignore[return-value]  # what a source must not do


ANSWERS: dict[str, Answer] = {
    "value": raising(lambda: ValueError("Invalid IPv6 URL")),
    "overflow": raising(lambda: OverflowError("year 99999 is out of range")),
    "group": raising(
        lambda: ExceptionGroup("several", [ExceptionGroup("deeper", [KeyError("x")]), OSError(5, "x")])
    ),
    "nursery": in_a_nursery,
    "no bytes": no_bytes,
    "recursion": raising(RecursionError),
    "memory": raising(MemoryError),
    "closed": raising(lambda: trio.ClosedResourceError("x")),
    "ours": raising(lambda: StoreFailed("the folder can't be read")),
}


class Faulty(Timed):
    """Raises what its answer raises, from every call. In ranges and directories, after two blocks."""

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        for index, leaf in enumerate(wanted.leaves[:2]):
            await send.send(Delivery(index, [FILE.blocks[leaf.cid]]))
        await self.get(wanted.leaves[2].cid)

    async def send_subtree(self, send: Send[BlockBatch]) -> None:
        for cid, block in list(TREE.blocks.items())[:2]:
            await send.send([(cid, block)])
        await self.get(CID)

    def roots(self) -> Sequence[Cid]:
        raise ValueError("roots")

    async def aclose(self) -> None:
        raise ValueError("aclose")


@pytest.mark.parametrize("kind", list(ANSWERS))
def test_any_exception_of_one_source_leaves_the_block_to_the_next(kind: str) -> None:
    async def main() -> None:
        bad, good = Faulty("bad", ANSWERS[kind]), Timed("good")
        pool = pool_of(bad, good)
        start = trio.current_time()
        for cid in list(BLOCKS)[:100]:
            assert (await pool.get(cid)).source is good
        assert trio.current_time() == start, "the next source is asked in the same call, without a wait"
        statistics = pool.statistics()[0]
        assert statistics.failures == {"store" if kind == "ours" else FAULT: len(bad.asked)}
        assert (statistics.state, len(bad.asked)) == ("open", 3)

    run(main)


@pytest.mark.parametrize("kind", [kind for kind in ANSWERS if kind != "no bytes"])
def test_any_exception_in_a_range_or_a_directory_counts_as_a_failure_of_the_source(kind: str) -> None:
    async def main() -> None:
        pool = pool_of(Faulty("bad", ANSWERS[kind]), Timed("good", blocks=FILE.blocks | TREE.blocks))
        got: dict[int, Buffer] = {}

        async def deliver(index: int, blocks: Sequence[Buffer], _source: Source) -> None:
            got.update((index + at, block) for at, block in enumerate(blocks))

        await give_each(pool.stream(FILE.run), deliver)
        assert got == FILE.expected
        takes = Takes()
        await give_each(pool.subtree(Subtree(TREE.root, True, 1 << 20), takes), takes.take)
        assert list(takes.got) == list(TREE.blocks)[:2], "the blocks before the failure are kept"
        assert sum(pool.statistics()[0].failures.values()) == 2

    run(main)


def test_other_sources_are_asked_and_closed_if_every_call_of_one_in_place_raises() -> None:
    async def main() -> None:
        closed: list[str] = []

        class Good(Timed):
            def roots(self) -> Sequence[Cid]:
                return [CID]

            async def aclose(self) -> None:
                closed.append(self.name)

        class FaultyInPlace(Faulty, InPlace):
            pass

        good = Good("good", blocks=BLOCKS | TREE.blocks)
        pool = pool_of(FaultyInPlace("bad", ANSWERS["value"]), good)
        assert (await pool.get(CID)).source is good
        assert pool.roots() == [CID]
        assert await threads.run_sync(pool.roots) == [CID], "a mount asks for the roots in a thread"
        takes = Takes()
        await give_each(pool.subtree(Subtree(TREE.root, True, 1 << 20), takes), takes.take)
        assert takes.got
        await pool.aclose()
        assert closed == ["good"]

    run(main)


def test_the_only_source_is_asked_until_the_deadline_although_it_raises() -> None:
    async def main() -> None:
        bad = Faulty("bad", ANSWERS["overflow"])
        with trio.move_on_after(30) as scope:
            await pool_of(bad).get(CID)
        assert scope.cancelled_caught
        assert 4 <= len(bad.asked) <= 20
        with pytest.raises(Unavailable):
            await pool_of(InPlace("bad", ANSWERS["overflow"])).get(CID)

    run(main)


def test_a_cancelled_reader_does_not_count_as_a_failure() -> None:
    async def main() -> None:
        async def slow(_cid: Cid) -> bytes:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
            raise AssertionError

        pool = pool_of(Timed("one", slow), Timed("two", slow))
        for _ in range(10):
            with trio.move_on_after(0.1) as scope:
                await pool.get(CID)
            assert scope.cancelled_caught
        assert [each.failures for each in pool.statistics()] == [{}, {}]

    run(main)


def test_an_exception_during_a_cancellation_does_not_stop_the_cancellation() -> None:
    async def main() -> None:
        async def both(_cid: Cid) -> bytes:
            async def fail_when_cancelled() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    raise ValueError("while it cleans up")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_when_cancelled)
                nursery.start_soon(trio.sleep_forever)
            raise AssertionError

        with trio.move_on_after(0.1) as scope:
            await pool_of(Timed("one", both)).get(CID)
        assert scope.cancelled_caught

    run(main)


def test_an_exception_that_ends_the_program_does_not_count_as_a_failure() -> None:
    async def main() -> None:
        for ending in (KeyboardInterrupt, SystemExit):
            with pytest.raises(ending):
                await pool_of(Timed("one", raising(ending))).get(CID)
            with pytest.RaisesGroup(ending):
                await pool_of(
                    Timed("one", raising(lambda: BaseExceptionGroup("x", [ending(), ValueError()])))  # noqa: B023
                ).get(CID)

    run(main)


def test_an_exception_is_logged_in_one_line_and_not_every_time(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def bad(cid: Cid) -> bytes:
            raise ValueError("a header of \x1b[31m its own\n2026-01-01 a forged line " + "x" * 1000)

        one, good = Timed("one", bad), Timed("good")
        pool = pool_of(one, good)

        async def read_all() -> Fetched:
            for cid in BLOCKS:
                fetched = await pool.get(cid)
                await trio.sleep(LOG_EVERY / len(BLOCKS) / 2)
            return fetched

        with caplog.at_level(logging.INFO, "ipfsfuse"):
            await read_all()
            assert len(caplog.messages) == 1
            assert caplog.messages[0].startswith(
                "one: ValueError: a header of \\x1b[31m its own\\n2026-01-01 a forged"
            )
            assert "\n" not in caplog.messages[0]
            assert len(caplog.messages[0]) < 400
            assert "test_pool_faults.py:" in caplog.messages[0]
            await trio.sleep(LOG_EVERY)
            await read_all()
            assert len(caplog.messages) == 2
            assert "more like it in the" in caplog.messages[1]

    run(main)


HEADS = {
    "location": {"status": 302, "Location": "http://[::1/x"},
    "retry-after": {"status": 429, "Retry_After": "Fri, 31 Dec 99999 23:59:59 GMT"},
    "retry-after in seconds": {"status": 503, "Retry_After": "9" * 400},
}


@pytest.mark.parametrize("kind", list(HEADS))
def test_a_bad_header_of_one_gateway_does_not_stop_reads_from_another(kind: str) -> None:
    def behave(ask: Ask) -> None:
        head = dict(HEADS[kind])
        ask.send(int(head.pop("status")), b"", **{name: str(value) for name, value in head.items()})

    async def main() -> None:
        with Server(BLOCKS, behave) as bad, Server(BLOCKS) as good:
            pool = SourcePool([Gateway(Http(parse_origin(server.url)), server.url) for server in (bad, good)])
            with trio.fail_after(20):
                for cid in list(BLOCKS)[:100]:
                    assert (await pool.get(cid)).source.name == good.url
            assert sum(pool.statistics()[0].failures.values()) == len(bad.asked) <= 6
            await pool.aclose()

    trio.run(main)
