"""Whole blocks are found by the places of their contents. A place beyond the end of its file is not
accepted."""

from typing import Any, cast

from ipfsfuse.content import WholeBlocks
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag


def file_of(dag: Dag, children: list[tuple[Cid, int]]) -> Cid:
    sizes = [size for _child, size in children]
    message = UnixFS(type=Type.FILE, filesize=sum(sizes), blocksizes=sizes)
    return dag.node([Link(child, b"", size) for child, size in children], message)


def test_no_place_lies_beyond_the_end_of_its_file() -> None:
    """Otherwise its content would be written there. The node in the middle states a larger size than its
    parent states for it."""
    dag = Dag()
    leaf = dag.block(b"x" * 100)
    middle = file_of(dag, [(leaf, 1 << 40), (dag.block(b"y"), 1)])
    root = file_of(dag, [(dag.block(b"z"), 1), (middle, 5)])
    nothing = cast(Any, None)
    whole = WholeBlocks(nothing, nothing)
    for cid in (root, middle):
        node = nodes.parse(cid, dag.blocks[bytes(cid)[2:] if bytes(cid)[:1] == b"\x01" else bytes(cid)])
        assert isinstance(node, File)
        whole._note(node)
    assert len(whole._positions) == 4
    for file, place in whole._positions.values():
        assert place.offset + place.size <= file.size
