"""Pins of killed processes: the next start makes the node hold what is staged, and what dead mounts left is
removed."""

import random
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pins.kubo_pins import KuboPins
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.cache.pins.mfs import Mfs
from ipfsfuse.cache.store.folder import lock_folder
from ipfsfuse.dag.cid import Cid
from tests.cache.pinning import (
    PATIENCE,
    NoCopies,
    child,
    folder_of,
    held,
    made_up,
    mounts,
    pinning,
    rpc_of,
    settled,
)
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")
MADE_UP = "made_up = lambda index: cids.make(cids.RAW, b'\\x12\\x20' + index.to_bytes(32, 'big'))"


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=PATIENCE)


def expect_line(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


def settle_once(node: Node, folder: Path, staged: Iterable[Cid] = (), pinned: Iterable[Cid] = ()) -> None:
    """Starts a mount, waits until its pins are settled, and ends it."""

    async def main() -> None:
        async with pinning(node, folder, staged, pinned) as pins:
            await settled(pins)

    trio.run(main)


def test_the_next_start_makes_the_changes_of_a_killed_mount_whose_node_was_down(
    own_node: Node, tmp_path: Path
) -> None:
    node = own_node
    settle_once(node, tmp_path, map(made_up, range(6)))
    node.stop()
    changes = [
        "pins.remove(made_up(0))",
        "pins.remove(made_up(1))",
        "pins.add(made_up(9))",
        "print('told', flush=True)",
    ]
    process = child(node, tmp_path, MADE_UP, *changes)
    try:
        expect_line(process, "told")
    finally:
        end(process)
    node.start()
    settle_once(node, tmp_path, map(made_up, (2, 3, 4, 5, 9)))
    (mount,) = mounts(node)
    links = held(node, mount)
    assert {made_up(index) for index in (2, 3, 4, 5, 9)} <= set(links)
    assert len(links) <= 7  # at most half of a batch may be unwanted


def test_after_a_kill_at_any_moment_the_next_start_holds_all_that_is_staged(
    own_node: Node, tmp_path: Path
) -> None:
    """It links at most twice as much.

    A kill between the write of a new batch and the removal of the one that it replaces leaves CIDs in both.
    The old one stays if half of it is staged."""
    chance = random.Random(7)
    body = [
        MADE_UP,
        "import random",
        "print('running', flush=True)",
        "while True:",
        "    index = random.randrange(400)",
    ]
    body += [
        "    (pins.add if random.random() < 0.6 else pins.remove)(made_up(index))",
        "    await trio.sleep(0.0005)",
    ]
    staged = {made_up(index) for index in range(0, 400, 3)}
    for _ in range(8):
        process = child(own_node, tmp_path, *body)
        try:
            expect_line(process, "running")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.random() * 0.4)
        finally:
            end(process)

        async def main() -> None:
            async with pinning(own_node, tmp_path, staged) as pins:
                await settled(pins)
                assert all(pins.state(cid) == "cache" for cid in staged)
                assert pins.status().held == len(staged)

        trio.run(main)
        (mount,) = mounts(own_node)
        links = held(own_node, mount)
        assert set(links) >= staged
        assert len(links) <= 2 * len(staged)


def test_a_restart_takes_over_the_batches_and_writes_none_anew(own_node: Node, tmp_path: Path) -> None:
    async def main() -> None:
        async with pinning(own_node, tmp_path) as pins:
            for index in range(1500):
                pins.add(made_up(index))
            await settled(pins)
        before = folder_of(own_node, mounts(own_node)[0])
        async with pinning(own_node, tmp_path, map(made_up, range(1500))) as pins:
            await settled(pins)
            assert pins.state(made_up(0)) == "cache"
            assert folder_of(own_node, mounts(own_node)[0]) == before

    trio.run(main)


