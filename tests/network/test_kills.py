"""The daemon is killed many times while readers run. It mounts again each time, and nothing is wrong, lost or
left over.

IPFSFUSE_KILLS is the number of kills (30). Half of them happen with a budget that has no room for all files.
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
"""Budgets: one that has no room for all files, and one in which nothing is ever evicted."""
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
        """Large files by CID: the name and the leaves of each."""
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
        self.read_again = 0
        """The number of complete files that were read again after a kill."""

    @property
    def folder(self) -> Path:
        return self.home.mountpoint / self.root

    def mount(self) -> int:
        mount: dict[str, Any] = self.home.json(
            "mount", "--json", "--from", self.gateway.url, "--budget", str(self.budget), self.home.mountpoint
        )
        return int(mount["pid"])

    def mount_and_kill(self, seed: int) -> None:
        """Mounts, checks what the last kill left, lets readers run, and kills the daemon."""
        complete = [name for name in self.staged() if not name.endswith(".part")]
        pid = self.mount()
        try:
            self.check_no_orphans()
            self.check_complete_files_are_not_fetched(complete)
            command = [sys.executable, "-S", "-c", READER, str(self.folder), str(self.truth)]
            readers = [
                subprocess.Popen([*command, str(READERS * seed + n)], stderr=subprocess.PIPE, text=True)
                for n in range(READERS)
            ]
            time.sleep(self.dice.uniform(0.0, 0.6))  # any moment will do
        finally:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), "the daemon is dead")
        assert [(self.errors_of(reader), reader.returncode) for reader in readers] == [("", 0)] * READERS
        assert self.on_disk() <= self.budget

    def errors_of(self, reader: "subprocess.Popen[str]") -> str:
        """The error output of a reader. The reader ends because the mount has ended."""
        try:
            return reader.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            where = Path(f"/proc/{reader.pid}/stack").read_text() if os.geteuid() == 0 else ""
            # only this ends such a mount
            subprocess.run(["umount", "-f", self.home.mountpoint], check=False, capture_output=True)
            return f"it hung in a mount whose daemon was killed:\n{where}"

    def check_complete_files_are_not_fetched(self, complete: list[str]) -> None:
        for cid in complete:
            name, leaves = self.leaves[cid]
            before, evictions = [self.gateway.asked[leaf] for leaf in leaves], self.evictions()
            assert (self.folder / name).read_bytes() == (self.truth / name).read_bytes()
            if evictions == self.evictions() == 0:
                assert [self.gateway.asked[leaf] for leaf in leaves] == before, (
                    f"{name} was complete, but it was fetched again"
                )
                self.read_again += 1

    def evictions(self) -> int:
        """Evictions since this mount began. A small block that a crash lost is staged again, which may evict
        a file."""
        count = int(self.home.json("status", "--json")["cache"]["evictions"])
        assert count == 0 or self.budget == TIGHT
        return count

    def staged(self) -> list[str]:
        folder = self.home.store / "staging"
        return sorted(os.listdir(folder)) if folder.exists() else []

    def check_no_orphans(self) -> None:
        """The daemon knows each staging file, and what it counts is within the budget."""
        known = {entry["cid"] for entry in self.home.json("ls", "--json")["entries"]}
        assert {name.removesuffix(".part") for name in self.staged()} <= known
        assert self.home.json("status", "--json")["cache"]["used"] <= self.budget

    def on_disk(self) -> int:
        """The bytes that the cache takes on disk, without the log and the lock."""
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
def test_a_daemon_killed_at_any_moment_mounts_again_with_nothing_wrong_or_lost(
    home: Home, budget: int
) -> None:
    kills = Kills(home, budget)
    with kills.gateway.serving():
        try:
            for seed in range(KILLS // 2):
                kills.mount_and_kill(seed)
            assert kills.read_again > KILLS // 4, "too few complete files were left to check"
            pid = kills.mount()
            for path in kills.truth.iterdir():
                assert (kills.folder / path.name).read_bytes() == path.read_bytes()
            home.run("evict", "--all")
            assert kills.staged() == []
            home.run("unmount", home.mountpoint)
            wait_until(lambda: not alive(pid), "the daemon ended")
        finally:
            subprocess.run(["fusermount3", "-u", "-z", "-q", home.mountpoint], check=False)
