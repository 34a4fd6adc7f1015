"""Directories that are fetched by one request: which ones, and which of their blocks."""

from collections.abc import Iterable, Sequence

import pytest
import trio

from ipfsfuse.cache.base import Seen
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.nodes import Node
from ipfsfuse.sources.base import Subtree
from ipfsfuse.vfs.prefetch import (
    CLAIM_SLACK,
    FEW_NODES,
    MAX_CONTENTS,
    MAX_NODES,
    SMALL_FILE,
    SmallFileBuffer,
    SubtreePrefetcher,
)
from tests.dag.blocks import Blocks, shard


class Cache:
    """A cache whose `gather` only notes its arguments."""

    def __init__(self) -> None:
        self.subtrees: list[Subtree] = []
        self.wanted: list[Cid] = []
        self.seen: Seen = lambda _cid, _block: ()

    def gather(self, subtree: Subtree, wanted: Iterable[Cid], seen: Seen) -> trio.Event:
        self.subtrees.append(subtree)
        self.wanted = list(wanted)
        self.seen = seen
        return trio.Event()


class Directories(Blocks):
    """Blocks, and a prefetcher for the directories in them."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        self.small_files = SmallFileBuffer()
        self.remembered: list[Cid] = []
        self.prefetcher = SubtreePrefetcher(
            self.cache, lambda node, _size: self.remembered.append(node.cid), self.small_files
        )

    def node(self, cid: Cid) -> Node:
        return nodes.parse(cid, self.block(cid))

    def contents_of(self, cid: Cid) -> bool:
        return self.prefetcher.contents_of(self.node(cid)) is not None

    def arrive(self, cid: Cid) -> Sequence[Cid]:
        """Lets a block arrive. Returns the further blocks that are wanted because of it."""
        return list(self.cache.seen(cid, self.block(cid)))

    def of_sizes(self, *sizes: int) -> Cid:
        """A directory whose links claim `sizes`."""
        return self.directory(
            [Link(self.leaf(b"%d" % place), b"%d" % place, size) for place, size in enumerate(sizes)]
        )


def test_the_contents_of_a_directory_may_take_twice_the_size_that_its_links_claim() -> None:
    made = Directories()
    directory = made.of_sizes(100, 200, 300)
    assert made.contents_of(directory)
    assert made.cache.subtrees == [Subtree(directory, True, 2 * 600 + CLAIM_SLACK)]
    assert made.cache.wanted == [made.leaf(b"%d" % place) for place in range(3)]


@pytest.mark.parametrize(
    ("sizes", "worth"),
    [
        ([SMALL_FILE] * (MAX_CONTENTS // SMALL_FILE), True),
        ([SMALL_FILE] * (MAX_CONTENTS // SMALL_FILE) + [1], False),
        ([1, MAX_CONTENTS], False),
        ([SMALL_FILE, SMALL_FILE], True),
        ([SMALL_FILE, SMALL_FILE + 1], False),
        ([SMALL_FILE, 1, SMALL_FILE + 1], True),
        ([SMALL_FILE + 1], False),
        ([0, 0, 0], True),
        ([1, 1 << 62], False),
        ([], False),
    ],
    ids=[
        "the most",
        "too much",
        "mostly one",
        "small",
        "mostly large",
        "half large",
        "large",
        "nothing claimed",
        "absurd",
        "empty",
    ],
)
def test_a_directory_is_fetched_whole_if_it_is_not_large_and_has_mostly_small_files(
    sizes: list[int], worth: bool
) -> None:
    made = Directories()
    assert made.contents_of(made.of_sizes(*sizes)) == worth
    assert len(made.cache.subtrees) == worth


def test_only_directories_are_fetched_whole_and_each_only_once() -> None:
    made = Directories()
    directory = made.of_sizes(1, 2)
    assert [made.contents_of(directory) for _ in range(3)] == [True, False, False]
    assert not made.contents_of(made.leaf(b"raw"))
    assert not made.contents_of(made.balanced([b"a", b"b"], 4, True))
    assert len(made.cache.subtrees) == 1
    made.prefetcher.forget()
    assert made.contents_of(directory), "its blocks may have left the cache"


def test_arriving_blocks_are_remembered_and_only_directories_lead_further() -> None:
    made = Directories()
    raw, large = made.leaf(b"small"), made.leaf(bytes(SMALL_FILE + 1))
    file = made.balanced([b"one", b"two"], 4, True)
    below = made.directory([Link(raw, b"raw", 5), Link(file, b"file", 6)])
    hamt = made.trie([b"%d" % number for number in range(300)])
    assert made.contents_of(
        made.directory(
            [Link(cid, b"%d" % place, 9) for place, cid in enumerate((raw, large, file, below, hamt))]
        )
    )
    assert [made.arrive(cid) for cid in (raw, large, file)] == [[], [], []]
    assert made.arrive(below) == [raw, file]
    deeper = made.node(hamt)
    assert isinstance(deeper, nodes.Shard)
    assert made.arrive(hamt) == deeper.links.cids()
    assert made.remembered == [raw, large, file, below, hamt]
    assert (made.small_files.take(raw), made.small_files.take(large)) == (b"small", None)


@pytest.mark.parametrize("whole", [True, False])
def test_a_malformed_unknown_or_large_child_is_skipped(whole: bool) -> None:
    made = Directories()
    hamt = made.trie([b"%d" % number for number in range(3000)])
    if whole:
        assert made.contents_of(made.of_sizes(1, 2))
    else:
        made.prefetcher.nodes_of(made.node(hamt))
        assert made.cache.subtrees
    bad = [made.put(b"\xff\xff"), made.put(shard(256, [1, 2], [])), made.put(b"\xa0", 0x71)]
    for cid in bad:
        assert made.arrive(cid) == []
    heavy = made.directory(
        [
            Link(made.leaf(b"x"), b"n" * 200 + b"%d" % number, 1)
            for number in range(nodes.MAX_PARSED_ON_LOOP // 200)
        ]
    )
    assert len(made.block(heavy)) > nodes.MAX_PARSED_ON_LOOP
    assert made.arrive(heavy) == []
    assert made.remembered == []
    assert made.arrive(hamt) != []


def test_all_nodes_of_a_hamt_are_wanted_but_no_child() -> None:
    made = Directories()
    hamt = made.trie([b"%d" % number for number in range(3000)])
    made.prefetcher.nodes_of(made.node(hamt))
    assert made.cache.subtrees == [Subtree(hamt, False, MAX_NODES)]
    wanted, reached = list(made.cache.wanted), set[Cid]()
    while wanted:
        reached.add(cid := wanted.pop())
        wanted += made.arrive(cid)
    assert {cids.multihash(cid) for cid in reached} == {*made.by_hash} - {
        cids.multihash(hamt),
        cids.multihash(made.leaf(b"")),
    }
    assert made.small_files.take(made.leaf(b"")) is None


@pytest.mark.parametrize("count", [FEW_NODES - 1, FEW_NODES])
def test_a_hamt_of_few_nodes_is_fetched_node_by_node(count: int) -> None:
    made = Directories()
    target = made.leaf(b"")
    below = [made.put(shard(256, [place], [Link(target, b"%02Xname" % place, 1)])) for place in range(count)]
    links = [Link(cid, b"%02X" % place, 1) for place, cid in enumerate(below)] + [Link(target, b"FFname", 1)]
    made.prefetcher.nodes_of(made.node(made.put(shard(256, [*range(count), 255], links))))
    assert made.cache.wanted == (below if count >= FEW_NODES else [])
    made.prefetcher.nodes_of(made.node(made.of_sizes(*range(50))))
    assert len(made.cache.subtrees) == (count >= FEW_NODES)
