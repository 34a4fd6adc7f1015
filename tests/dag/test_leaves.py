"""The content of leaves, and how it is verified when the block is gone."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, file_layout, unixfs
from ipfsfuse.dag.cid import RAW, Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse.errors import Malformed, NotALeaf, Unsupported
from tests.dag.blocks import Blocks, cid_of, field, identity, pseudo_random

FORMS = [
    (kind, sized, bool(size), size)
    for kind in (Type.FILE, Type.RAW)
    for sized in (True, False)
    for size in (0, 1, 120, 127, 128, 300, 262144)
]
FORMS += [(kind, sized, True, 0) for kind in (Type.FILE, Type.RAW) for sized in (True, False)]


@pytest.mark.parametrize(("kind", "sized", "with_data", "size"), FORMS)
def test_each_form_that_importers_write_is_proved_by_its_content_alone(
    kind: Type, sized: bool, with_data: bool, size: int
) -> None:
    data = pseudo_random(size)
    block = dagpb.encode(
        [], unixfs.encode(UnixFS(kind, data if with_data else None, size if sized else None))
    )
    for cid in (cid_of(block), Cid(cid_of(block)[2:])):
        view = file_layout.block_content(cid, block).data
        assert view == data
        assert view.obj is block  # nothing was copied
        assert file_layout.is_canonical(cid, block)
        assert file_layout.proves(cid, data)
        assert file_layout.proves(cid, bytearray(data))
        assert file_layout.leaf_block(cid, memoryview(data)) == block
        assert file_layout.leaf_block(cid, data + b"x") is None
        assert not file_layout.proves(cid, data + b"x")
        if data:
            assert not file_layout.proves(cid, bytes([data[0] ^ 1]) + data[1:])


def test_a_raw_leaf_is_its_content() -> None:
    cid = cid_of(b"abc", RAW)
    assert file_layout.block_content(cid, b"abc").data == b"abc"
    assert file_layout.is_canonical(cid, b"abc")
    assert file_layout.proves(cid, memoryview(b"xabc")[1:])
    assert not file_layout.proves(cid, b"abd")


def test_any_allowed_hash_and_identity_can_prove_a_leaf() -> None:
    block = dagpb.encode([], unixfs.encode(UnixFS(Type.FILE, b"abc", 3)))
    assert file_layout.proves(cids.make(0x70, b"\x13\x40" + hashlib.sha512(block).digest()), b"abc")
    assert file_layout.proves(identity(block, 0x70), b"abc")
    assert file_layout.proves(identity(b"abc"), b"abc")
    assert not file_layout.proves(identity(b"abc"), b"abd")


OTHER = {
    "with a mode": dagpb.encode([], unixfs.encode(UnixFS(Type.FILE, b"abc", 3, mode=0o644))),
    "with filesize first": field(1, field(1, 2) + field(3, 3) + field(2, b"abc")),
    "with a padded length": b"\x0a\x89\x00" + unixfs.encode(UnixFS(Type.FILE, b"abc", 3)),
    "with an unknown field": field(1, unixfs.encode(UnixFS(Type.FILE, b"abc", 3)) + field(9, 1)),
}


@pytest.mark.parametrize("block", OTHER.values(), ids=OTHER.keys())
def test_other_forms_are_read_but_are_not_canonical(block: bytes) -> None:
    assert file_layout.block_content(cid_of(block), block).data == b"abc"
    assert not file_layout.is_canonical(cid_of(block), block)
    assert not file_layout.proves(cid_of(block), b"abc")


def test_an_interior_node_holds_its_inline_bytes_and_is_not_a_canonical_leaf() -> None:
    heap = Blocks()
    cid = heap.file_node([(heap.leaf(b"xyz"), 3)], inline=b"abc")
    assert file_layout.block_content(cid, heap.block(cid)) == (b"abc", 6, True)
    assert not file_layout.is_canonical(cid, heap.block(cid))
    assert file_layout.leaf_content(Leaf(cid, 0, 3, True), heap.block(cid)) == b"abc"
    for size in (3, 6):
        with pytest.raises(NotALeaf):
            file_layout.leaf_content(Leaf(cid, 0, size), heap.block(cid))
    with pytest.raises(Malformed, match="its parent states 5") as refused:
        file_layout.leaf_content(Leaf(cid, 0, 5), heap.block(cid))
    assert not isinstance(refused.value, NotALeaf)


@pytest.mark.parametrize("raw", [True, False])
def test_a_leaf_of_another_size_than_its_parent_states_is_malformed(raw: bool) -> None:
    heap = Blocks()
    cid = heap.leaf(b"abc", raw)
    assert file_layout.leaf_content(Leaf(cid, 0, 3), heap.block(cid)) == b"abc"
    with pytest.raises(Malformed, match="holds 3 bytes"):
        file_layout.leaf_content(Leaf(cid, 0, 4), heap.block(cid))


def test_a_block_that_is_not_part_of_a_file_is_refused() -> None:
    heap = Blocks()
    directory = heap.directory([Link(heap.leaf(b"x"), b"n", 1)])
    with pytest.raises(Malformed, match="directory"):
        file_layout.block_content(directory, heap.block(directory))
    with pytest.raises(Unsupported, match="dag-cbor"):
        file_layout.block_content(cid_of(b"x", 0x71), b"x")
    assert not file_layout.is_canonical(cid_of(b"x", 0x71), b"x")
    with pytest.raises(Malformed):
        file_layout.block_content(cid_of(b"\x0a"), b"\x0a")


@given(st.binary(max_size=40))
def test_any_block_has_content_or_is_refused_and_canonical_content_is_proved(block: bytes) -> None:
    cid = cid_of(block)
    try:
        found = file_layout.block_content(cid, block).data
    except Malformed:
        assert not file_layout.is_canonical(cid, block)
        return
    assert file_layout.is_canonical(cid, block) == file_layout.proves(cid, found)