def test_nothing_is_released_until_it_is_known_what_is_staged(own_node: Node, tmp_path: Path) -> None:
    """A cache with many files takes seconds to open."""
    settle_once(own_node, tmp_path, [made_up(1)])
    (mount,) = mounts(own_node)
    before = folder_of(own_node, mount)

    async def main() -> None:
        async with rpc_of(own_node) as rpc, trio.open_nursery() as nursery:
            pins = KuboPins("kubo", Mfs(lambda: rpc), MountId.open(tmp_path))
            nursery.start_soon(pins.run)
            await trio.sleep(0.5)
            assert folder_of(own_node, mount) == before
            pins.reconcile([made_up(1)], [], lambda _cid: False, NoCopies())
            await settled(pins)
            nursery.cancel_scope.cancel()

    with lock_folder(tmp_path):
        trio.run(main)
    assert folder_of(own_node, mount) == before


def kinds(batches: Mapping[str, str]) -> list[str]:
    """The kinds of the batches in a folder. Their numbers may differ: a round that failed, as on a busy
    machine, has used some."""
    return sorted(name.partition("-")[0] for name in batches)


def hold_and_die(node: Node, folder: Path) -> None:
    process = child(
        node,
        folder,
        MADE_UP,
        "pins.add(made_up(1))",
        "pins.pin(made_up(2))",
        "await settled(pins)",
        "print('held', flush=True)",
    )
    try:
        expect_line(process, "held")
    finally:
        end(process)


def test_the_pins_of_a_killed_mount_stay_while_its_cache_folder_exists(
    own_node: Node, tmp_path: Path
) -> None:
    hold_and_die(own_node, tmp_path / "dead")
    (dead,) = mounts(own_node)
    before = folder_of(own_node, dead)
    assert kinds(before) == ["pinned", "staged"]
    settle_once(own_node, tmp_path / "next")
    assert folder_of(own_node, dead) == before
    shutil.rmtree(tmp_path / "dead")
    settle_once(own_node, tmp_path / "next")
    assert dead not in mounts(own_node)


def test_the_next_start_of_a_killed_mount_holds_what_is_staged_then(own_node: Node, tmp_path: Path) -> None:
    hold_and_die(own_node, tmp_path / "dead")
    settle_once(own_node, tmp_path / "dead", [made_up(1), made_up(7)], [made_up(2)])
    (dead,) = mounts(own_node)
    assert sorted(held(own_node, dead)) == [made_up(1), made_up(7)]
    assert held(own_node, dead, "pinned-") == [made_up(2)]


def test_live_and_resting_mounts_and_foreign_folders_are_left_alone(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path / "resting") as pins:
            pins.add(made_up(1))
            await settled(pins)
        async with pinning(node, tmp_path / "living") as living:
            living.add(made_up(2))
            await settled(living)
            resting, alive = (
                (mounts(node)[0], mounts(node)[1]) if folder_of(node, mounts(node)[0]) else mounts(node)
            )
            host = resting.rpartition("-")[0]
            # they have no lease, so nothing is known of their mounts
            node.rpc("files/mkdir", arg=f"/ipfsfuse/{host}-0123456789abcdef", parents=True)
            node.rpc("files/mkdir", arg="/ipfsfuse/elsewhere-0123456789abcdef")
            before = {name: folder_of(node, name) for name in mounts(node)}
            async with pinning(node, tmp_path / "next") as pins:
                await settled(pins)
            after = {name: folder_of(node, name) for name in mounts(node)}
            assert {name: after[name] for name in before} == before
            assert {name for name, batches in before.items() if batches} == {resting, alive}

    trio.run(main)


def test_a_cache_folder_and_its_copy_get_different_names(own_node: Node, tmp_path: Path) -> None:
    process = child(
        own_node,
        tmp_path / "first",
        MADE_UP,
        "pins.add(made_up(1))",
        "await settled(pins)",
        "print('held', flush=True)",
    )
    try:
        expect_line(process, "held")
        shutil.copytree(tmp_path / "first", tmp_path / "copy")

        async def main() -> None:
            async with pinning(own_node, tmp_path / "copy", [made_up(1)]) as pins:
                await settled(pins)
                assert len(mounts(own_node)) == 2
                await pins.release_all()

        trio.run(main)
        (first,) = mounts(own_node)
        assert held(own_node, first) == [made_up(1)]
    finally:
        end(process)
