"""Pins where the node restarts, is away, hangs, or has lost what it was told."""

from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from tests.cache.pinning import add, has, held, made_up, mounts, pinning, settled, until
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")


@pytest.mark.parametrize("crash", [False, True])
def test_the_node_restarted_in_between(own_node: Node, tmp_path: Path, crash: bool) -> None:
    node = own_node
    first, second = add(node, b"before"), add(node, b"after")

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(first)
            await settled(pins)
            await trio.to_thread.run_sync(node.kill if crash else node.stop)
            await trio.to_thread.run_sync(node.start)
            node.gc()
            assert has(node, first)
            pins.add(second)
            pins.remove(first)
            await settled(pins)
            assert held(node, mounts(node)[0]) == [cids.canonical(second)]

    trio.run(main)


@pytest.mark.logs("pins wait until the node takes them")
def test_a_node_that_is_down_at_the_start_gets_them_later(own_node: Node, tmp_path: Path) -> None:
    node, cid = own_node, add(own_node, b"patience")
    node.stop()

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(cid)
            await trio.to_thread.run_sync(until, lambda: pins.status().failing != "", "the node's absence is seen")
            assert pins.state(cid) == "queued"
            await trio.to_thread.run_sync(node.start)
            await settled(pins)
            assert (pins.state(cid), pins.status().failing) == ("cache", "")

    trio.run(main)


def test_a_node_that_hangs_delays_nobody(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            await settled(pins)
            node.pause()
            for index in range(5000):
                pins.add(made_up(index))
                pins.remove(made_up(index - 1))
            for _ in range(100):
                await trio.sleep(0.01)  # this loop goes on, while a request to the node hangs
            assert pins.state(made_up(4999)) == "queued"
            node.resume()
            await settled(pins)
            assert held(node, mounts(node)[0]) == [made_up(4999)]

    trio.run(main)


@pytest.mark.logs("pins wait until the node takes them")
def test_a_folder_that_someone_removed_is_made_again(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(made_up(1))
            pins.keep(made_up(2))
            await settled(pins)
            node.rpc("files/rm", arg="/ipfsfuse", recursive=True)
            pins.add(made_up(3))
            await settled(pins)
            (mount,) = mounts(node)
            assert sorted(held(node, mount)) == [made_up(1), made_up(3)]
            assert held(node, mount, "pinned-") == [made_up(2)]

    trio.run(main)
