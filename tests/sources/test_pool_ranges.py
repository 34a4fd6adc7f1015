"""The pool's fetches of ranges: other sources complete them, and a stalled one is ended."""

from collections.abc import Sequence

import pytest
import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.base import Source
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.structures import Buffer
from tests.sources.content import SampleFile, sample
from tests.sources.streamed import give_each
from tests.sources.timed import Timed, never, pool_of, run


@pytest.mark.logs("gateway has wrong bytes")
@pytest.mark.parametrize("wrong", [False, True])
def test_a_range_is_completed_by_a_source_that_has_the_rest(wrong: bool) -> None:
    file = sample(8, count=6)
    some = {leaf.cid: file.blocks[leaf.cid] for leaf in file.leaves[:3]}
    if wrong:
        some[file.leaves[0].cid] = b"rot"

    async def main() -> None:
        one, two = Timed("gateway", blocks=some), Timed("two", blocks=file.blocks)
        got = await collect(pool_of(one, two), file)
        assert {index: block for index, (block, _source) in got.items()} == file.expected
        assert {index for index, (_block, source) in got.items() if source is one} == (
            {1, 2} if wrong else {0, 1, 2}
        )

    run(main)


async def collect(pool: SourcePool, file: SampleFile) -> dict[int, tuple[Buffer, Source]]:
    got: dict[int, tuple[Buffer, Source]] = {}

    async def deliver(index: int, blocks: Sequence[Buffer], source: Source) -> None:
        assert got.keys().isdisjoint(range(index, index + len(blocks)))
        got.update((index + at, (block, source)) for at, block in enumerate(blocks))

    await give_each(pool.stream(file.run), deliver)
    return got


def test_a_range_that_stalls_is_broken_off_and_completed_by_another_source() -> None:
    file = sample(9, count=6)

    async def main() -> None:
        async def answer(cid: Cid) -> bytes:
            return file.blocks[cid] if cid in (file.leaves[0].cid, file.leaves[1].cid) else await never(cid)

        start = trio.current_time()
        got = await collect(pool_of(Timed("stalls", answer), Timed("good", blocks=file.blocks)), file)
        assert {index: block for index, (block, _source) in got.items()} == file.expected
        assert trio.current_time() - start <= 4

    run(main)


def test_a_slow_reader_of_a_range_does_not_count_as_a_stalled_source() -> None:
    file = sample(10, count=4)

    async def main() -> None:
        source = Timed("one", blocks=file.blocks)
        pool = pool_of(source)

        async def deliver(_index: int, _blocks: Sequence[Buffer], _source: Source) -> None:
            await trio.sleep(100)

        await give_each(pool.stream(file.run), deliver)
        assert (len(source.asked), pool.statistics()[0].failures) == (4, {})

    run(main)


def test_a_failure_of_the_reader_does_not_count_against_the_source() -> None:
    file = sample(11, count=4)

    async def main() -> None:
        pool = pool_of(Timed("one", blocks=file.blocks))

        async def deliver(_index: int, _blocks: Sequence[Buffer], _source: Source) -> None:
            raise SourceFailed("the reader's trouble", "reader")

        with pytest.raises(SourceFailed, match="reader's trouble"):
            await give_each(pool.stream(file.run), deliver)
        assert pool.statistics()[0].failures == {}

    run(main)
