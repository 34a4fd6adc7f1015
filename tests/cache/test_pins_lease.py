"""Which mount a folder at a node belongs to: the name of its cache folder, its lease, and when its pins are
released."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from ipfsfuse.cache.pins import lease as leases
from ipfsfuse.cache.pins.kubo_pins import KuboPins
from ipfsfuse.cache.pins.lease import SILENT, Lease, MountId, host_name
from ipfsfuse.cache.pins.mfs import Mfs
from ipfsfuse.cache.store.folder import is_mount_id, lock_folder
from tests.cache.pinning import NoCopies, folder_of, held, made_up, mounts, pinning, rpc_of, settled, until
from tests.cache.test_pins_crash import hold_and_die, kinds, settle_once
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")

NAME = "some.host-0123456789abcdef"


def lease_of(node: Node, mount: str) -> dict[str, Any]:
    found = node.rpc("files/read", arg=f"/ipfsfuse/{mount}/lease")
    assert isinstance(found, dict)
    return found


def write_file(node: Node, path: str, data: bytes) -> None:
    node.cmd("files", "write", "--create", "--truncate", "--parents", path, stdin=data)


def write_lease(node: Node, mount: str, **changed: object) -> None:
    write_file(node, f"/ipfsfuse/{mount}/lease", json.dumps(lease_of(node, mount) | changed).encode())


# -- the name ------------------------------------------------------------------------------------------------


def test_a_cache_folder_keeps_its_name(tmp_path: Path) -> None:
    name = MountId.open(tmp_path).name
    assert is_mount_id(name)
    assert name.rpartition("-")[0] == host_name()
    assert MountId.open(tmp_path).name == name
    assert os.listdir(tmp_path) == ["mount-id"]


def garbage(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.logs("does not hold the name of a mount: it is replaced")
@pytest.mark.parametrize(
    "plant",
    [
        garbage(b"host\xff-0123456789abcdef\n"),
        garbage(b""),
        garbage(b"../../home-0123456789abcdef"),
        garbage(b"a/b-0123456789abcdef"),
        garbage(b"host-0123456789ABCDEF"),
        garbage(b"host-0123456789abcdef\n\n"),
        garbage(b"h" * 65 + b"-0123456789abcdef"),
        garbage(bytes(1 << 20)),
        os.mkfifo,
        lambda path: path.symlink_to(path.parent / "outside"),
        bind,
    ],
)
def test_an_invalid_name_is_replaced_and_nothing_else_is_changed(
    tmp_path: Path, plant: Callable[[Path], object]
) -> None:
    outside = tmp_path / "outside"
    outside.write_text(NAME)
    plant(tmp_path / "mount-id")
    name = MountId.open(tmp_path).name
    assert is_mount_id(name)
    assert name != NAME
    assert MountId.open(tmp_path).name == name
    assert outside.read_text() == NAME


@pytest.mark.logs("does not hold the name of a mount", "mount-id can't be written")
def test_a_mount_starts_even_if_its_name_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "mount-id").mkdir()
    assert is_mount_id(MountId.open(tmp_path).name)


def old_folder(folder: Path, node: int, content: bytes) -> Path:
    """The folder in which earlier versions kept the pins of one node."""
    old = folder / "pins" / f"{node:016x}"
    old.mkdir(parents=True)
    (old / "mount").write_bytes(content)
    for name in ("pins.sqlite", "pins.sqlite-wal", "pins.sqlite-shm"):
        (old / name).write_bytes(b"rows")
    return old


@pytest.mark.logs("does not hold the name of a mount: it is not used")
def test_the_name_of_an_earlier_version_is_taken_over(tmp_path: Path) -> None:
    old_folder(tmp_path, 1, b"bad\xff-0123456789abcdef\n")
    old_folder(tmp_path, 2, NAME.encode() + b"\n")
    old_folder(tmp_path, 3, b"another-0123456789abcdef\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mount").write_text("mine")
    (tmp_path / "pins" / "4444444444444444").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "pins" / "0000000000000003" / "mine").write_text("mine")
    assert MountId.open(tmp_path).name == NAME
    assert MountId.open(tmp_path).name == NAME
    assert sorted(path.name for path in (tmp_path / "pins").rglob("*")) == [
        "0000000000000003",
        "4444444444444444",
        "mine",
    ]
    assert (tmp_path / "elsewhere" / "mount").read_text() == "mine"


def test_the_folder_of_an_earlier_version_at_the_node_is_taken_over(own_node: Node, tmp_path: Path) -> None:
    settle_once(own_node, tmp_path / "cache", [made_up(1), made_up(2)])
    (mount,) = mounts(own_node)
    before = folder_of(own_node, mount)
    (tmp_path / "cache" / "mount-id").unlink()
    old = old_folder(tmp_path / "cache", 1, mount.encode() + b"\n")
    now = Lease.of(tmp_path / "cache")
    owner = {
        "machine": leases._read("/etc/machine-id") or socket.gethostname(),
        "boot": now.boot,
        "processes": "pid:[1]",
    }
    owner |= {"pid": 1, "started": 1, "folder": str(old), "stopped": False, "signed": int(time.time())}
    own_node.rpc("files/rm", arg=f"/ipfsfuse/{mount}/lease")
    write_file(own_node, f"/ipfsfuse/{mount}/owner", json.dumps(owner).encode())
    settle_once(own_node, tmp_path / "cache", [made_up(1), made_up(2)])
    assert mounts(own_node) == [mount]
    assert folder_of(own_node, mount) == before
    assert lease_of(own_node, mount)["folder"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache" / "pins").exists()


def test_a_folder_that_an_earlier_version_left_at_the_node_is_removed_after_a_day(
    own_node: Node, tmp_path: Path
) -> None:
    machine = leases._read("/etc/machine-id") or socket.gethostname()
    owner = {"machine": machine, "boot": "x", "processes": "y", "pid": 1, "started": 1, "stopped": True}
    owner |= {"folder": str(tmp_path / "gone" / "pins" / "0123456789abcdef"), "signed": int(time.time())}
    old = f"/ipfsfuse/{host_name()}-0123456789abcdef"
    write_file(own_node, f"{old}/owner", json.dumps(owner).encode())
    settle_once(own_node, tmp_path / "next")
    assert len(mounts(own_node)) == 2
    write_file(
        own_node, f"{old}/owner", json.dumps(owner | {"signed": int(time.time() - SILENT - 60)}).encode()
    )
    settle_once(own_node, tmp_path / "next")
    assert len(mounts(own_node)) == 1


# -- the lease -----------------------------------------------------------------------------------------------


def test_a_living_mount_renews_its_lease_again_and_again(
    own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW", 0.05)
    seen = set[int]()

    def renewed_twice() -> bool:
        (mount,) = mounts(own_node)
        seen.add(lease_of(own_node, mount)["renewed"])  # there is always a lease
        return len(seen) > 1

    async def main() -> None:
        async with pinning(own_node, tmp_path) as pins:
            await settled(pins)
            await trio.to_thread.run_sync(
                until, renewed_twice, "the lease is renewed although nothing else changes"
            )

    trio.run(main)
    assert lease_of(own_node, mounts(own_node)[0])["resting"] is True


def test_a_lease_shows_whether_its_folder_may_be_claimed_and_whether_it_is_stale(tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    for folder in (cache, other):
        folder.mkdir()
    (other / "mount-id").write_text(NAME)
    mine, others = Lease.of(cache), Lease.of(other)
    fresh, old = int(time.time()), int(time.time() - SILENT - 60)

    def claimable(**changed: Any) -> bool:
        return replace(others, **changed).may_be_claimed(mine, NAME)

    assert mine.may_be_claimed(mine, NAME)
    assert claimable(inode=mine.inode, namespace="another"), (
        "the same cache folder, seen from another namespace"
    )
    assert not claimable(), "the original of a copied folder"
    assert not claimable(resting=True), "it rests, but it may start again"
    assert claimable(folder=str(tmp_path / "moved away")), "no other cache folder has the name"
    assert not claimable(namespace="another"), "it may be alive in a namespace that we can't see"
    assert claimable(namespace="another", resting=True)
    assert claimable(namespace="another", renewed=old)
    assert not claimable(boot="another", renewed=fresh, folder=mine.folder), (
        "a copy of this machine may be alive"
    )
    assert claimable(boot="another", renewed=old)
    assert not claimable(machine="another")

    def stale(**changed: Any) -> bool:
        return replace(others, **changed).is_stale(mine, NAME)

    gone = str(tmp_path / "gone")
    assert not stale()
    assert not stale(renewed=old), "its cache folder exists"
    assert stale(folder=gone)
    assert stale(folder=mine.folder), "its cache folder is ours, which has another name"
    assert not stale(folder=gone, machine="another", renewed=old)
    for elsewhere in ({"boot": "another"}, {"namespace": "another"}, {"namespace": ""}):
        assert not stale(folder=gone, **elsewhere)
        assert stale(folder=gone, renewed=old, **elsewhere)
        assert not stale(renewed=old, **elsewhere)
    (other / "mount-id").write_text("some.host-fedcba9876543210")
    assert stale()
    with lock_folder(other):
        assert not stale(), "the mount is alive, but could not write its name"


def test_a_file_that_is_not_a_valid_lease_is_ignored(tmp_path: Path) -> None:
    right = Lease.of(tmp_path)
    assert Lease.parse(right.encode()) == right
    assert (
        Lease.parse(json.dumps(json.loads(right.encode()) | {"version": 2, "more": []}).encode()) is not None
    )
    for data in (None, b"", b"{}", b"[1]", b"\xff", b'"text"', b"[" * 60_000):
        assert Lease.parse(data) is None
    odd: list[dict[str, object]] = [
        {"version": "1"},
        {"version": True},
        {"version": -1},
        {"machine": None},
        {"renewed": 1.5},
        {"renewed": -1},
        {"renewed": 10**400},
    ]
    odd += [
        {"folder": "relative"},
        {"folder": "/nul\0"},
        {"folder": "/" + "a" * 5000},
        {"folder": "/\ud800"},
        {"resting": 1},
    ]
    assert [Lease.parse(json.dumps(json.loads(right.encode()) | changed).encode()) for changed in odd] == [
        None
    ] * len(odd)


def test_after_a_machine_crash_a_mount_takes_a_new_name_and_its_old_folder_expires(
    own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_and_die(own_node, tmp_path / "mount")
    (old,) = mounts(own_node)
    boot = tmp_path / "boot_id"
    boot.write_text("another boot")
    monkeypatch.setattr(leases, "BOOT", str(boot))
    settle_once(own_node, tmp_path / "mount", [made_up(1)], [made_up(2)])
    assert kinds(folder_of(own_node, old)) == ["pinned", "staged"], "its owner may be alive elsewhere"
    (new,) = set(mounts(own_node)) - {old}
    assert kinds(folder_of(own_node, new)) == ["pinned", "staged"]
    monkeypatch.setattr(leases, "SILENT", -1.0)
    settle_once(own_node, tmp_path / "next")
    assert old not in mounts(own_node)
    assert new in mounts(own_node)


def test_a_mount_that_stopped_keeps_its_folder_after_a_reboot(
    own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_once(own_node, tmp_path / "mount", [made_up(1)])
    before = [(mount, folder_of(own_node, mount)) for mount in mounts(own_node)]
    (tmp_path / "boot_id").write_text("another boot")
    monkeypatch.setattr(leases, "BOOT", str(tmp_path / "boot_id"))
    settle_once(own_node, tmp_path / "mount", [made_up(1)])
    assert [(mount, folder_of(own_node, mount)) for mount in mounts(own_node)] == before


def test_a_moved_folder_keeps_its_name_and_a_copy_of_a_resting_one_does_not(
    own_node: Node, tmp_path: Path
) -> None:
    settle_once(own_node, tmp_path / "first", [made_up(1)])
    (first,) = mounts(own_node)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    settle_once(own_node, tmp_path / "copy", [made_up(1)])
    assert len(mounts(own_node)) == 2
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(tmp_path / "copy", tmp_path / "moved")
    shutil.rmtree(tmp_path / "copy")
    settle_once(own_node, tmp_path / "moved", [made_up(1)])
    (moved,) = mounts(own_node)
    assert moved != first
    assert held(own_node, moved) == [made_up(1)]


def test_a_mount_takes_a_new_name_if_another_mount_took_its_folder(
    own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This happens if two copies of a machine start at the same moment."""
    monkeypatch.setattr(leases, "RENEW", 0.2)

    async def main() -> None:
        async with pinning(own_node, tmp_path, [made_up(1)]) as pins:
            await settled(pins)
            (mount,) = mounts(own_node)

            def two_folders() -> bool:
                if len(mounts(own_node)) == 1:  # between two renewals of our lease
                    write_lease(own_node, mount, boot="another boot")
                return len(mounts(own_node)) == 2

            await trio.to_thread.run_sync(until, two_folders, "the mount has a new name")
            theirs = lease_of(own_node, mount), folder_of(own_node, mount)
            assert theirs[0]["boot"] == "another boot"
            pins.add(made_up(2))
            await settled(pins)
            assert (lease_of(own_node, mount), folder_of(own_node, mount)) == theirs
            (new,) = set(mounts(own_node)) - {mount}
            assert sorted(held(own_node, new)) == [made_up(1), made_up(2)]
            assert pins.status().folder == f"/ipfsfuse/{new}"
            assert (tmp_path / "mount-id").read_text() == f"{new}\n"

    trio.run(main)


