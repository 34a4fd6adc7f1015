"""The targets of the fuzzer. Each takes any bytes, and must end with a value or with an `IpfsFuseError`.

A decoded value must encode to bytes that decode to the same value.
"""

import hashlib
from collections.abc import Callable

from ipfsfuse.dag import (
    car,
    dagpb,
    directory_pages,
    file_layout,
    nodes,
    path,
    traversal,
    unixfs,
)
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import DAG_PB
from ipfsfuse.dag.nodes import Directory, File, Shard
from ipfsfuse.errors import IpfsFuseError
from tests.dag.samples import PARENT, VALID

STEPS = 40
"""Rounds of one walk. It needs a limit, because each block of the fuzzer's DAG is the same one."""


def read_dagpb(data: bytes) -> None:
    node = dagpb.decode(data)
    assert dagpb.decode(dagpb.encode(node.links, node.data, node.absent)) == node


def read_unixfs(data: bytes) -> None:
    message = unixfs.decode(data)
    assert unixfs.decode(unixfs.encode(message)) == message
    assert unixfs.decode(memoryview(data)) == message


def read_node(data: bytes) -> None:
    node = nodes.parse(PARENT, data)
    if isinstance(node, File):
        held = file_layout.block_content(PARENT, data)
        assert (len(held.data), held.size, held.interior) == (node.inline, node.size, bool(node.children))
        assert file_layout.is_canonical(PARENT, data) == file_layout.proves(
            cids.make(DAG_PB, b"\x12\x20" + hashlib.sha256(data).digest()), held.data
        )
        _drive(file_layout.leaves(node, node.size // 3, node.size, sure=True), data)


def read_hamt(data: bytes) -> None:
    """The first byte chooses the cookie to resume at. The rest is every node of the trie."""
    node = nodes.parse(PARENT, data[1:])
    if isinstance(node, Directory | Shard):
        after = int.from_bytes(data[:1], "big") << 55
        page = _drive(directory_pages.entries(node, after), data[1:])
        for entry in page.entries if page else ():
            assert after < entry.cookie < 1 << 63
            after = entry.cookie
        _drive(traversal.child(node, data[1:9]), data[1:])


def read_path(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    found = path.parse(text)
    assert all(path.can_hold(name) for name in found.names)


def read_cid(data: bytes) -> None:
    cid = cids.decode(data)
    assert cids.decode_prefix(data + b"x") == (cid, len(data))
    assert cids.parse(cids.text(cid)) == cid


def read_car(data: bytes) -> None:
    """The header, the sections, the index, and the same bytes as a stream in two pieces."""
    for decode in (car.decode_header, car.decode_v2, lambda part: car.section(part, 0)):
        try:
            decode(data)
        except IpfsFuseError:
            pass
    try:
        found = car.index_buckets(lambda at, size: data[at : at + size])
        car.index_find(found, b"\x12\x20" + data[:32].ljust(32), lambda at, size: data[at : at + size])
    except IpfsFuseError:
        pass
    parser = car.StreamParser()
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        for _ in parser.feed(piece):
            pass
    parser.finish()


def _drive(walk: traversal.Walk[object], block: bytes):  # type: ignore[no-untyped-def]  # the walk's result
    try:
        wanted = next(walk)
        for _ in range(STEPS):
            wanted = walk.send([nodes.parse(cid, block) for cid in wanted])
    except StopIteration as done:
        return done.value
    return None


TARGETS: dict[str, Callable[[bytes], None]] = {
    "dagpb": read_dagpb,
    "unixfs": read_unixfs,
    "node": read_node,
    "hamt": read_hamt,
    "path": read_path,
    "cid": read_cid,
    "car": read_car,
}


def feed(target: str, data: bytes) -> None:
    """Gives one input to one target. All exceptions except `IpfsFuseError` are passed on."""
    try:
        TARGETS[target](data)
    except IpfsFuseError as refused:
        assert "\n" not in str(refused)


def seeds(target: str) -> list[bytes]:
    """The first inputs."""
    blocks = list(VALID.values())
    cid = PARENT
    return {
        "hamt": [b"\0" + block for block in blocks],
        "unixfs": [dagpb.decode(block).data or b"" for block in blocks],
        "path": [f"{form}{cids.text(cid)}/a/b%20c".encode() for form in ("", "/ipfs/", "ipfs://")],
        "cid": [cid, cid[2:], b"\x01\x55\x00\x03abc"],
        "car": [car.encode_header([cid]) + car.section_head(cid, 3) + b"abc"],
    }.get(target, blocks)
