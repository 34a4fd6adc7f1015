"""Hostile blocks of 2 MiB: how much time and memory it may cost to read or to refuse one. Hostile HAMTs: they
seem to have no end.

Time is counted in executed lines, so that it does not depend on the speed of the machine. A line takes about
40 ns, so LINES is 480 ms. Counting is slow, so blocks and limits are smaller by the factor SCALE.
"""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from ipfsfuse.dag import dagpb, directory_pages, hamt, nodes, traversal, unixfs
from ipfsfuse.dag.cid import RAW, Cid
from ipfsfuse.dag.dagpb import Link
from ipfsfuse.dag.nodes import Directory
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse.errors import IpfsFuseError, Malformed
from tests.dag.blocks import Blocks, cid_of, field, shard
from tests.dag.reading import directory

SIZE = 2 << 20
LINES = 12_000_000
SCALE = 32
MEMORY = 64 << 20
CID = cid_of(b"parent")
TINY = field(1, b"\x01\x00\x00\x00")
FILE, DIRECTORY = field(1, 2), field(1, field(1, 1))
SHA = field(1, b"\x01\x55\x12\x20" + bytes(32))
NO_HASH = b"\x12\x00"


def filled(size: int, piece: bytes, end: bytes = b"") -> bytes:
    return piece * ((size - len(end)) // len(piece)) + end


def message(size: int, piece: bytes) -> bytes:
    return field(1, FILE + filled(size - 20, piece))


def named(size: int) -> bytes:
    return (
        b"".join(
            field(2, TINY + field(2, number.to_bytes(3, "big")) + field(3, 0)) for number in range(size // 17)
        )
        + NO_HASH
    )


def shard_of(size: int) -> bytes:
    return field(
        1, unixfs.encode(UnixFS(Type.HAMT_SHARD, b"\xff" * (size - 30), hash_type=0x22, fanout=1024))
    )


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "tiny links": lambda size: filled(size, field(2, TINY), DIRECTORY),
    "tiny links and a bad one": lambda size: filled(size, field(2, TINY), NO_HASH),
    "tiny links of a file": lambda size: filled(size, field(2, TINY), field(1, FILE)),
    "tiny links with long sizes": lambda size: filled(
        size, field(2, TINY + b"\x18" + b"\xff" * 9 + b"\x01"), NO_HASH
    ),
    "tiny links with names": lambda size: filled(size, field(2, TINY + field(2, b"") + field(3, 0)), NO_HASH),
    "links of distinct names": named,
    "CIDs of long varints": lambda size: filled(
        size, field(2, field(1, b"\x01" + (b"\xff" * 8 + b"\x01") * 2 + b"\x00")), NO_HASH
    ),
    "usual links and a bad one": lambda size: filled(
        size, field(2, SHA + field(2, b"") + field(3, 0)), NO_HASH
    ),
    "links with padded lengths": lambda size: filled(size, b"\x12\xa8\x00" + SHA + field(3, 0), NO_HASH),
    "one link with a long name": lambda size: (
        field(2, SHA + field(2, b"n" * (size - 100)) + field(3, 0)) + NO_HASH
    ),
    "empty data fields": lambda size: message(size, field(2, b"")),
    "unknown fields": lambda size: message(size, field(15, 0)),
    "distinct unknown fields": lambda size: field(
        1, FILE + b"".join(field(number, 0) for number in range(1000, 1000 + size // 5))
    ),
    "block sizes": lambda size: message(size, field(4, 1)),
    "block sizes of ten bytes": lambda size: message(size, b"\x20" + b"\xff" * 9 + b"\x01"),
    "packed block sizes": lambda size: field(1, FILE + field(4, filled(size - 20, b"\x80\x02"))),
    "packed block sizes in turn": lambda size: message(size, field(4, b"\x01")),
    "block sizes in turn with others": lambda size: message(size, field(4, 1) + field(15, 0)),
    "times": lambda size: message(size, field(8, field(1, 0))),
    "one time of many fields": lambda size: field(1, FILE + field(8, filled(size - 20, field(1, 0)))),
    "a bit field of 2 MiB": shard_of,
    "a target of 2 MiB": lambda size: field(1, unixfs.encode(UnixFS(Type.SYMLINK, b"/" * (size - 30)))),
    "a varint without end": lambda size: field(1, FILE + b"\x18" + b"\xff" * size),
}


def lines_of(block: bytes) -> int:
    count = 0

    def trace(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        nodes.parse(CID, block)
    except IpfsFuseError:
        pass
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_block_of_2_mib_costs_little_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dagpb, unixfs):
        monkeypatch.setattr(module, "MAX_LINKS", module.MAX_LINKS // SCALE)
    assert lines_of(HOSTILE[kind](SIZE // SCALE)) < LINES // SCALE


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_block_of_2_mib_costs_little_memory(kind: str) -> None:
    block = HOSTILE[kind](SIZE)
    assert SIZE - 100 < len(block) < SIZE + 100 or "distinct" in kind
    tracemalloc.start()
    try:
        nodes.parse(CID, block)
    except IpfsFuseError as refused:
        assert len(str(refused)) < 300
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


def test_a_directory_of_2_mib_is_read_in_full() -> None:
    links = [field(2, SHA + field(2, b"%05d" % number) + field(3, 0)) for number in range(SIZE // 51)]
    found = nodes.parse(CID, b"".join(links) + DIRECTORY)
    assert isinstance(found, Directory)
    assert len({link.name for link in found.links}) == len(links) > 40_000
    assert all(found.find(link.name) == link for link in found.links[::100])


def endless(levels: int, bottom: Cid, prefix: bytes = b"%X") -> tuple[Blocks, Cid]:
    """A trie 8 wide with `levels` levels. All slots of a node lead to the same node."""
    heap, cid = Blocks(), bottom
    for _ in range(levels):
        cid = heap.put(shard(8, range(8), [Link(cid, prefix % index, 1) for index in range(8)]))
    return heap, cid


def test_a_trie_that_repeats_one_node_is_refused_at_its_first_entry() -> None:
    """The same entry is at 8**20 places, but its hash allows at most one of them."""
    bottom = shard(8, [0], [Link(cid_of(b"a", RAW), b"0name", 1)])
    heap, root = endless(20, cid_of(bottom))
    heap.put(bottom)
    with pytest.raises(Malformed, match="at a place"):
        heap.drive(directory_pages.entries(directory(heap, root), 0))
    assert len(heap.fetched) < 100


@pytest.mark.parametrize("levels", [21, 22, 30])
def test_a_trie_without_entries_is_refused_after_few_fetches(levels: int) -> None:
    bottom = shard(8, [], [])
    heap, root = endless(levels, cid_of(bottom))
    heap.put(bottom)
    with pytest.raises(Malformed):
        heap.drive(directory_pages.entries(directory(heap, root), 0))
    with pytest.raises(Malformed):
        heap.drive(traversal.child(directory(heap, root), b"name"))
    assert len(heap.fetched) < 200


def test_a_page_of_a_valid_hamt_has_a_limit() -> None:
    """Full nodes, 1024 wide. Nodes that were opened ahead and don't fit in a page come with the next page."""
    heap = Blocks()
    names: dict[int, list[bytes]] = {}
    for number in range(150_000):
        name = b"%d" % number
        names.setdefault(hamt.hash64(name) >> 54, []).append(name)
    root = directory(heap, heap.trie([name for index in range(40) for name in names[index]], 1024))
    after, total = 0, 0
    while True:
        page = heap.drive(directory_pages.entries(root, after))
        assert len(page.entries) <= 8000
        total += len(page.entries)
        if page.end:
            break
        after = page.entries[-1].cookie
    assert total == sum(len(names[index]) for index in range(40))
