"""A walk of a directory in a repository: each block once, parents first, up to a limit."""

import math
import random
from collections.abc import Mapping, Sequence

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.local import kubo_repo
from ipfsfuse.sources.local.kubo_repo import BATCH, BATCH_BYTES, RepoWalk
from tests.sources.content import raw_blocks, trees

TREES = {
    name: (
        tree.root,
        {cid: block for cid, block in tree.blocks.items() if cids.inline_or_empty_block(cid) is None},
    )
    for name, tree in trees().items()
}
"""Without the empty block: it is known and never looked up."""


class BlockStore:
    """Blocks by CID. Each call looks up only some of the CIDs that it is given."""

    def __init__(self, blocks: Mapping[Cid, bytes], dice: random.Random) -> None:
        self._blocks, self._dice = blocks, dice

    def find(self, wanted: Sequence[Cid]) -> Sequence[bytes | None]:
        assert 0 < len(wanted) <= BATCH
        return [self._blocks.get(cid) for cid in wanted[: self._dice.randint(1, BATCH)]]


def all_of(walk: RepoWalk) -> list[tuple[Cid, bytes]]:
    got: list[tuple[Cid, bytes]] = []
    while some := walk.next_blocks():
        got += some
    return got


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TREES)
def test_each_block_comes_once_and_after_a_parent(name: str, seed: int) -> None:
    root, blocks = TREES[name]
    walk = RepoWalk(BlockStore(blocks, random.Random(seed)).find, root, 1 << 30)
    got = all_of(walk)
    assert sorted(got) == sorted(blocks.items())
    assert not walk.incomplete
    met = {root}
    for cid, block in got:
        assert cid in met
        met.update(nodes.children(nodes.parse(cid, block)))


@pytest.mark.parametrize("name", TREES)
def test_a_missing_block_makes_the_walk_incomplete_and_the_rest_comes(name: str) -> None:
    root, blocks = TREES[name]
    gone = list(blocks)[-1]
    walk = RepoWalk(
        BlockStore({cid: block for cid, block in blocks.items() if cid != gone}, random.Random(1)).find,
        root,
        1 << 30,
    )
    assert sorted(all_of(walk)) == sorted(item for item in blocks.items() if item[0] != gone)
    assert walk.incomplete


def test_the_limit_ends_the_walk_and_one_call_gives_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubo_repo.time, "monotonic", lambda: 0.0)  # a call also ends by its time
    large = raw_blocks(5, 40, size=200_000)
    root_block = dagpb.encode(
        [dagpb.Link(cid, b"%d" % number, 0) for number, cid in enumerate(large)], b"\x08\x01"
    )
    (some,) = raw_blocks(6, 1)
    root = cids.make(cids.DAG_PB, cids.multihash(some))
    stored = {root: root_block, **large}

    def find(wanted: Sequence[Cid]) -> Sequence[bytes | None]:
        return [stored.get(cid) for cid in wanted[:5]]

    walk = RepoWalk(find, root, 5 * BATCH_BYTES)
    first = walk.next_blocks()
    got = [*first, *all_of(walk)]
    size = sum(len(block) for _cid, block in got)
    assert 5 * BATCH_BYTES <= size < 5 * BATCH_BYTES + 5 * 200_000
    assert BATCH_BYTES <= sum(len(block) for _cid, block in first) < BATCH_BYTES + 5 * 200_000


READERS = 4
"""Blocks that one call reads at a time (`flatfs.c`)."""


def test_slow_lookups_make_the_batches_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = raw_blocks(8, 500, size=10)
    (some,) = raw_blocks(9, 1)
    root = cids.make(cids.DAG_PB, cids.multihash(some))
    stored = {
        root: dagpb.encode(
            [dagpb.Link(cid, b"%d" % number, 0) for number, cid in enumerate(leaves)], b"\x08\x01"
        ),
        **leaves,
    }
    now = 0.0
    each = 0.01
    looked_up: list[int] = []

    def find(wanted: Sequence[Cid]) -> Sequence[bytes | None]:
        nonlocal now
        now += each * math.ceil(len(wanted) / READERS)
        looked_up.append(len(wanted))
        return [stored.get(cid) for cid in wanted]

    monkeypatch.setattr(kubo_repo.time, "monotonic", lambda: now)
    slow = RepoWalk(find, root, 1 << 30)
    got = 0
    while True:
        begin = now
        some_blocks = slow.next_blocks()
        assert now - begin <= kubo_repo.BATCH_SECONDS + BATCH / READERS * each, (
            "this holds from the first call on"
        )
        if not some_blocks:
            break
        got += len(some_blocks)
    assert got == 501
    assert max(looked_up[5:]) / READERS * each < 0.1
    looked_up.clear()
    each = 0.0
    assert len(all_of(RepoWalk(find, root, 1 << 30))) == 501
    assert max(looked_up) == BATCH


def test_the_empty_block_is_not_looked_up() -> None:
    """The empty block is known. No node sends it."""
    (some,) = raw_blocks(9, 1)
    root = cids.make(cids.DAG_PB, cids.multihash(some))
    stored = {root: dagpb.encode([dagpb.Link(cids.EMPTY, b"empty", 0)], b"\x08\x01")}
    walk = RepoWalk(lambda wanted: [stored.get(cid) for cid in wanted], root, 1 << 20)
    assert all_of(walk) == list(stored.items())
    assert not walk.incomplete


def test_a_block_that_is_not_a_valid_node_has_no_children() -> None:
    (raw,) = raw_blocks(7, 1)
    broken = cids.make(cids.DAG_PB, cids.multihash(raw))
    walk = RepoWalk(lambda _wanted: [b"\xff\xff"], broken, 1 << 20)
    assert all_of(walk) == [(broken, b"\xff\xff")]
    assert not walk.incomplete
