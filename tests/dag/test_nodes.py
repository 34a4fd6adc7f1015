"""The nodes that blocks parse to: every UnixFS type, and every rule that a node can break."""

import pytest

from ipfsfuse.dag import dagpb, nodes, unixfs
from ipfsfuse.dag.cid import RAW, Cid
from ipfsfuse.dag.cid import make as make_cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.nodes import NO_META, Child, Directory, File, Meta, Shard, Symlink
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse.errors import Malformed, Unsupported
from tests.dag.blocks import Blocks, cid_of, fixtures, identity, shard

A, B = cid_of(b"a", RAW), cid_of(b"b", RAW)


def block(message: UnixFS, *links: Link) -> bytes:
    return dagpb.encode(links, unixfs.encode(message))


def parse(data: bytes) -> nodes.Node:
    return nodes.parse(cid_of(data), data)


def test_a_raw_block_is_a_file_whose_content_is_the_block() -> None:
    assert nodes.parse(A, b"a") == File(A, 1, 1)


@pytest.mark.parametrize("kind", [Type.FILE, Type.RAW])
def test_a_file_has_its_inline_bytes_and_then_its_children(kind: Type) -> None:
    data = block(UnixFS(kind, b"xyz", 113, [100, 10]), Link(A, b"", 5), Link(B, b"", 6))
    found = parse(data)
    assert isinstance(found, File)
    assert list(found.children) == [Child(A, 3, 100), Child(B, 103, 10)]
    assert found == File(cid_of(data), 113, 3, found.children, NO_META)


def test_a_file_without_filesize_has_the_size_of_its_data() -> None:
    assert parse(block(UnixFS(Type.FILE, b"xyz"))) == File(cid_of(block(UnixFS(Type.FILE, b"xyz"))), 3, 3)


def test_mode_is_masked_and_time_kept_to_the_nanosecond() -> None:
    found = parse(block(UnixFS(Type.DIRECTORY, mode=0o107755, mtime=-1)))
    assert found.meta == Meta(0o7755, -1)
    assert parse(block(UnixFS(Type.FILE, mode=0))).meta == Meta(0, None)


def test_the_first_of_two_entries_with_one_name_counts() -> None:
    found = parse(block(UnixFS(Type.DIRECTORY), Link(A, b"n", 1), Link(B, b"n", 2), Link(B, b"m", 3)))
    assert isinstance(found, Directory)
    assert [found.find(name) for name in (b"n", b"m", b"o")] == [Link(A, b"n", 1), Link(B, b"m", 3), None]
    assert len(found.links) == 3


def test_a_symlink_is_its_target() -> None:
    assert parse(block(UnixFS(Type.SYMLINK, b"../\xff"))) == Symlink(
        cid_of(block(UnixFS(Type.SYMLINK, b"../\xff"))), b"../\xff"
    )


def test_a_shard_has_its_slots_in_bit_order() -> None:
    links = [Link(A, b"03name", 1), Link(B, b"FF", 2)]
    found = parse(shard(256, [3, 255], links))
    assert isinstance(found, Shard)
    assert list(zip(found.indices, found.links, strict=True)) == [(3, links[0]), (255, links[1])]
    assert found.width == 256


@pytest.mark.parametrize(
    ("width", "prefix"), [(8, b"7"), (16, b"7"), (32, b"07"), (256, b"07"), (512, b"007"), (1024, b"007")]
)
def test_every_width_has_its_prefix(width: int, prefix: bytes) -> None:
    found = parse(shard(width, [7], [Link(A, prefix + b"n", 1)]))
    assert isinstance(found, Shard)
    assert found.width == width


def test_a_bit_field_may_keep_its_leading_zeros() -> None:
    message = UnixFS(Type.HAMT_SHARD, bytes(31) + b"\x08", hash_type=0x22, fanout=256)
    found = parse(block(message, Link(A, b"03n", 1)))
    assert isinstance(found, Shard)
    assert list(found.indices) == [3]


