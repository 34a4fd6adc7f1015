"""Files and directories that a real Kubo node writes, in every layout that it has, are read correctly."""

import os
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, traversal
from ipfsfuse.dag.nodes import Directory, File, Meta, Node, Shard, Symlink
from ipfsfuse.dag.path import IpfsPath
from tests.dag.blocks import Blocks, pseudo_random
from tests.dag.reading import names, pages, read
from tests.kubo.node import Node as Kubo

DATA = pseudo_random(3_000_017)
LAYOUTS = {
    "v0": ["--cid-version=0", "--raw-leaves=false"],
    "v0 with raw leaves": ["--cid-version=0", "--raw-leaves"],
    "v1": ["--cid-version=1"],
    "tiny chunks": ["--chunker=size-1000", "--raw-leaves=false"],
    "tiny raw chunks": ["--chunker=size-1000", "--raw-leaves"],
    "trickle": ["--trickle", "--chunker=size-1000", "--raw-leaves=false"],
    "trickle with raw leaves": ["--trickle", "--chunker=size-4096", "--raw-leaves"],
    "rabin": ["--chunker=rabin-1024-8192-65536"],
    "buzhash": ["--chunker=buzhash", "--raw-leaves=false"],
    "blake3": ["--hash=blake3"],
    "sha3": ["--hash=sha3-512", "--raw-leaves=false"],
    "two links a node": ["--max-file-links=2", "--chunker=size-65536", "--raw-leaves=false"],
}


def fetched(kubo: Kubo, root: str, folder: Path) -> Blocks:
    """All blocks below `root`, each verified."""
    car = folder / "export.car"
    car.write_bytes(kubo.cmd("dag", "export", "--progress=false", root, text=False))
    heap = Blocks()
    heap.load_car(car)
    return heap


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_in_every_layout(kubo_node: Kubo, tmp_path: Path, layout: str) -> None:
    root = kubo_node.add(DATA, *LAYOUTS[layout])
    heap = fetched(kubo_node, root, tmp_path)
    node = heap.drive(traversal.node(cids.parse(root)))
    assert isinstance(node, File)
    assert node.size == len(DATA)
    for offset, size in [(0, 1), (1_234_567, 200_000), (len(DATA) - 1, 10), (0, len(DATA))]:
        assert read(heap, node, offset, size) == DATA[offset : offset + size]


def test_a_file_of_one_block_that_kubo_appended_to(kubo_node: Kubo, tmp_path: Path) -> None:
    """Its root has inline bytes and children. Kubo itself returns only the appended bytes."""
    first, then = DATA[:20_000], DATA[20_000:400_000]
    (tmp_path / "then").write_bytes(then)
    kubo_node.cmd("files", "cp", f"/ipfs/{kubo_node.add(first, '--raw-leaves=false')}", "/appended")
    try:
        kubo_node.cmd("files", "write", f"--offset={len(first)}", "/appended", tmp_path / "then")
        root = kubo_node.cmd("files", "stat", "--hash", "/appended").strip()
    finally:
        kubo_node.cmd("files", "rm", "/appended")
    heap = fetched(kubo_node, root, tmp_path)
    node = heap.drive(traversal.node(cids.parse(root)))
    assert isinstance(node, File)
    assert node.inline == len(first)
    for offset, size in [(0, 400_000), (19_990, 20), (300_000, 9)]:
        assert read(heap, node, offset, size) == (first + then)[offset : offset + size]
    assert kubo_node.cmd("cat", root, text=False) == then


def test_a_tree_with_modes_times_links_and_inlined_files(kubo_node: Kubo, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "small").write_bytes(b"inlined")
    (tree / "empty").write_bytes(b"")
    (tree / "link").symlink_to("sub/small")
    (tree / "sub" / "small").chmod(0o750)
    os.utime(tree / "sub" / "small", ns=(0, 1_700_000_000_123_456_789))
    root = kubo_node.cmd("add", "-rQ", "--inline", "--preserve-mode", "--preserve-mtime", tree).strip()
    heap = fetched(kubo_node, root, tmp_path)

    def at(*parts: bytes) -> Node:
        return heap.drive(traversal.resolve(IpfsPath(cids.parse(root), parts)))

    top = at()
    assert isinstance(top, Directory)
    assert names(pages(heap, top)) == [b"empty", b"link", b"sub"]
    link, small, empty = at(b"link"), at(b"sub", b"small"), at(b"empty")
    assert isinstance(link, Symlink)
    assert link.target == b"sub/small"
    assert isinstance(small, File)
    assert isinstance(empty, File)
    assert small.meta == Meta(0o750, 1_700_000_000_123_456_789)
    assert read(heap, small, 0, 100) == b"inlined"
    assert read(heap, empty, 0, 100) == b""


@pytest.mark.parametrize("width", [8, 256, 1024])
def test_a_hamt_directory(kubo_node: Kubo, tmp_path: Path, width: int) -> None:
    wanted = sorted((f"datei-{number}-ü".encode() for number in range(2500)), key=hamt.hash64)
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in wanted:
        (tree / os.fsdecode(name)).touch()
    root = kubo_node.cmd(
        "add", "-rQ", f"--max-hamt-fanout={width}", "--max-directory-links=100", tree
    ).strip()
    heap = fetched(kubo_node, root, tmp_path)
    top = heap.drive(traversal.node(cids.parse(root)))
    assert isinstance(top, Shard)
    assert top.width == width
    assert names(pages(heap, top)) == wanted
    assert all(heap.drive(traversal.child(top, name)) is not None for name in wanted)
    assert heap.drive(traversal.child(top, b"datei-2500-\xc3\xbc")) is None
