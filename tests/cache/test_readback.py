"""Staged leaves that are read back ahead of their reader."""

from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pinset import PinsetCache
from tests.cache.standin import Chain, flip, make_file, staged


@pytest.mark.parametrize("dag_pb", [False, True], ids=["raw", "dag-pb"])
def test_all_of_a_staged_file_is_handed_over_and_no_source_is_asked(tmp_path: Path, dag_pb: bool) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, (9 << 16) + 1234, dag_pb=dag_pb)
    got = dict[int, bytes]()

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, 64 << 20) as cache:
            await cache.reader.ahead(file, leaves)
            asked = len(chain.asked)
            await cache.reader.ahead(
                file, leaves, lambda leaf, data: got.__setitem__(leaf.offset, bytes(data))
            )
            assert len(chain.asked) == asked

    trio.run(main)
    assert b"".join(got[leaf.offset] for leaf in leaves) == content


@pytest.mark.logs("wrong bytes in the cache")
def test_only_a_wrong_leaf_is_fetched_again(tmp_path: Path) -> None:
    chain = Chain()
    file, leaves, content = make_file(chain, 9 << 16)
    got = dict[int, bytes]()

    async def main() -> None:
        async with PinsetCache.open(tmp_path, chain, 64 << 20) as cache:
            await cache.reader.ahead(file, leaves)
            chain.asked.clear()
            flip(staged(tmp_path, "staging")[0], (4 << 16) + 5)
            await cache.reader.ahead(
                file, leaves, lambda leaf, data: got.__setitem__(leaf.offset, bytes(data))
            )
            assert chain.asked == [leaves[4].cid]
            chain.asked.clear()
            await cache.reader.ahead(file, leaves, lambda leaf, data: None)
            assert chain.asked == []

    trio.run(main)
    assert b"".join(got[leaf.offset] for leaf in leaves) == content
