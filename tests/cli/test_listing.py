"""`ls` with names and `ls --tree`; `pin`, `unpin`, `prefetch` and `evict` by path, many at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ipfsfuse.cli import folders
from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults import gateway
from tests.faults.gateway import Gateway
from tests.faults.test_harm import shards
from tests.mounting import Home, Mounted

pytestmark = pytest.mark.fuse

SIZE = 3 << 18


class Tree(NamedTuple):
    gateway: Gateway
    mount: Mounted
    root: str
    cid: dict[str, str]


@pytest.fixture
def tree(user: Home) -> Iterator[Tree]:
    """top: big, link -> big, small, sub: (deep, same as big)"""
    dag = Dag()
    big, deep = (dag.file([os.urandom(1 << 18) for _ in range(3)]) for _ in range(2))
    small = dag.block(b"small")
    sub = dag.directory({b"deep\xff\x1b": (deep, SIZE), b"same": (big, SIZE)})
    link = dag.symlink(b"big")
    entries = {b"big": (big, SIZE), b"link": (link, 10), b"small": (small, 5), b"sub": (sub, 2 * SIZE)}
    root = dag.directory(entries)
    named = {"big": big, "deep": deep, "small": small, "sub": sub, "link": link, "root": root}
    with gateway.mounted(user, dag) as (served, mount):
        yield Tree(served, mount, cids.text(root), {name: cids.text(cid) for name, cid in named.items()})


def listed(user: Home) -> dict[str, list[str]]:
    return {each["cid"]: each["paths"] for each in user.json("ls", "--json")["entries"]}


def test_ls_lists_staged_files_with_all_their_paths(user: Home, tree: Tree) -> None:
    top = tree.mount.path / tree.root
    (top / "big").read_bytes()
    assert listed(user) == {tree.cid["big"]: [f"/ipfs/{tree.root}/big"]}
    os.listdir(top / "sub")
    (top / "small").read_bytes()
    asked = sum(tree.gateway.asked.values())
    assert listed(user) == {tree.cid["big"]: [f"/ipfs/{tree.root}/big", f"/ipfs/{tree.root}/sub/same"]}
    [first, second, last] = user.run("ls").stdout.splitlines()
    assert first.endswith(f"/ipfs/{tree.root}/big")
    assert second == f"    also /ipfs/{tree.root}/sub/same"
    assert last.startswith("and ")
    assert sum(tree.gateway.asked.values()) == asked  # `ls` fetched nothing


def test_ls_tree_shows_small_files_and_directories_too(user: Home, tree: Tree) -> None:
    top = os.fsencode(tree.mount.path / tree.root)
    for name in (b"/big", b"/small", b"/sub/deep\xff\x1b"):
        with open(top + name, "rb") as file:
            file.read()
    os.readlink(top + b"/link")
    entries = user.json("ls", "--tree", "--json")["tree"]
    below = f"/ipfs/{tree.root}"
    assert {each["path"]: (each["kind"], each["size"], each["complete"]) for each in entries} == {
        below: ("directory", None, True),
        f"{below}/big": ("file", SIZE, True),
        f"{below}/link": ("symlink", len("big"), True),
        f"{below}/small": ("file", 5, True),
        f"{below}/sub": ("directory", None, True),
        f"{below}/sub/deep\udcff\x1b": ("file", SIZE, True),
        f"{below}/sub/same": ("file", SIZE, True),
    }
    shown = user.run("ls", "--tree").stdout.splitlines()
    assert shown[0].strip() == f"{below}/"
    assert [line[25:] for line in shown[1:-1]] == [
        "  big", "  link@", "  small", "  sub/", "    deep\\xff\\x1b", "    same",
    ]  # fmt: skip


def test_names_are_known_after_a_restart(user: Home, tree: Tree) -> None:
    (tree.mount.path / tree.root / "big").read_bytes()
    user.run("unmount", tree.mount.path)
    with user.mounted("--from", tree.gateway.url):
        assert listed(user) == {tree.cid["big"]: [f"/ipfs/{tree.root}/big"]}


def test_ls_knows_the_names_in_the_fetched_part_of_a_large_directory(user: Home) -> None:
    """A HAMT. A lookup has fetched two of its nodes."""
    dag = Dag()
    big = dag.file([os.urandom(1 << 18) for _ in range(2)])
    root = cids.text(shards(dag, big, [b"f%d" % number for number in range(600)]))
    with gateway.mounted(user, dag) as (served, mount):
        (mount.path / root / "f300").read_bytes()
        asked = sum(served.asked.values())
        [paths] = listed(user).values()
        assert f"/ipfs/{root}/f300" in paths
        assert 1 < len(paths) < 600
        assert len(set(paths)) == len(paths)
        assert sum(served.asked.values()) == asked


def test_pin_by_cid_and_path_by_a_path_in_the_mount_and_by_a_relative_path(user: Home, tree: Tree) -> None:
    top = tree.mount.path / tree.root
    (user.folder / "alias").symlink_to(top.parent)
    pinned = [
        each["pinned"]
        for each in user.json(
            "pin", f"{tree.root}/small", top / "big", user.folder / f"alias/{tree.root}/sub", "--json"
        )
    ]
    assert pinned == [tree.cid[name] for name in ("small", "big", "sub")]
    pins = user.json("pin", "ls", "--json")
    assert pins["pinned"] == pinned
    assert pins["paths"][tree.cid["sub"]] == [f"/ipfs/{tree.root}/sub"]
    assert f"{tree.cid['sub']}  /ipfs/{tree.root}/sub\n" in user.run("pin", "ls").stdout
    command = [sys.executable, "-m", "ipfsfuse", "unpin", "--json", "small"]
    env = {**user.env, "IPFSFUSE_CACHE_DIR": str(user.folder / "elsewhere")}
    done = subprocess.run(command, env=env, cwd=top, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"unpinned": tree.cid["small"]}
    user.refused_while_mounted("pin", tree.mount.path, names="is a mountpoint: name something in it", code=2)
    user.refused_while_mounted("pin", f"{tree.root}/none", names=f"/ipfs/{tree.root}/none: no such entry")
    user.refused_while_mounted("pin", f"{tree.root}/small/x", names="/small is not a directory")


def test_one_item_that_fails_does_not_stop_the_others(user: Home, tree: Tree) -> None:
    items = [f"{tree.root}/small", f"{tree.root}/none", tree.cid["big"]]
    done = user.run("prefetch", *items, "--json", check=False)
    first, failed, last = json.loads(done.stdout)
    assert done.returncode == 1
    assert (first["prefetched"], last["prefetched"]) == (tree.cid["small"], tree.cid["big"])
    assert (failed["item"], failed["kind"], failed["code"]) == (items[1], "NotFound", 1)
    assert done.stderr == f"ipfsfuse: {failed['error']}\n"
    assert [each["evicted"] for each in user.json("evict", *items[::2], "--json")] == [
        tree.cid["small"],
        tree.cid["big"],
    ]
    assert user.json("ls", "--json")["entries"] == []


def test_a_path_is_found_in_a_mount_without_a_call_to_the_mount(user: Home, tree: Tree) -> None:
    """The daemon is stopped, so a call to the mount would not return."""
    (user.folder / "loop").symlink_to("loop")
    os.kill(tree.mount.pid, signal.SIGSTOP)
    try:
        found: Any = folders.in_mount(str(tree.mount.path / tree.root / "a" / "b"))
        assert found == (tree.mount.path, f"{tree.root}/a/b")
        assert folders.in_mount(str(tree.mount.path)) == (tree.mount.path, "")
        assert folders.in_mount(str(user.folder)) is None
        assert folders.in_mount(str(user.folder / "loop" / "x")) is None
        assert folders.in_mount(str(Path("/nonexistent/x"))) is None
    finally:
        os.kill(tree.mount.pid, signal.SIGCONT)