def test_a_mount_has_one_name_at_all_its_nodes(two_nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """If another mount uses its name at one node, it takes a new name at all nodes, and leaves nothing
    behind."""
    near, far = two_nodes
    for node in two_nodes:
        settle_once(node, tmp_path, [made_up(1)])
    (mount,) = mounts(near)
    assert mounts(far) == [mount]
    write_lease(far, mount, boot="another boot", resting=False)

    async def main() -> None:
        mount_id = MountId.open(tmp_path)
        async with rpc_of(near) as one, rpc_of(far) as other:
            pins = [
                KuboPins("near", Mfs(lambda: one), mount_id),
                KuboPins("far", Mfs(lambda: other), mount_id),
            ]
            async with trio.open_nursery() as nursery:
                for node_pins in pins:
                    node_pins.reconcile([made_up(1)], [], lambda _cid: False, NoCopies())
                    nursery.start_soon(node_pins.run)
                    await settled(node_pins)  # the first has its folder before the second finds out
                pins[0].add(made_up(2))
                await settled(pins[0])
                nursery.cancel_scope.cancel()

    with lock_folder(tmp_path):
        trio.run(main)
    (new,) = set(mounts(far)) - {mount}
    assert mounts(near) == [new]
    assert sorted(held(near, new)) == [made_up(1), made_up(2)]
    assert held(far, new) == held(far, mount) == [made_up(1)]
