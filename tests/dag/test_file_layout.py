"""Which leaves hold a range of a file, how many blocks that costs, and how wrong sizes in nodes are found."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import dagpb, file_layout
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Link, Links
from ipfsfuse.dag.nodes import Children, File, Leaf
from ipfsfuse.dag.unixfs import Type, UnixFS, encode
from ipfsfuse.errors import Malformed, NotALeaf, Unsupported
from tests.dag.blocks import Blocks, chunks_of, cid_of, identity, pseudo_random
from tests.dag.reading import file, read, read_range

MIB = 1 << 20


def test_a_file_in_one_block_is_its_own_leaf() -> None:
    heap = Blocks()
    for raw in (True, False):
        root = file(heap, heap.leaf(b"abc", raw))
        assert heap.drive(file_layout.leaves(root, 0, 3)) == [Leaf(root.cid, 0, 3)]
        assert heap.drive(file_layout.leaves(root, 3, 1)) == []
        assert heap.drive(file_layout.leaves(root, -5, 5)) == []
    assert heap.drive(file_layout.leaves(file(heap, heap.leaf(b"")), 0, 10)) == []


@pytest.mark.parametrize("raw", [True, False])
def test_reading_a_balanced_file_fetches_each_block_once(raw: bool) -> None:
    heap = Blocks()
    data = pseudo_random(20 * MIB + 5)
    cid = heap.balanced(chunks_of(data, MIB), 5, raw)  # three levels; the last branch has a single leaf
    root = file(heap, cid)
    for offset, size, blocks in [
        (0, 1, 1 + 1),  # nodes below the root, and leaves
        (7 * MIB - 1, 2, 1 + 2),
        (20 * MIB + 2, 100, 1 + 1),
        (11 * MIB, 3 * MIB, 1 + 3),
        (0, len(data), 5 + 21),
    ]:
        heap.asked.clear()
        assert read(heap, root, offset, size) == data[offset : offset + size]
        assert len(heap.fetched) == len(set(heap.fetched)) == blocks


def test_nodes_of_one_level_are_fetched_in_one_batch() -> None:
    heap = Blocks()
    data = pseudo_random(24 * MIB)
    root = file(heap, heap.balanced(chunks_of(data, MIB), 6, True))
    found = heap.drive(file_layout.leaves(root, 0, root.size))
    assert [leaf.offset for leaf in found] == [index * MIB for index in range(24)]
    assert [len(batch) for batch in heap.asked] == [4]


def test_tiny_chunks_are_read_after_one_wrong_guess() -> None:
    heap = Blocks()
    data = pseudo_random(5000)
    root = file(heap, heap.balanced(chunks_of(data, 10), 7, False))
    assert read(heap, root, 0, 5000) == data
    assert read(heap, root, 4990, 100) == data[4990:]
    first = heap.drive(file_layout.leaves(root, 0, 1))[0]
    with pytest.raises(NotALeaf):
        file_layout.leaf_content(first, heap.block(first.cid))
    assert heap.drive(file_layout.leaves(root, 0, 1, sure=True))[0].size == 10


@given(st.data())
def test_any_range_of_any_tree_is_read_correctly(tree: st.DataObject) -> None:
    heap = Blocks()
    content = bytearray()

    def grow(height: int) -> tuple[Cid, int]:
        shape = tree.draw(
            st.sampled_from(
                ["raw", "pb", "identity", "inner", "inner"] if height else ["raw", "pb", "identity"]
            )
        )
        if shape == "inner":
            inline = pseudo_random(tree.draw(st.integers(0, 3)))
            content.extend(inline)
            children = [grow(height - 1) for _ in range(tree.draw(st.integers(0, 4)))]
            return heap.file_node(children, inline), len(inline) + sum(size for _, size in children)
        data = pseudo_random(tree.draw(st.integers(0, 6)))
        content.extend(data)
        return (identity(data) if shape == "identity" else heap.leaf(data, shape == "raw")), len(data)

    cid, size = grow(4)
    root = file(heap, cid)
    assert root.size == size == len(content)
    offset, length = tree.draw(st.integers(0, size)), tree.draw(st.integers(0, size + 1))
    assert read_range(heap, root, offset, length, True) == content[offset : offset + length]
    assert read(heap, root, offset, length) == content[offset : offset + length]


def with_stated_size(heap: Blocks, child: Cid, stated: int) -> File:
    return file(heap, heap.file_node([(child, stated), (heap.leaf(b"tail"), 4)]))


def test_a_wrong_size_of_a_child_is_an_error_only_where_the_child_is_read() -> None:
    heap = Blocks()
    inner = heap.file_node([(heap.leaf(b"abc"), 3), (heap.leaf(b"de"), 2)])
    for child in (inner, heap.leaf(b"abcde"), heap.leaf(b"abcde", False)):
        assert read(heap, with_stated_size(heap, child, 5), 0, 9) == b"abcdetail"
        for stated in (1, 4, 6, 2 * MIB):
            root = with_stated_size(heap, child, stated)
            with pytest.raises(Malformed, match="parent states"):
                read(heap, root, 0, 1)
            assert read(heap, root, stated, 4) == b"tail"  # the rest can be read


def test_a_child_that_is_not_a_file_is_malformed() -> None:
    heap = Blocks()
    root = with_stated_size(heap, heap.directory([Link(heap.leaf(b"x"), b"n", 1)]), 3 * MIB)
    with pytest.raises(Malformed, match="not a file node"):
        read(heap, root, 0, 1)


def test_a_file_of_2_to_the_62_bytes_costs_only_what_is_read() -> None:
    heap = Blocks()
    node, size = heap.leaf(pseudo_random(MIB)), MIB
    while size < 1 << 62:
        node, size = heap.file_node([(node, size)] * 2), size * 2
    root = file(heap, node)
    assert root.size == 1 << 62
    assert read(heap, root, (1 << 61) + 5, 10) == pseudo_random(MIB)[5:15]
    assert len(heap.fetched) <= 43
    wrong = heap.file_node([(heap.leaf(b"x"), 1 << 62)])
    with pytest.raises(Malformed, match="a leaf can't have"):
        read(heap, file(heap, wrong), 1 << 61, 1)


def test_a_block_that_is_linked_a_billion_times_costs_only_what_is_read() -> None:
    heap = Blocks()
    node, size = heap.leaf(b"0123456789abcdef"), 16
    for _ in range(3):
        node, size = heap.file_node([(node, size)] * 1000), size * 1000
    root = file(heap, node)
    assert root.size == 16 * 10**9
    assert read(heap, root, 16 * 10**9 - 20, 100) == b"cdef0123456789abcdef"
    assert len(set(heap.fetched)) <= 3
    found = heap.drive(file_layout.leaves(root, 5, root.size, sure=True))
    assert len(found) == file_layout.LEAVES_PER_CALL
    assert found[0] == Leaf(found[0].cid, 0, 16)


def test_a_file_with_too_many_levels_is_malformed() -> None:
    heap = Blocks()
    node = heap.leaf(b"x", False)
    for _ in range(file_layout.MAX_HEIGHT):
        node = heap.file_node([(node, 1)])
    assert read(heap, file(heap, node), 0, 1) == b"x"
    root = file(heap, heap.file_node([(node, 1)]))
    with pytest.raises(Malformed, match="levels"):
        heap.drive(file_layout.leaves(root, 0, 1, sure=True))


def test_a_walk_returns_the_leaves_found_so_far_when_it_has_opened_enough_nodes() -> None:
    heap = Blocks()
    chains = []
    for number in range(200):
        node = heap.leaf(b"%03d" % number)
        for _ in range(40):
            node = heap.file_node([(node, 3)])
        chains.append((node, 3))
    root = file(heap, heap.file_node(chains))
    found = heap.drive(file_layout.leaves(root, 0, 600, sure=True))
    assert 0 < len(found) < 200
    assert len(heap.fetched) <= 40 * file_layout.MAX_PARALLEL_NODES
    assert read_range(heap, root, 0, 600, True) == b"".join(b"%03d" % number for number in range(200))


def test_children_of_0_bytes_are_never_fetched() -> None:
    heap = Blocks()
    nowhere = cid_of(b"nowhere")
    root = file(
        heap,
        heap.file_node(
            [(nowhere, 0), (heap.leaf(b"ab"), 2), (nowhere, 0), (heap.leaf(b"c"), 1), (nowhere, 0)]
        ),
    )
    assert read(heap, root, 0, 3) == b"abc"
    assert nowhere not in heap.fetched


def test_a_child_of_another_codec_is_taken_for_a_leaf_whose_content_is_refused() -> None:
    child = cid_of(b"x", 0x71)
    links = Links(child)
    links.add(0, len(child), 0, 0, 0)
    root = File(cid_of(b"r"), 1, 0, Children(links, array("Q", [0, 1])))
    (leaf,) = Blocks().drive(file_layout.leaves(root, 0, 1))
    assert leaf == Leaf(child, 0, 1)
    with pytest.raises(Unsupported, match="a part of a file can't be a dag-cbor block"):
        file_layout.leaf_content(leaf, b"x")


def test_a_trickle_tree_is_read_correctly() -> None:
    """Leaves come first, and then deeper and deeper branches, as in a file of `ipfs add --trickle`."""
    heap = Blocks()
    data = pseudo_random(9 * MIB + 17)
    pieces = chunks_of(data, MIB // 2)

    def branch(depth: int) -> tuple[Cid, int]:
        children = [
            (heap.leaf(piece, False), len(piece))
            for piece in [pieces.pop(0) for _ in range(min(3, len(pieces)))]
        ]
        for level in range(depth):
            children.extend(branch(level) for _ in range(2) if pieces)
        return heap.file_node(children), sum(size for _, size in children)

    cid, size = branch(4)
    assert not pieces
    assert size == len(data)
    root = file(heap, cid)
    for offset in range(0, len(data), MIB - 1):
        assert read(heap, root, offset, MIB) == data[offset : offset + MIB]


def test_a_node_that_is_larger_than_its_parent_states_is_an_error_by_every_walk() -> None:
    """Once, a walk that did not open such a node took its inline bytes for all of its content."""
    heap = Blocks()
    inner = heap.file_node([(heap.leaf(b"de"), 2)], inline=b"abc")
    for sure in (False, True):
        assert read_range(heap, with_stated_size(heap, inner, 5), 0, 9, True) == b"abcdetail"
        assert read(heap, with_stated_size(heap, inner, 5), 0, 9) == b"abcdetail"
        root = with_stated_size(heap, inner, 3)
        with pytest.raises(Malformed, match="has 5 bytes, but its parent states 3"):
            read_range(heap, root, 0, 1, True) if sure else read(heap, root, 0, 1)
        assert read(heap, root, 3, 4) == b"tail"


def test_a_root_with_inline_bytes_and_a_child_is_read_with_two_fetches() -> None:
    heap = Blocks()
    root = file(heap, heap.file_node([(heap.leaf(b"de"), 2)], inline=b"abc"))
    heap.asked.clear()
    assert read_range(heap, root, 0, 5, False) == b"abcde"
    assert len(heap.fetched) == 2


@pytest.mark.parametrize(
    "message",
    [
        UnixFS(Type.FILE, b"abc", 4),
        UnixFS(Type.FILE, b"abc", 3, [1]),
        UnixFS(Type.FILE, b"abc", 8, [5]),
    ],
)
def test_a_leaf_whose_sizes_contradict_each_other_is_malformed_by_every_walk(message: UnixFS) -> None:
    heap = Blocks()
    leaf = heap.put(dagpb.encode([], encode(message)))
    root = file(heap, heap.file_node([(leaf, 3), (heap.leaf(b"tail"), 4)]))
    for sure in (False, True):
        with pytest.raises(Malformed, match="a file node"):
            read_range(heap, root, 0, 1, sure)
