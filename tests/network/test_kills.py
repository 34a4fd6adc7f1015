"""The daemon is killed with readers running, again and again: it mounts again, and nothing is wrong, lost or
left over.

IPFSFUSE_KILLS says how often (30), half of them under a budget that has no room for all.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import PATIENCE, Home, alive, wait_until

KILLS = int(os.environ.get("IPFSFUSE_KILLS", "30"))
MIB = 1 << 20
TIGHT, AMPLE = 14 * MIB, 256 * MIB
"""Budgets: one that has no room for all, and one in which nothing is ever evicted."""
READERS = 3

READER = """
import os, random, sys
folder, truth, seed = sys.argv[1:]
dice, names = random.Random(int(seed)), os.listdir(truth)
while True:
    name = dice.choice(names)
    right = open(os.path.join(truth, name), "rb").read()
    try:
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            first = dice.choice([0, 0, dice.randrange(len(right))])
            got = os.pread(file.fileno(), len(right), first)
    except OSError:
        break
    if not right.startswith(got, first) or not got:
        sys.exit(f"wrong bytes in {name} at {first}")
"""


class Kills:
    """A tree of large and small files, its gateway, and the mount that is killed."""

    def __init__(self, home: Home, budget: int) -> None:
        self.budget = budget
        self.home, self.dice, self.dag = home, random.Random(17), Dag()
        self.truth = home.folder / "truth"
        self.truth.mkdir()
        self.leaves: dict[str, tuple[str, list[str]]] = {}
        """By CID of a large file: its name, its leaves."""
        entries = {}
        for number in range(8):
            leaves = [self.dice.randbytes(MIB) for _ in range(self.dice.randrange(1, 4))] + [
                self.dice.randbytes(1000)
            ]
            cid = self.dag.file(leaves)
            self.leaves[cids.text(cid)] = (
                f"large{number}",
                [cids.text(self.dag.block(leaf)) for leaf in leaves],
            )
            entries[b"large%d" % number] = cid, sum(map(len, leaves))
            (self.truth / f"large{number}").write_bytes(b"".join(leaves))
        for number in range(60):
            content = self.dice.randbytes(self.dice.randrange(1, 30_000))
            entries[b"small%d" % number] = self.dag.block(content), len(content)
            (self.truth / f"small{number}").write_bytes(content)
        self.root = cids.text(self.dag.directory(entries))
        self.gateway = Gateway(self.dag.blocks)
        self.again = 0
        """So many complete files were read again."""

    @property
    def folder(self) -> Path:
        return self.home.mountpoint / self.root

    def mount(self) -> int:
        told: dict[str, Any] = self.home.json(
            "mount", "--json", "--from", self.gateway.url, "--budget", str(self.budget), self.home.mountpoint
        )
        return int(told["pid"])

    def one(self, seed: int) -> None:
        """Mounts, looks at what the last kill left, lets readers run, and kills."""
        complete = [name for name in self.staged() if not name.endswith(".part")]
        pid = self.mount()
        try:
            self.no_orphans()
            self.nothing_complete_again(complete)
            command = [sys.executable, "-S", "-c", READER, str(self.folder), str(self.truth)]
            readers = [
                subprocess.Popen([*command, str(READERS * seed + n)], stderr=subprocess.PIPE, text=True)
                for n in range(READERS)
            ]
            time.sleep(self.dice.uniform(0.0, 0.6))  # any moment will do
        finally:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), "the daemon is dead")
        assert [(self.ended(reader), reader.returncode) for reader in readers] == [("", 0)] * READERS
        assert self.on_disk() <= self.budget

    def ended(self, reader: "subprocess.Popen[str]") -> str:
        """What a reader said at its end, which the end of the mount brings about."""
        try:
            return reader.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            where = Path(f"/proc/{reader.pid}/stack").read_text() if os.geteuid() == 0 else ""
            # what nothing but this ends
            subprocess.run(["umount", "-f", self.home.mountpoint], check=False, capture_output=True)
            return f"it hung in a mount whose daemon was killed:\n{where}"

    def nothing_complete_again(self, complete: list[str]) -> None:
        for cid in complete:
            name, leaves = self.leaves[cid]
            before, evictions = [self.gateway.asked[leaf] for leaf in leaves], self.evictions()
            assert (self.folder / name).read_bytes() == (self.truth / name).read_bytes()
            if evictions == self.evictions() == 0:
                assert [self.gateway.asked[leaf] for leaf in leaves] == before, (
                    f"{name} was complete, and fetched again"
                )
                self.again += 1

    def evictions(self) -> int:
        """Since this mount began: a small block that a crash took needs room again, and may push a file
        out."""
        count = int(self.home.json("status", "--json")["cache"]["evictions"])
        assert count == 0 or self.budget == TIGHT
        return count

    def staged(self) -> list[str]:
        folder = self.home.store / "staging"
        return sorted(os.listdir(folder)) if folder.exists() else []

    def no_orphans(self) -> None:
        """The daemon knows each file that stands there, and counts within its budget."""
        known = {entry["cid"] for entry in self.home.json("ls", "--json")["entries"]}
        assert {name.removesuffix(".part") for name in self.staged()} <= known
        assert self.home.json("status", "--json")["cache"]["used"] <= self.budget

    def on_disk(self) -> int:
        """What the cache takes of the disk (the log and the lock aside)."""
        counted = [
            self.home.store / "staging",
            self.home.store / "packs",
            *self.home.store.glob("index.sqlite*"),
        ]
        return sum(
            path.lstat().st_blocks * 512
            for top in counted
            for path in (top, *top.rglob("*"))
            if path.exists()
        )


@pytest.mark.slow
@pytest.mark.parametrize("budget", [TIGHT, AMPLE])
def test_killed_at_any_moment_it_mounts_again_with_no_wrong_byte_and_nothing_lost(
    home: Home, budget: int
) -> None:
    kills = Kills(home, budget)
    with kills.gateway.serving():
        try:
            for seed in range(KILLS // 2):
                kills.one(seed)
            assert kills.again > KILLS // 4, "kills left complete files to look at"
            pid = kills.mount()
            for path in kills.truth.iterdir():
                assert (kills.folder / path.name).read_bytes() == path.read_bytes()
            home.run("evict", "--all")
            assert kills.staged() == []
            home.run("unmount", home.mountpoint)
            wait_until(lambda: not alive(pid), "the daemon ended")
        finally:
            subprocess.run(["fusermount3", "-u", "-z", "-q", home.mountpoint], check=False)
