"""One valid block of every kind. The tests damage them, and the fuzzer begins with them."""

from ipfsfuse.dag import dagpb, unixfs
from ipfsfuse.dag.cid import RAW, Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dag.blocks import Blocks, cid_of, identity, pseudo_random, shard

A, B = cid_of(b"a", RAW), cid_of(b"b")
PARENT = cid_of(b"parent")


def _valid() -> dict[str, bytes]:
    heap = Blocks()
    root = heap.trie([b"n%d" % number for number in range(40)], 8)
    sizes = [262144] * 12
    v0 = Cid(B[2:])
    links = [
        Link(A, b"one", 5),
        Link(v0, "zwei ü".encode(), 300),
        Link(identity(b"inline"), b"three", 2**33),
        Link(B, b"n" * 200, 0),
    ]
    return {
        "directory": dagpb.encode(
            links, unixfs.encode(UnixFS(Type.DIRECTORY, mode=0o755, mtime=1_700_000_000_123_456_789))
        ),
        "file": dagpb.encode(
            [Link(A, b"", 262144)] * 12, unixfs.encode(UnixFS(Type.FILE, None, sum(sizes), sizes))
        ),
        "file with inline data": dagpb.encode(
            [Link(A, b"", 9)], unixfs.encode(UnixFS(Type.FILE, b"inline", 14, [8]))
        ),
        "leaf": dagpb.encode([], unixfs.encode(UnixFS(Type.FILE, pseudo_random(200), 200))),
        "raw type": dagpb.encode([], unixfs.encode(UnixFS(Type.RAW, pseudo_random(130), 130))),
        "trie": heap.block(root),
        "wide trie": shard(1024, [5, 700], [Link(A, b"005x", 1), Link(A, b"2BC", 1)]),
        "symlink": dagpb.encode([], unixfs.encode(UnixFS(Type.SYMLINK, b"../target"))),
        "metadata": dagpb.encode([Link(A, b"", 1)], unixfs.encode(UnixFS(Type.METADATA, b"\x0a\x04text"))),
        "no UnixFS": dagpb.encode([Link(A, b"x", 1)], b"\x01\x02\x03"),
    }


VALID = _valid()
