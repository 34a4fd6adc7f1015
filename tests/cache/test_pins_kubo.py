"""Pins at a real Kubo node: what they protect, what they leave alone, and what they cost."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from tests.cache.pinning import add, blocks, folder_of, has, held, made_up, mounts, pinning, settled
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")


@contextmanager
def collecting_garbage(node: Node) -> Iterator[threading.Event]:
    """A context manager in which the node collects garbage again and again. Sets the event after each
    time."""
    collected, end = threading.Event(), threading.Event()

    def loop() -> None:
        while not end.is_set():
            node.gc()
            collected.set()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield collected
    finally:
        end.set()
        thread.join()


def test_content_survives_garbage_collection_until_it_is_released(own_node: Node, tmp_path: Path) -> None:
    node = own_node
    kinds = {
        "raw leaf": add(node, b"raw leaf", "--cid-version=1"),
        "v0": add(node, b"version 0", "--cid-version=0"),
        "many leaves": add(node, os.urandom(3 << 20), "--cid-version=1", "--chunker=size-65536"),
        "blake3": add(node, b"another hash", "--cid-version=1", "--hash=blake3"),
    }
    other = add(node, b"nobody's")
    leaves = node.cmd("refs", "-r", cids.text(kinds["many leaves"])).split()

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            for cid in kinds.values():
                pins.add(cid)
                assert pins.state(cid) == "queued"
            await settled(pins)
            node.gc()
            assert {name for name, cid in kinds.items() if has(node, cid)} == set(kinds)
            assert all(node.has(leaf) for leaf in leaves)
            assert not has(node, other)
            assert {pins.state(cid) for cid in kinds.values()} == {"cache"}
            for cid in kinds.values():
                pins.remove(cid)
                assert pins.state(cid) == ""
            await settled(pins)
            assert folder_of(node, mounts(node)[0]) == {}
        node.gc()
        assert not any(has(node, cid) for cid in kinds.values())

    trio.run(main)


def test_all_of_a_sharded_directory_survives_garbage_collection(own_node: Node, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:050}").write_bytes(b"%d" % index)
    own_node.cmd("config", "--json", "Import.UnixFSHAMTDirectorySizeThreshold", '"1KiB"')
    own_node.restart()
    root = own_node.cmd("add", "-r", "-Q", "--pin=false", folder)
    below = own_node.cmd("refs", "-r", "-u", root).split()
    assert len(below) > 300

    async def main() -> None:
        async with pinning(own_node, tmp_path / "pins") as pins:
            pins.add(cids.parse(root))
            await settled(pins)
            own_node.gc()

    trio.run(main)
    assert blocks([root, *below]) <= blocks(own_node.cmd("refs", "local").split())


@pytest.mark.logs(r"pins wait until kubo takes them: kubo: cp: .*not found locally")
def test_content_can_be_read_while_garbage_is_collected_in_a_loop(own_node: Node, tmp_path: Path) -> None:
    node = own_node
    contents = {add(node, data, "--cid-version=1"): data for data in (os.urandom(2000) for _ in range(10))}

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            for cid in contents:
                pins.add(cid)
            await settled(pins)
            with collecting_garbage(node) as collected:
                for index, (cid, content) in enumerate(contents.items()):
                    # the block of the new batch may be collected several times before it is linked
                    pins.add(made_up(index))
                    await settled(pins)
                    collected.clear()
                    await trio.to_thread.run_sync(collected.wait, 60)
                    assert node.cmd("cat", "--offline", cids.text(cid), text=False) == content
            assert len(held(node, mounts(node)[0])) == 20

    trio.run(main)


def test_pins_of_the_user_are_never_changed(own_node: Node, tmp_path: Path) -> None:
    node = own_node
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(300_000))
    root = node.cmd("add", "-r", "-Q", "--pin=false", folder)
    direct, named = add(node, b"pinned directly"), add(node, b"pinned by name")
    file = cids.parse(node.cmd("resolve", f"/ipfs/{root}/file").removeprefix("/ipfs/"))
    node.cmd("pin", "add", root)
    node.cmd("pin", "add", "--recursive=false", cids.text(direct))
    node.cmd("pin", "add", "--name=mine", cids.text(named))
    before = node.rpc("pin/ls", names=True)
    below = [root, *node.cmd("refs", "-r", root).split()]

    async def main() -> None:
        async with pinning(node, tmp_path / "pins") as pins:
            for cid in (cids.parse(root), file, direct, named):
                pins.add(cid)
                pins.pin(cid)
            await settled(pins)
            assert node.rpc("pin/ls", names=True) == before
            for cid in (file, direct):
                pins.remove(cid)
                pins.unpin(cid)
            await settled(pins)
            assert node.rpc("pin/ls", names=True) == before
            await pins.release_all()

    trio.run(main)
    assert mounts(node) == []
    node.gc()
    assert node.rpc("pin/ls", names=True) == before
    assert all(node.has(cid) for cid in [*below, cids.text(direct), cids.text(named)])


def test_content_stays_at_the_node_while_any_mount_holds_it(own_node: Node, tmp_path: Path) -> None:
    node, shared = own_node, add(own_node, b"held by two")

    async def main() -> None:
        async with pinning(node, tmp_path / "a") as one, pinning(node, tmp_path / "b") as other:
            one.add(shared)
            other.add(shared)
            await settled(one)
            await settled(other)
            assert len(mounts(node)) == 2
            one.remove(shared)
            await settled(one)
            node.gc()
            assert has(node, shared)
            await other.release_all()
            node.gc()
            assert not has(node, shared)

    trio.run(main)
    assert len(mounts(node)) == 1


def test_holding_fetches_nothing(two_nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """Content that only another node has is held at once, and not fetched. Blocks of it that come later are
    protected."""
    node, other = two_nodes
    whole = add(other, os.urandom(1 << 20), "--chunker=size-65536")
    leaves = other.cmd("refs", cids.text(whole)).split()

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(whole)
            await settled(pins)
            assert not has(node, whole)
            for wanted in (cids.text(whole), leaves[0]):
                node.cmd("block", "get", wanted, text=False)
            node.gc()
            assert [node.has(cid) for cid in (cids.text(whole), *leaves)] == [True, True] + [False] * (
                len(leaves) - 1
            )
            other.stop()
            pins.add(cids.parse(leaves[-1]))  # no node has it any more
            await settled(pins)
            assert pins.state(cids.parse(leaves[-1])) == "cache"

    trio.run(main)


def test_ten_thousand_pins_cost_two_requests_for_each_thousand(
    own_node: Node, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async def main() -> None:
        async with pinning(own_node, tmp_path) as pins:
            await settled(pins)
            requests, start = pins.status().requests, trio.current_time()
            for index in range(10_000):
                pins.add(made_up(index))
            await settled(pins)
            record_property("milliseconds", round(1000 * (trio.current_time() - start)))
            assert pins.status().requests - requests == 20
            for index in range(10_000):
                pins.remove(made_up(index))
            await settled(pins)
            assert pins.status().requests - requests == 30

    trio.run(main)
    assert folder_of(own_node, mounts(own_node)[0]) == {}


def test_content_that_the_user_pinned_is_held_after_it_is_evicted(own_node: Node, tmp_path: Path) -> None:
    node, cid = own_node, add(own_node, b"for good")

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(cid)
            pins.pin(cid)
            await settled(pins)
            assert pins.state(cid) == "user"
            pins.remove(cid)
            await settled(pins)
            node.gc()
            assert has(node, cid)
        async with pinning(node, tmp_path, pinned=[cid]) as pins:
            await settled(pins)
            assert (pins.state(cid), pins.status().held) == ("user", 1)
            pins.unpin(cid)
            await settled(pins)
            node.gc()
            assert not has(node, cid)

    trio.run(main)
