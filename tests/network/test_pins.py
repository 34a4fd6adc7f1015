"""Pins that real mounts hold at a real node."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ipfsfuse.cache.pins.lease import host_name
from tests.cache.pinning import folder_of, mounts
from tests.kubo.node import Node
from tests.mounting import Home, Mounted, wait_until
from tests.network.nodes import again_and_again, drop_pages, mounted, source


def wait_until_held(mount: Mounted, node: Node, files: int) -> None:
    """Waits until the node holds all that is staged, which is at least `files` files."""

    def settled() -> bool:
        pins = mount.home.json("status", "--json", "--cache-dir", mount.control.parent.parent)["pins"][
            source(node)
        ]
        return bool(pins["queued"] == 0 and pins["held"] >= files and not pins["failing"])

    wait_until(settled, "the node holds all staged files")


def add(node: Node, seed: int, size: int = 300_000, *options: str) -> tuple[str, bytes]:
    """Adds a file that nothing pins at the node. Returns its CID and its content."""
    content = random.Random(seed).randbytes(size)
    return node.add(content, "--pin=false", "--cid-version=1", *options), content


def test_files_are_read_while_the_node_collects_garbage_in_a_loop(
    two_nodes: tuple[Node, Node], home: Home
) -> None:
    near, far = two_nodes
    contents = {
        far.add(data, "--cid-version=1"): data
        for data in (random.Random(n).randbytes(100_000 + 70_000 * n) for n in range(20))
    }
    with mounted(home, near) as mount, again_and_again(near.gc) as collected:
        for cid, content in contents.items():
            collected.clear()
            assert (mount.path / cid).read_bytes() == content
            assert collected.wait(60)
        home.run("evict", "--all")
        for cid, content in contents.items():
            drop_pages(mount.path / cid)
            assert (mount.path / cid).read_bytes() == content


def test_staged_files_stay_at_the_node(two_nodes: tuple[Node, Node], home: Home) -> None:
    near, far = two_nodes
    contents = {
        far.add(data, "--cid-version=1"): data
        for data in (random.Random(n).randbytes(100_000 + 300_000 * n) for n in range(6))
    }
    with mounted(home, near) as mount:
        for cid, content in contents.items():
            assert (mount.path / cid).read_bytes() == content
        wait_until_held(mount, near, len(contents))
        near.gc()
        below = [cid for root in contents for cid in (root, *far.cmd("refs", "-r", "-u", root).split())]
        assert [cid for cid in below if not near.has(cid)] == []


@pytest.mark.parametrize("evicted", ["the file", "all"])
def test_leaves_that_are_read_again_stay_at_a_node_that_had_lost_them(
    two_nodes: tuple[Node, Node], home: Home, evicted: str
) -> None:
    """The mount still has the blocks above the leaves, in packs or in memory. So it asks the node only for
    leaves."""
    near, far = two_nodes
    size = 65_536
    content = random.Random(3).randbytes(200 * size)
    root = far.add(content, "--cid-version=1", f"--chunker=size-{size}")
    inner = far.cmd("refs", root).split()
    leaves = [leaf for node in inner for leaf in far.cmd("refs", node).split()]
    assert len(leaves) == 200, "there are nodes between the root and the leaves"
    with mounted(home, near) as mount:

        def read_some() -> None:
            drop_pages(mount.path / root)
            with (mount.path / root).open("rb", buffering=0) as file:
                for number in (150, 20, 90):
                    assert (
                        os.pread(file.fileno(), size, number * size)
                        == content[number * size : (number + 1) * size]
                    )
            wait_until_held(mount, near, 1)

        read_some()
        home.run("evict", *(["--all"] if evicted == "all" else [root]))
        wait_until(lambda: near.gc() or not near.has(root), "the node has collected the file")
        read_some()
        near.gc()
        assert [number for number in (150, 20, 90) if not near.has(leaves[number])] == []
        assert near.has(root)


def test_pins_of_the_user_are_never_changed(own_node: Node, home: Home) -> None:
    node = own_node
    tree = home.folder / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(random.Random(1).randbytes(300_000))
    root = node.cmd("add", "-r", "-Q", "--cid-version=1", tree)
    direct, _ = add(node, 2)
    named, _ = add(node, 3)
    node.cmd("pin", "add", "--recursive=false", direct)
    node.cmd("pin", "add", "--name=mine", named)
    before = node.rpc("pin/ls", names=True)

    def untouched() -> None:
        node.gc()
        assert node.rpc("pin/ls", names=True) == before
        assert all(node.has(cid) for cid in (root, *node.cmd("refs", "-r", root).split(), direct, named))

    with mounted(home, node) as mount:
        for path in (f"{root}/file", direct, named):
            (mount.path / path).read_bytes()
        wait_until_held(mount, node, 3)
        untouched()
        home.run("pin", root)
        home.run("unpin", root)
        home.run("evict", "--all")
        untouched()
        drop_pages(mount.path / named)
        (mount.path / named).read_bytes()
        wait_until_held(mount, node, 1)
    untouched()
    (left,) = mounts(node)
    shutil.rmtree(home.cache)
    with mounted(Home(home.folder / "next"), node) as mount:
        wait_until_held(mount, node, 0)
        wait_until(
            lambda: left not in mounts(node),
            "the folder at the node of a mount without a cache folder is removed",
        )
    untouched()


def test_content_stays_at_the_node_while_any_mount_holds_it(own_node: Node, tmp_path: Path) -> None:
    cid, content = add(own_node, 1)
    one, other = Home(tmp_path / "one"), Home(tmp_path / "other")
    with mounted(one, own_node) as first, mounted(other, own_node) as second:
        for mount in (first, second):
            assert (mount.path / cid).read_bytes() == content
            wait_until_held(mount, own_node, 1)
        one.run("evict", "--all")
        wait_until_held(first, own_node, 0)
        own_node.gc()
        assert own_node.has(cid)
        other.run("evict", "--all")

        def collected() -> bool:
            own_node.gc()
            return not own_node.has(cid)

        wait_until(collected, "no mount holds the content any more")


def test_pins_none_leaves_nothing_at_the_node(own_node: Node, home: Home) -> None:
    cid, content = add(own_node, 1)
    with mounted(home, own_node, options=["--pins", "none"]) as mount:
        assert (mount.path / cid).read_bytes() == content
        assert mount.status()["pins"] == {}
        assert os.getxattr(mount.path / cid, "ipfsfuse.pinned") == b"no"
        own_node.gc()
        assert not own_node.has(cid)
    with pytest.raises(RuntimeError, match="does not exist"):
        mounts(own_node)


def test_a_pinned_tree_survives_evictions_garbage_collection_and_restarts(own_node: Node, home: Home) -> None:
    node = own_node
    tree = home.folder / "tree"
    (tree / "folder").mkdir(parents=True)
    for number in range(5):
        (tree / "folder" / str(number)).write_bytes(random.Random(number).randbytes(400_000))
    root = node.cmd("add", "-r", "-Q", "--cid-version=1", "--pin=false", tree)
    below = [root, *node.cmd("refs", "-r", "-u", root).split()]
    with mounted(home, node) as mount:
        home.run("pin", root)
        home.run("evict", "--all")
        wait_until_held(mount, node, 1)
    with mounted(home, node) as mount:
        wait_until_held(mount, node, 1)
        node.gc()
        assert [cid for cid in below if not node.has(cid)] == []
        assert os.getxattr(mount.path / root / "folder" / "3", "ipfsfuse.pinned") != b"no"
        status = mount.status()
        assert status["cache"]["pinned"] > 5 * 400_000
        assert [name["name"] for name in status["sources"]] == [source(node)]
        home.run("unpin", root)
        home.run("evict", "--all")

        def collected() -> bool:
            node.gc()
            return not any(node.has(cid) for cid in below)

        wait_until(collected, "no mount holds the content any more")


def test_an_isolated_mount_releases_everything_at_its_end(own_node: Node, home: Home) -> None:
    cid, content = add(own_node, 1)
    with mounted(home, own_node, options=["--isolated"]) as mount:
        assert (mount.path / cid).read_bytes() == content
        wait_until_held(mount, own_node, 1)
        own_node.gc()
        assert own_node.has(cid)
    assert mounts(own_node) == []
    own_node.gc()
    assert not own_node.has(cid)


def kill(mount: Mounted) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    mount.home.unmount(mount)


def test_content_of_a_killed_mount_stays_held_and_its_next_start_uses_the_same_folder(
    own_node: Node, home: Home
) -> None:
    node = own_node
    contents = dict(add(node, seed, size) for seed, size in enumerate((2_000, 300_000, 400_000)))
    with mounted(home, node) as mount:
        for cid in contents:
            (mount.path / cid).read_bytes()
        wait_until_held(mount, node, 3)
        kill(mount)
    (folder,) = mounts(node)
    before = folder_of(node, folder)
    with mounted(Home(home.folder / "another"), node) as mount:
        wait_until_held(mount, node, 0)
    assert folder_of(node, folder) == before
    with mounted(home, node) as mount:
        wait_until_held(mount, node, 3)  # also the small file, which is in a pack
        assert mount.status()["pins"][source(node)]["folder"] == f"/ipfsfuse/{folder}"
        assert folder_of(node, folder) == before
        node.gc()
        assert all(node.has(cid) for cid in contents)
    assert sorted(
        path.name for path in home.cache.rglob("*") if "pin" in path.name or "mount" in path.name
    ) == ["mount-id", "pinned"]


def test_the_next_isolated_mount_releases_what_a_killed_isolated_mount_held(
    own_node: Node, home: Home
) -> None:
    node = own_node
    home.env["TMPDIR"] = str(home.folder)
    cid, _content = add(node, 1)
    with mounted(home, node, options=["--isolated"]) as mount:
        (mount.path / cid).read_bytes()
        wait_until_held(mount, node, 1)
        kill(mount)
    (left,) = mounts(node)
    with mounted(home, node, options=["--isolated"]) as mount:
        wait_until_held(mount, node, 0)
        wait_until(lambda: left not in mounts(node), "what the killed mount held is released")
    assert mounts(node) == []
    node.gc()
    assert not node.has(cid)


def test_mounts_of_a_cache_folder_and_its_copy_have_different_folders_at_the_node(
    own_node: Node, home: Home
) -> None:
    cid, content = add(own_node, 1)
    copy = Home(home.folder / "copy")
    with mounted(home, own_node) as first:
        assert (first.path / cid).read_bytes() == content
        wait_until_held(first, own_node, 1)
        subprocess.run(["cp", "-a", home.cache, copy.cache], check=True)
        with mounted(copy, own_node) as second:
            wait_until_held(second, own_node, 1)
            assert len(mounts(own_node)) == 2
            assert first.status()["pins"] != second.status()["pins"]
            copy.run("evict", "--all")
            wait_until_held(second, own_node, 0)
            own_node.gc()
            assert own_node.has(cid)


def test_garbage_in_mount_id_does_not_stop_a_mount(own_node: Node, home: Home) -> None:
    cid, content = add(own_node, 1)
    with mounted(home, own_node) as mount:
        wait_until_held(mount, own_node, 0)
    (path,) = home.cache.rglob("mount-id")
    path.write_bytes(b"../../\xff")
    with mounted(home, own_node) as mount:
        assert (mount.path / cid).read_bytes() == content
        wait_until_held(mount, own_node, 1)
        assert "does not hold the name of a mount: it is replaced" in mount.log()
    assert [name.rpartition("-")[0] for name in mounts(own_node)] == [host_name()] * len(mounts(own_node))
