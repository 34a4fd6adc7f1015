"""Our mount shows the content of a real node, and it shows the same as Kubo's own mount of that node."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Shard, parse
from tests.kubo.fixtures import need_kubo
from tests.kubo.node import Node
from tests.mounting import Home, Mounted
from tests.network.nodes import dated, kubos_own_mount, mounted, same, write_tree

WAYS = {
    "unixfs-v1-2025": ("--cid-version=1", "--raw-leaves", "--chunker=size-1048576", "--max-file-links=1024"),
    "unixfs-v0-2015": (
        "--cid-version=0",
        "--raw-leaves=false",
        "--chunker=size-262144",
        "--max-file-links=174",
    ),
    "modes and times": ("--cid-version=1", "--raw-leaves=false", "--preserve-mode", "--preserve-mtime"),
    "modes and times, v0": ("--cid-version=0", "--preserve-mode", "--preserve-mtime"),
}
HAMT_AT = {"Import": {"UnixFSHAMTDirectorySizeThreshold": "16KiB"}}


class Shown:
    """One tree: in our mount, in Kubo's mount, and on the disk."""

    def __init__(self, node: Node, mount: Mounted, kubos: Path, tree: Path, roots: dict[str, str]) -> None:
        self.node = node
        self.mount = mount
        self.kubos = kubos
        self.tree = tree
        self.roots = roots


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    need_kubo()
    folder = tmp_path_factory.mktemp("side-by-side")
    tree = dated(write_tree(folder))
    with Node(settings=HAMT_AT) as node:
        roots = {name: node.cmd("add", "-r", "-Q", *options, tree) for name, options in WAYS.items()}
        with kubos_own_mount(node) as kubos, mounted(Home(folder), node) as mount:
            yield Shown(node, mount, kubos, tree, roots)


def listing(folder: Path) -> list[str]:
    """`ls -lR` without two columns in which Kubo differs: it shows link counts as 0, and its totals count
    folders as 512 bytes."""
    command = ["ls", "-lR", "--time-style=+%s.%N"]
    lines = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [re.sub(r"^(\S{10}) +\d+ ", r"\1 ", line) for line in lines if not line.startswith("total ")]


def everything(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("way", WAYS)
def test_trees_that_kubo_added_are_shown(shown: Shown, way: str) -> None:
    same(shown.tree, shown.mount.path / shown.roots[way])


@pytest.mark.parametrize("way", WAYS)
def test_the_large_folder_is_a_hamt(shown: Shown, way: str) -> None:
    """If it were not, these tests would not cover HAMTs."""
    cid = cid_of(shown.mount.path / shown.roots[way] / "many")
    assert isinstance(parse(cids.parse(cid), shown.node.cmd("block", "get", cid, text=False)), Shard)


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("modes")])
def test_modes_and_times_are_those_that_were_added(shown: Shown, way: str) -> None:
    for path in everything(shown.tree):
        ours, source = (shown.mount.path / shown.roots[way] / path).lstat(), (shown.tree / path).lstat()
        assert (oct(ours.st_mode), ours.st_mtime_ns, path) == (oct(source.st_mode), source.st_mtime_ns, path)


@pytest.mark.parametrize("way", WAYS)
def test_ls_is_the_same_as_in_kubos_own_mount(shown: Shown, way: str) -> None:
    same(shown.kubos / shown.roots[way], shown.mount.path / shown.roots[way])
    ours, kubos = listing(shown.mount.path / shown.roots[way]), listing(shown.kubos / shown.roots[way])
    assert ours == kubos
    assert len(ours) > 250


@pytest.mark.parametrize("way", WAYS)
def test_stat_and_xattr_are_the_same_as_in_kubos_own_mount(shown: Shown, way: str, home: Home) -> None:
    """In a new mount, because an inode keeps the spelling of its CID that was looked up first."""
    with mounted(home, shown.node) as mount:
        ours, kubos = mount.path / shown.roots[way], shown.kubos / shown.roots[way]
        assert everything(ours) == everything(kubos)
        for path in everything(kubos):
            mine, theirs = (ours / path).lstat(), (kubos / path).lstat()
            for field in ("st_size", "st_blksize", "st_uid", "st_gid"):
                assert getattr(mine, field) == getattr(theirs, field), path
            assert (ours / path).is_dir() or mine.st_blocks == theirs.st_blocks, path
            assert cid_of(ours / path) == cid_of(kubos / path), path
        assert cid_of(ours) == shown.roots[way]
        assert cids.multihash(cids.parse(cid_of(kubos))) == cids.multihash(cids.parse(shown.roots[way])), (
            "Kubo shows the CID as version 0"
        )


def cid_of(path: Path) -> str:
    return os.getxattr(path, "ipfs.cid", follow_symlinks=False).decode()
