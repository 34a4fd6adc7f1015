"""Deadlines of callers: a source that stalls, rests or is busy leaves time to ask the others."""

from collections.abc import Sequence

import pytest
import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.base import Source, Subtree
from ipfsfuse.structures import Buffer
from tests.sources.content import sample, trees
from tests.sources.streamed import give_each
from tests.sources.timed import BLOCKS, CID, InPlace, Takes, Timed, after, fails, never, pool_of, run

DEADLINES = [0.3, 1.0, 3.0, 30.0]
TREE = trees()["hamt"]
FILE = sample(9, count=6, size=5000)
"""Its leaves are small enough to be hashed without a thread: the mock clock does not wait for threads."""


@pytest.mark.parametrize("deadline", DEADLINES)
@pytest.mark.parametrize("stalled", [1, 2, 5])
def test_sources_that_stall_leave_time_for_a_good_one_after_them(deadline: float, stalled: int) -> None:
    async def main() -> None:
        sources = [Timed(f"stalled {number}", never) for number in range(stalled)]
        pool = pool_of(*sources, Timed("good", after(deadline / 10)), deadline=deadline)
        for cid in list(BLOCKS)[:20]:
            with trio.fail_after(deadline):
                assert (await pool.get(cid)).source.name == "good"

    run(main)


@pytest.mark.parametrize("deadline", DEADLINES)
def test_the_next_source_is_asked_soon_even_if_the_first_is_usually_slow(deadline: float) -> None:
    async def main() -> None:
        first, good = Timed("first", never), Timed("good")
        pool = pool_of(first, good, deadline=deadline)
        for _ in range(40):
            pool.network()[0].health.record_success(20.0, 1)
        for cid in list(BLOCKS)[:20]:
            with trio.fail_after(min(deadline / 2, 3.1)):
                assert (await pool.get(cid)).source is good

    run(main)


@pytest.mark.parametrize("deadline", DEADLINES)
def test_a_range_that_stalls_is_completed_by_another_source_within_the_deadline(deadline: float) -> None:
    async def main() -> None:
        async def some(cid: Cid) -> bytes:
            return FILE.blocks[cid] if cid == FILE.leaves[0].cid else await never(cid)

        pool = pool_of(Timed("stalls", some), Timed("good", blocks=FILE.blocks), deadline=deadline)
        got: dict[int, Buffer] = {}

        async def deliver(index: int, blocks: Sequence[Buffer], _source: Source) -> None:
            got.update((index + at, block) for at, block in enumerate(blocks))

        with trio.fail_after(deadline / 2):
            await give_each(pool.stream(FILE.run), deliver)
        assert got == FILE.expected

    run(main)


@pytest.mark.parametrize("deadline", DEADLINES)
def test_a_range_that_stalls_at_the_only_source_is_broken_off_after_half_the_deadline(
    deadline: float,
) -> None:
    async def main() -> None:
        stuck = [True]

        async def answer(cid: Cid) -> bytes:
            if stuck[0]:
                stuck[0] = False
                await trio.sleep_forever()
            return FILE.blocks[cid]

        async def deliver(_index: int, _blocks: Sequence[Buffer], _source: Source) -> None:
            pass

        with trio.fail_after(deadline * 0.6):
            await give_each(pool_of(Timed("one", answer), deadline=deadline).stream(FILE.run), deliver)

    run(main)


@pytest.mark.parametrize("deadline", DEADLINES)
def test_a_directory_that_does_not_begin_is_given_up_after_a_third_of_the_deadline(deadline: float) -> None:
    async def main() -> None:
        pool = pool_of(Timed("stalls", never, blocks=TREE.blocks), deadline=deadline)
        for _ in range(40):
            pool.network()[0].health.record_success(20.0, 1)
        start = trio.current_time()
        takes = Takes()
        await give_each(pool.subtree(Subtree(TREE.root, True, 1 << 20), takes), takes.take)
        assert trio.current_time() - start <= deadline / 3 + 0.07

    run(main)


