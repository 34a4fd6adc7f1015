"""How fast directory and file blocks decode, strictly, beside Google's protobuf (upb, not strict) on the same
bytes."""

import hashlib
import statistics
import time
from collections.abc import Callable

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, nodes, unixfs
from ipfsfuse.dag.cid import DAG_PB, RAW
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dag.protoschema import message_class

ROUNDS = 15
NODE, DATA = message_class("PBNode"), message_class("Data")
PARENT = cids.make(DAG_PB, b"\x12\x20" + bytes(32))


def main() -> None:
    """Prints milliseconds of processor time, medians of `ROUNDS`, and the ratio to protobuf's."""
    print(f"{'block':28} {'bytes':>9} {'ours, ms':>9} {'upb, ms':>9} {'ratio':>6} {'at most':>9}")
    _row("directory of 10,000 links", _directory(10_000), 20.0)
    _row("file node of 174 links", _file(174), 0.4)
    _row("directory block of 2 MiB", _directory(34_400), None)


def _row(name: str, block: bytes, limit: float | None) -> None:
    ours, theirs = _measure(lambda: nodes.parse(PARENT, block)), _measure(lambda: _by_protobuf(block))
    bound = "" if limit is None else f"{limit:9.1f}"
    print(f"{name:28} {len(block):9} {ours:9.2f} {theirs:9.2f} {ours / theirs:6.1f} {bound}")


def _by_protobuf(block: bytes) -> list[tuple[bytes, bytes, int]]:
    """What `nodes.parse` does but for its checks: links as Python values, and the UnixFS message."""
    node, data = NODE(), DATA()
    node.ParseFromString(block)
    data.ParseFromString(node.Data)  # type: ignore[attr-defined]  # the class is made at run time
    list(data.blocksizes)  # type: ignore[attr-defined]  # as above
    return [(link.Hash, link.Name, link.Tsize) for link in node.Links]  # type: ignore[attr-defined]  # as above


def _measure(call: Callable[[], object]) -> float:
    """Milliseconds of processor time: of a short call, of many in a row."""
    call()
    once = _time(call, 1)
    count = max(1, int(0.02 / max(once, 1e-6)))
    return 1000 * statistics.median(_time(call, count) for _ in range(ROUNDS))


def _time(call: Callable[[], object], count: int) -> float:
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def _link(number: int, name: bytes, size: int) -> Link:
    return Link(cids.make(RAW, b"\x12\x20" + hashlib.sha256(b"%d" % number).digest()), name, size)


def _directory(count: int) -> bytes:
    links = [_link(number, b"file-%06d.txt" % number, 1000 + 37 * number) for number in range(count)]
    return dagpb.encode(links, unixfs.encode(UnixFS(Type.DIRECTORY)))


def _file(count: int) -> bytes:
    links = [_link(number, b"", 262158) for number in range(count)]
    return dagpb.encode(links, unixfs.encode(UnixFS(Type.FILE, None, 262144 * count, [262144] * count)))
