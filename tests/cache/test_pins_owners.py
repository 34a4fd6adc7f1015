"""Whose pins at a node are whose, and when their owner counts as dead."""

import contextlib
import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pins import holding, owners
from ipfsfuse.cache.pins.owners import SILENT, Owner
from tests.cache.pinning import folder_of, mounts, pinning, settled, until
from tests.cache.test_pins_crash import hold_and_die, settle_once
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")


def test_a_living_mount_signs_again_and_again(own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (owners, holding):
        monkeypatch.setattr(module, "RENEW", 0.05)

    seen = set[int]()

    def signed_twice() -> bool:
        (mount,) = mounts(own_node)
        with contextlib.suppress(RuntimeError):  # between two signatures there is none
            owner = Owner.parse(json.dumps(own_node.rpc("files/read", arg=f"/ipfsfuse/{mount}/owner")).encode())
            assert owner is not None
            seen.add(owner.signed)
        return len(seen) > 1

    async def main() -> None:
        async with pinning(own_node, tmp_path) as pins:
            await settled(pins)
            await trio.to_thread.run_sync(until, signed_twice, "it signs though it has nothing else to say")

    trio.run(main)


def test_a_folder_of_an_earlier_boot_is_left_until_it_was_silent_for_long(own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_and_die(own_node, tmp_path / "mount")
    (old,) = mounts(own_node)
    boot = tmp_path / "boot_id"
    boot.write_text("another boot")
    monkeypatch.setattr(owners, "BOOT", str(boot))
    settle_once(own_node, tmp_path / "mount")
    assert set(folder_of(own_node, old)) == {"staged-1", "pinned-1"}, "its owner may be alive elsewhere"
    (new,) = set(mounts(own_node)) - {old}
    assert [name.partition("-")[0] for name in sorted(folder_of(own_node, new))] == ["pinned", "staged"]
    monkeypatch.setattr(owners, "SILENT", -1.0)
    settle_once(own_node, tmp_path / "next")
    assert old not in mounts(own_node)


def test_what_proves_an_owner_dead(tmp_path: Path) -> None:
    me = Owner.this_process(tmp_path)
    assert Owner.parse(me.encode()) == me
    assert not me.proved_dead()
    assert replace(me, started=me.started + 1).proved_dead(), "another process has its number now"
    assert not replace(me, boot="another").proved_dead(), "a copy of this machine may be alive"
    assert not replace(me, boot="another", signed=me.signed - SILENT + 60).proved_dead()
    assert replace(me, boot="another", signed=me.signed - SILENT - 60).proved_dead(), "nobody has heard of it for a day"
    assert not replace(me, boot="another", signed=0, machine="another").proved_dead()
    assert not replace(me, started=1, processes="pid:[1]").proved_dead(), "another name space"
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert replace(me, pid=gone.pid).proved_dead()
    with subprocess.Popen(["true"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        started = int(Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[19])
        assert replace(me, pid=zombie.pid, started=started).proved_dead(), "its parent has not asked how it ended"
    assert [Owner.parse(data) for data in (None, b"", b"{}", b"[1]", b"\xff", b'"text"', b"[" * 60_000)] == [None] * 7
    odd: list[dict[str, object]] = [{"pid": "1"}, {"pid": True}, {"pid": -1}, {"pid": 1 << 80}, {"started": 1.5}, {"folder": None}, {"stopped": 1}]
    odd.append({"signed": "now"})
    assert [Owner.parse(json.dumps(asdict(me) | changed).encode()) for changed in odd] == [None] * len(odd)