@pytest.mark.parametrize("deadline", [1.0, 30.0])
def test_a_block_that_appears_at_the_only_source_before_the_deadline_is_found(deadline: float) -> None:
    async def main() -> None:
        source = Timed("node", blocks={})

        async def appears() -> None:
            await trio.sleep(deadline * 0.6)
            source.blocks = BLOCKS

        async with trio.open_nursery() as nursery:
            nursery.start_soon(appears)
            with trio.fail_after(deadline):
                await pool_of(source, deadline=deadline).get(CID)

    run(main)


# -- a source that is busy -----------------------------------------------------------------------------------


class OneAtATime(Timed):
    """Answers 429 if it is asked for more at a time, like Kubo with Gateway.MaxConcurrentRequests: 1."""

    running = 0
    refused = 0

    async def get(self, cid: Cid) -> bytes:
        if self.running:
            self.refused += 1
            raise SourceFailed("too many requests", "busy", retry_after=60)
        self.running += 1
        try:
            await trio.sleep(0.01)
            return self.block(cid)
        finally:
            self.running -= 1


@pytest.mark.parametrize("readers", [2, 5, 100])
def test_a_source_that_allows_one_request_at_a_time_serves_many_readers(readers: int) -> None:
    async def main() -> None:
        source = OneAtATime("one")
        pool = pool_of(source)
        queue = iter(BLOCKS)

        async def reader() -> None:
            for cid in queue:
                with trio.fail_after(30):
                    await pool.get(cid)

        async with trio.open_nursery() as nursery:
            for _ in range(readers):
                nursery.start_soon(reader)
        statistics = pool.statistics()[0]
        assert (statistics.blocks, statistics.state) == (len(BLOCKS), "good")
        assert statistics.most_in_flight < readers + 10
        assert source.refused <= len(BLOCKS), "the pool learns to ask for less at a time"

    run(main)


def test_a_range_that_is_refused_as_too_many_requests_is_fetched_leaf_by_leaf() -> None:
    async def main() -> None:
        class Busy(OneAtATime):
            async def send_leaves(self, wanted: object, send: object) -> None:
                raise SourceFailed("too many requests", "busy", retry_after=60)

        source = Busy("one", blocks=FILE.blocks)
        pool = pool_of(source)
        got: dict[int, Buffer] = {}

        async def deliver(index: int, blocks: Sequence[Buffer], _source: Source) -> None:
            got.update((index + at, block) for at, block in enumerate(blocks))

        with trio.fail_after(5):
            await give_each(pool.stream(FILE.run), deliver)
        assert got == FILE.expected

    run(main)


# -- a machine that sleeps -----------------------------------------------------------------------------------


def test_a_pause_of_a_source_ends_while_the_machine_sleeps() -> None:
    """trio's clock stands still while the machine sleeps, like CLOCK_MONOTONIC. Only `asleep` grows."""

    async def main() -> None:
        slept = [0.0]
        library = InPlace("library", blocks={})
        source, other = Timed("far", fails), Timed("other", blocks={})
        pool = pool_of(library, source, other, asleep=lambda: slept[0])
        for cid in list(BLOCKS)[:5]:
            with trio.move_on_after(0.1):
                await pool.get(cid)
        health = pool.network()[-1].health
        health.record_failure(trio.current_time(), "busy", "x", 600)
        assert health.wait(trio.current_time()) == 600
        source.answer = None
        with trio.move_on_after(20) as scope:
            await pool.get(CID)
        assert scope.cancelled_caught, "Retry-After is heeded while the machine is awake"
        slept[0] += 3600
        with trio.fail_after(10):
            assert (await pool.get(CID)).source is source

    run(main)


def test_a_call_that_waits_when_the_machine_falls_asleep_gets_its_block_afterwards() -> None:
    async def main() -> None:
        slept = [0.0]
        source = Timed("far", fails)
        pool = pool_of(source, Timed("other", blocks={}), asleep=lambda: slept[0])
        pool.network()[0].health.record_failure(trio.current_time(), "busy", "x", 600)

        async def fall_asleep() -> None:
            await trio.sleep(5)
            slept[0] += 3600
            source.answer = None

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fall_asleep)
            with trio.fail_after(20):
                assert (await pool.get(CID)).source is source

    run(main)
