"""What lies below a directory, looked up by CID: all of it once, parents first, up to a limit."""

import random
from collections.abc import Mapping, Sequence

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.files import descent as descents
from ipfsfuse.sources.files.descent import AT_ONCE, TOGETHER, Descent
from tests.sources.content import raw_blocks, trees

TREES = {
    name: (tree.root, {cid: block for cid, block in tree.blocks.items() if cids.known(cid) is None})
    for name, tree in trees().items()
}
"""Without the empty block, which nobody needs to be asked for."""


class Shelf:
    """Blocks by CID; each call finds a few of those it is asked for."""

    def __init__(self, blocks: Mapping[Cid, bytes], dice: random.Random) -> None:
        self._blocks, self._dice = blocks, dice

    def find(self, wanted: Sequence[Cid]) -> Sequence[bytes | None]:
        assert 0 < len(wanted) <= AT_ONCE
        return [self._blocks.get(cid) for cid in wanted[: self._dice.randint(1, AT_ONCE)]]


def all_of(descent: Descent) -> list[tuple[Cid, bytes]]:
    got: list[tuple[Cid, bytes]] = []
    while some := descent.some():
        got += some
    return got


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TREES)
def test_each_block_once_and_behind_its_parents(name: str, seed: int) -> None:
    root, blocks = TREES[name]
    descent = Descent(Shelf(blocks, random.Random(seed)).find, root, 1 << 30)
    got = all_of(descent)
    assert sorted(got) == sorted(blocks.items())
    assert not descent.lacking
    met = {root}
    for cid, block in got:
        assert cid in met
        met.update(nodes.children(nodes.parse(cid, block)))


@pytest.mark.parametrize("name", TREES)
def test_what_is_not_there_is_told_and_the_rest_comes(name: str) -> None:
    root, blocks = TREES[name]
    gone = list(blocks)[-1]
    descent = Descent(
        Shelf({cid: block for cid, block in blocks.items() if cid != gone}, random.Random(1)).find,
        root,
        1 << 30,
    )
    assert sorted(all_of(descent)) == sorted(item for item in blocks.items() if item[0] != gone)
    assert descent.lacking


def test_the_limit_ends_it_and_one_call_gives_some() -> None:
    large = raw_blocks(5, 40, size=200_000)
    root_block = dagpb.encode(
        [dagpb.Link(cid, b"%d" % number, 0) for number, cid in enumerate(large)], b"\x08\x01"
    )
    (some,) = raw_blocks(6, 1)
    root = cids.make(cids.DAG_PB, cids.multihash(some))
    shelf = {root: root_block, **large}

    def find(wanted: Sequence[Cid]) -> Sequence[bytes | None]:
        return [shelf.get(cid) for cid in wanted[:5]]

    descent = Descent(find, root, 5 * TOGETHER)
    first = descent.some()
    got = [*first, *all_of(descent)]
    size = sum(len(block) for _cid, block in got)
    assert 5 * TOGETHER <= size < 5 * TOGETHER + 5 * 200_000
    assert TOGETHER <= sum(len(block) for _cid, block in first) < TOGETHER + 5 * 200_000


def test_where_looking_up_takes_long_fewer_are_looked_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = raw_blocks(8, 500, size=10)
    (some,) = raw_blocks(9, 1)
    root = cids.make(cids.DAG_PB, cids.multihash(some))
    shelf = {
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
        now += each * len(wanted)
        looked_up.append(len(wanted))
        return [shelf.get(cid) for cid in wanted]

    monkeypatch.setattr(descents.time, "monotonic", lambda: now)
    slow = Descent(find, root, 1 << 30)
    got = 0
    while True:
        begin = now
        some_blocks = slow.some()
        assert now - begin <= descents.SOON + AT_ONCE * each, "from the first call on"
        if not some_blocks:
            break
        got += len(some_blocks)
    assert got == 501
    assert max(looked_up[5:]) * each < 0.1
    looked_up.clear()
    each = 0.0
    assert len(all_of(Descent(find, root, 1 << 30))) == 501
    assert max(looked_up) == AT_ONCE


def test_nobody_is_asked_for_what_everybody_knows() -> None:
    """No node sends the empty block."""
    (some,) = raw_blocks(9, 1)
    root = cids.make(cids.DAG_PB, cids.multihash(some))
    shelf = {root: dagpb.encode([dagpb.Link(cids.EMPTY, b"empty", 0)], b"\x08\x01")}
    descent = Descent(lambda wanted: [shelf.get(cid) for cid in wanted], root, 1 << 20)
    assert all_of(descent) == list(shelf.items())
    assert not descent.lacking


def test_a_block_that_is_no_node_leads_nowhere() -> None:
    (raw,) = raw_blocks(7, 1)
    broken = cids.make(cids.DAG_PB, cids.multihash(raw))
    descent = Descent(lambda _wanted: [b"\xff\xff"], broken, 1 << 20)
    assert all_of(descent) == [(broken, b"\xff\xff")]
    assert not descent.lacking