MALFORMED = {
    "no UnixFS data": dagpb.encode([], None),
    "data that is not UnixFS": dagpb.encode([], b"\xff"),
    "more sizes than links": block(UnixFS(Type.FILE, None, 1, [1])),
    "more links than sizes": block(UnixFS(Type.FILE, None, 0), Link(A, b"", 1)),
    "a file's link with a name": block(UnixFS(Type.FILE, None, 1, [1]), Link(A, b"n", 1)),
    "a filesize too small": block(UnixFS(Type.FILE, b"xy", 1)),
    "a filesize too large": block(UnixFS(Type.FILE, b"xy", 3)),
    "a filesize without the inline bytes": block(UnixFS(Type.FILE, b"xy", 1, [1]), Link(A, b"", 1)),
    "a file of 2**63 bytes": block(UnixFS(Type.FILE, None, 1 << 63, [1 << 63]), Link(A, b"", 1)),
    "sizes that overflow 64 bits": block(
        UnixFS(Type.FILE, None, 0, [1 << 63, 1 << 63]), Link(A, b"", 1), Link(A, b"", 1)
    ),
    "a symlink to nothing": block(UnixFS(Type.SYMLINK, b"")),
    "a symlink without data": block(UnixFS(Type.SYMLINK)),
    "a symlink with NUL": block(UnixFS(Type.SYMLINK, b"a\0b")),
    "a symlink of 1 MiB": block(UnixFS(Type.SYMLINK, b"x" * (1 << 20))),
    "a HAMT of another hash type": shard(256, [3], [Link(A, b"03n", 1)], hash_type=0x12),
    "a HAMT without a hash type": block(UnixFS(Type.HAMT_SHARD, b"\x08", fanout=256), Link(A, b"03n", 1)),
    "a HAMT without fanout": block(UnixFS(Type.HAMT_SHARD, b"\x08", hash_type=0x22), Link(A, b"03n", 1)),
    "a HAMT 4 wide": shard(4, [3], [Link(A, b"3n", 1)]),
    "a HAMT 2048 wide": shard(2048, [3], [Link(A, b"003n", 1)]),
    "a HAMT 255 wide": shard(255, [3], [Link(A, b"03n", 1)]),
    "a HAMT 2**63 wide": shard(1 << 63, [3], [Link(A, b"03n", 1)]),
    "a bit for no link": shard(256, [3, 4], [Link(A, b"03n", 1)]),
    "a link for no bit": shard(256, [3], [Link(A, b"03n", 1), Link(A, b"04n", 1)]),
    "a bit beyond the width": shard(8, [9], [Link(A, b"9n", 1)]),
    "a bit field longer than the width": block(
        UnixFS(Type.HAMT_SHARD, bytes(32) + b"\x08", hash_type=0x22, fanout=256), Link(A, b"03n", 1)
    ),
    "links out of bit order": shard(256, [3, 4], [Link(A, b"04n", 1), Link(A, b"03n", 1)]),
    "a prefix in lower case": shard(256, [10], [Link(A, b"0an", 1)]),
    "a prefix of another width": shard(256, [3], [Link(A, b"3n", 1)]),
    "no prefix": shard(256, [3], [Link(A, b"", 1)]),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_node_that_breaks_a_rule_is_refused_by_its_cid(data: bytes) -> None:
    with pytest.raises(Malformed, match=r"^bafy"):
        parse(data)


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        (0x51, "cbor"),
        (0x0200, "json"),
        (0x72, "libp2p-key"),
        (0x99, "0x99"),
    ],
)
def test_other_codecs_are_refused_by_name(codec: int, name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        nodes.parse(make_cid(codec, A[2:]), b"a")


def test_metadata_nodes_are_refused_as_by_the_mount_and_gateway_of_kubo() -> None:
    with pytest.raises(Unsupported, match="Metadata"):
        parse(block(UnixFS(Type.METADATA, b""), Link(A, b"", 1)))


def test_the_block_in_an_identity_cid_is_a_node_like_any_other() -> None:
    assert nodes.parse(identity(b"hello"), b"hello").cid == identity(b"hello")
    data = block(UnixFS(Type.FILE, b"hi", 2))
    found = nodes.parse(identity(data, 0x70), data)
    assert isinstance(found, File)
    assert found.size == 2


def test_blocks_of_the_gateway_fixtures_have_the_expected_types() -> None:
    kinds: dict[str, set[type]] = {}
    for path in fixtures("gateway-conformance/*.car"):
        heap = Blocks()
        found = kinds.setdefault(path.name, set())
        for cid in heap.load_car(path):
            try:
                found.add(type(nodes.parse(cid, heap.block(cid))))
            except Unsupported:
                found.add(Unsupported)
    assert kinds["path_gateway_unixfs_symlink.car"] == {Directory, Symlink, File}
    assert kinds["trustless_gateway_car_single-layer-hamt-with-multi-block-files.car"] == {Shard, File}
    assert kinds["path_gateway_dag_plain-cbor.car"] == {Unsupported}
    assert all(
        found <= {Directory, File, Symlink}
        for name, found in kinds.items()
        if "hamt" not in name and "cbor" not in name
    )


def test_a_cid_of_version_0_is_dag_pb() -> None:
    data = block(UnixFS(Type.FILE, b"hi", 2))
    assert nodes.parse(Cid(cid_of(data)[2:]), data).cid == cid_of(data)[2:]
