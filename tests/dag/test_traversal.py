"""Lookups, in directories of both kinds, and paths through them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import dagpb, directory_pages, hamt, path, traversal, unixfs
from ipfsfuse.dag.cid import RAW, Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.nodes import File, Symlink
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse.errors import Malformed, NotADirectory, NotFound, Unsupported
from tests.dag.blocks import Blocks, cid_of, fixtures, identity, shard
from tests.dag.reading import directory

A, B = cid_of(b"a", RAW), cid_of(b"b", RAW)


def test_a_basic_directory_answers_from_its_own_block() -> None:
    heap = Blocks()
    here = directory(
        heap,
        heap.directory(
            [
                Link(A, b"n", 1),
                Link(B, b"n", 2),
                Link(B, b"..", 3),
                Link(B, b"", 4),
                Link(B, b"x/y", 5),
                Link(B, b"m" * 256, 6),
            ]
        ),
    )
    assert heap.drive(traversal.child(here, b"n")) == Link(A, b"n", 1)
    for name in (b"", b".", b"..", b"x/y", b"N", b"n\0", b"m" * 256):
        assert heap.drive(traversal.child(here, name)) is None
    assert heap.asked == []


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128, 256, 512, 1024])
def test_a_hamt_of_any_width_is_followed_along_one_path(width: int) -> None:
    heap = Blocks()
    names = [b"name %d" % number for number in range(700)]
    here = directory(heap, heap.trie(names, width))
    for name in names[::7]:
        heap.asked.clear()
        link = heap.drive(traversal.child(here, name))
        assert link is not None
        assert link.name == name
        assert all(len(batch) == 1 for batch in heap.asked)
        assert len(heap.asked) <= 6
    for name in (b"", b"..", b"name", b"name 700", b"03", b"name 1/"):
        assert heap.drive(traversal.child(here, name)) is None


@given(
    st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=60, unique=True),
    st.sampled_from([8, 16, 256, 1024]),
    st.binary(min_size=1, max_size=8),
)
def test_a_lookup_in_a_hamt_finds_its_names_and_no_other(
    names: list[bytes], width: int, other: bytes
) -> None:
    names = [name for name in names if path.can_hold(name)]
    heap = Blocks()
    here = directory(heap, heap.trie(names, width))
    for name in [*names, other]:
        link = heap.drive(traversal.child(here, name))
        assert (link is not None) == (name in names)


def test_names_are_hashed_as_in_go() -> None:
    """Lookups find all names in a real directory of go-unixfs, so the hash and the bit order are right."""
    (path,) = fixtures("gateway-conformance/*hamt*.car")
    heap = Blocks()
    root = heap.load_car(path)[0]
    here = directory(heap, root)
    found = [heap.drive(traversal.child(here, b"%d.txt" % number)) for number in range(1, 1001)]
    assert all(link is not None for link in found)
    assert heap.drive(traversal.child(here, b"1001.txt")) is None
    assert hamt.hash64(b"foo") == 0xE271865701F54561  # murmur3-x64-128 of "foo", its low half


def deep(width: int, levels: int, name: bytes) -> tuple[Blocks, Cid]:
    """A HAMT with one entry below `levels` nodes, at the places that its hash gives."""
    heap, key, level = Blocks(), hamt.hash64(name), width.bit_length() - 1
    link = Link(A, name, 1)
    for depth in reversed(range(levels)):
        shift = 64 - level * (depth + 1)
        index = (key >> shift if shift >= 0 else key << -shift) & (width - 1)
        prefix = b"%0*X" % (len(f"{width - 1:X}"), index)
        cid = heap.put(shard(width, [index], [link._replace(name=prefix + link.name)]))
        link = Link(cid, b"", 1)
    return heap, link.cid


@pytest.mark.parametrize(("width", "most"), [(8, 21), (16, 16), (256, 8), (1024, 6)])
def test_a_hamt_may_be_as_deep_as_its_hash_has_bits(width: int, most: int) -> None:
    heap, root = deep(width, most, b"name")
    assert heap.drive(traversal.child(directory(heap, root), b"name")) == Link(A, b"name", 1)
    assert heap.drive(directory_pages.entries(directory(heap, root), 0)).entries[0].name == b"name"
    heap, root = deep(width, most + 1, b"name")
    with pytest.raises(Malformed, match="deeper"):
        heap.drive(traversal.child(directory(heap, root), b"name"))
    with pytest.raises(Malformed, match="deeper"):
        heap.drive(directory_pages.entries(directory(heap, root), 0))


def first_prefix(name: bytes) -> tuple[int, bytes]:
    index = hamt.hash64(name) >> 56
    return index, b"%02X" % index


def test_other_nodes_and_misplaced_entries_in_a_hamt_are_malformed() -> None:
    heap = Blocks()
    index, prefix = first_prefix(b"name")
    misplaced = (index + 1) % 256
    wrong = {
        "a file": heap.leaf(b"x", raw=False),
        "a raw block": heap.leaf(b"x"),
        "a basic directory": heap.directory([Link(A, b"name", 1)]),
        "an empty shard": heap.put(shard(256, [], [])),
    }
    for below in wrong.values():
        here = directory(heap, heap.put(shard(256, [index], [Link(below, prefix, 1)])))
        with pytest.raises(Malformed, match="not a HAMT node"):
            heap.drive(traversal.child(here, b"name"))
        with pytest.raises(Malformed, match="not a HAMT node"):
            heap.drive(directory_pages.entries(here, 0))
    here = directory(heap, heap.put(shard(256, [misplaced], [Link(A, b"%02Xname" % misplaced, 1)])))
    assert heap.drive(traversal.child(here, b"name")) is None
    with pytest.raises(Malformed, match="at a place"):
        heap.drive(directory_pages.entries(here, 0))
    # at the right place in the root, but not below it
    below = heap.put(shard(256, [index], [Link(A, prefix + b"name", 1)]))
    here = directory(heap, heap.put(shard(256, [index], [Link(below, prefix, 1)])))
    second = hamt.hash64(b"name") >> 48 & 255
    if second != index:
        assert heap.drive(traversal.child(here, b"name")) is None
    with pytest.raises(Malformed, match="at a place"):
        heap.drive(directory_pages.entries(here, 0))


def test_a_path_is_resolved_block_by_block() -> None:
    heap = Blocks()
    leaf = heap.leaf(b"hello")
    link = heap.put(dagpb.encode([], unixfs.encode(UnixFS(Type.SYMLINK, b"there"))))
    inner = heap.directory(
        [Link(leaf, b"f", 5), Link(link, b"l", 5), Link(identity(b"in the CID"), b"i", 10)]
    )
    root = heap.directory([Link(inner, b"d", 5)])
    assert heap.drive(traversal.resolve(IpfsPath(root, (b"d", b"f")))) == File(leaf, 5, 5)
    assert heap.fetched == [root, inner, leaf]
    found = heap.drive(traversal.resolve(IpfsPath(root, (b"d", b"l"))))
    assert isinstance(found, Symlink)
    heap.asked.clear()
    assert heap.drive(traversal.resolve(IpfsPath(identity(b"x")))) == File(identity(b"x"), 1, 1)
    assert heap.asked == []
    assert heap.drive(traversal.resolve(IpfsPath(root, (b"d", b"i")))) == File(
        identity(b"in the CID"), 10, 10
    )
    with pytest.raises(NotFound, match="/d/x: no such entry"):
        heap.drive(traversal.resolve(IpfsPath(root, (b"d", b"x", b"y"))))
    with pytest.raises(NotADirectory, match="/d/f is not a directory"):
        heap.drive(traversal.resolve(IpfsPath(root, (b"d", b"f", b"y"))))
    with pytest.raises(NotADirectory):
        heap.drive(traversal.resolve(IpfsPath(root, (b"d", b"l", b"y"))))


def test_an_identity_cid_that_is_too_long_is_refused_where_it_is_followed() -> None:
    heap = Blocks()
    root = heap.directory([Link(identity(b"x" * 129), b"long", 1)])
    assert [
        entry.name for entry in heap.drive(directory_pages.entries(directory(heap, root), 0)).entries
    ] == [b"long"]
    with pytest.raises(Unsupported, match="129 bytes"):
        heap.drive(traversal.resolve(IpfsPath(root, (b"long",))))


def test_a_directory_in_an_identity_cid() -> None:
    heap = Blocks()
    inner = dagpb.encode([Link(A, b"f", 1)], unixfs.encode(UnixFS(Type.DIRECTORY)))
    assert len(inner) <= 128
    heap.put(b"a", RAW)
    assert heap.drive(traversal.resolve(IpfsPath(identity(inner, 0x70), (b"f",)))) == File(A, 1, 1)
    assert heap.fetched == [A]


def test_a_block_walk_gives_each_block_once_with_parents_before_children() -> None:
    below = {b"root": [b"a", b"b", b"a"], b"a": [b"c", b"d"], b"b": [b"d", b"e"]}
    names = {cid_of(name): name for name in (b"root", b"a", b"b", b"c", b"d", b"e")}
    walk = traversal.BlockWalk([cid_of(b"root")], 0)
    order = []
    for cid, depth in walk:
        order.append((names[cid], depth))
        walk.add([cid_of(child) for child in below.get(names[cid], ())], depth + 1)
    assert order == [(b"root", 0), (b"a", 1), (b"c", 2), (b"d", 2), (b"b", 1), (b"e", 2)]
    assert walk.seen == set(names)


def test_some_blocks_of_a_walk_are_taken_and_put_back() -> None:
    cids = [cid_of(b"%d" % number) for number in range(6)]
    walk = traversal.BlockWalk(cids, None)
    assert walk.upcoming(2) == cids[:2]
    taken = walk.take(4)
    walk.put_back(taken[1:])
    walk.add([cids[0], cids[5]], None)
    assert [cid for cid, _state in walk] == [cids[5], *cids[1:5]]


def test_a_walk_skips_identity_cids_of_bytes_but_not_those_of_nodes() -> None:
    node = identity(dagpb.encode([Link(A, b"f", 1)], unixfs.encode(UnixFS(Type.DIRECTORY))), 0x70)
    walk = traversal.BlockWalk([identity(b"bytes"), node, A], None)
    assert [cid for cid, _state in walk] == [node, A]
