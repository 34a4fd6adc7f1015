"""`prefetch`: its depth, its output, and how it goes on after it was killed."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from tests.cli.conftest import on_terminal
from tests.dagging import Dag
from tests.faults.gateway import Gateway, mounted
from tests.mounting import Home, alive, wait_until

LEAF = 1 << 18
FILES = 6


class Tree:
    """A directory with f0 to f5 and `zbelow`, which holds g and `deep`. `deep` holds h."""

    def __init__(self) -> None:
        self.dag, dice = Dag(), random.Random(3)
        self.leaves: dict[str, list[str]] = {}

        def file(name: str) -> tuple[cids.Cid, int]:
            data = [dice.randbytes(LEAF) for _ in range(3)]
            self.leaves[name] = [cids.text(self.dag.block(leaf)) for leaf in data]
            return self.dag.file(data), 3 * LEAF

        deep = self.dag.directory({b"h": file("h")})
        below = self.dag.directory({b"deep": (deep, 3 * LEAF), b"g": file("g")})
        entries = {b"f%d" % number: file(f"f{number}") for number in range(FILES)}
        self.root = cids.text(self.dag.directory(entries | {b"zbelow": (below, 6 * LEAF)}))

    def fetched(self, gateway: Gateway) -> set[str]:
        """The files of which all leaves were asked for."""
        return {name for name, leaves in self.leaves.items() if all(gateway.asked[leaf] for leaf in leaves)}


@pytest.fixture
def tree() -> Tree:
    return Tree()


@pytest.mark.parametrize(
    ("depth", "files", "directories"),
    [("0", set(), 1), ("1", {"f"}, 2), ("2", {"f", "g"}, 3), (None, {"f", "g", "h"}, 3)],
)
def test_prefetch_stops_at_the_given_depth(
    home: Home, tree: Tree, depth: str | None, files: set[str], directories: int
) -> None:
    with mounted(home, tree.dag) as (gateway, _mount):
        answer = home.json("prefetch", "--json", *(["--depth", depth] if depth else []), tree.root)
        assert {name[0] for name in tree.fetched(gateway)} == files
        assert answer["files"] == len(tree.fetched(gateway))
        assert answer["directories"] == directories
        assert answer["bytes"] == 3 * LEAF * answer["files"]


def test_prefetch_shows_a_bar_only_on_a_terminal(home: Home, tree: Tree) -> None:
    with mounted(home, tree.dag):
        shown = on_terminal(home, "prefetch", tree.root)
        assert "prefetch:" in shown
        assert "/6.00M" in shown
        home.run("evict", "--all")
        done = home.run("prefetch", tree.root)
        assert (done.stderr, "\r" in done.stdout) == ("", False)
        assert f"bytes: {3 * LEAF * 8 / (1 << 20):.1f} MiB\n" in done.stdout


@pytest.mark.parametrize("victim", ["command", "mount"])
def test_a_killed_prefetch_goes_on_where_it_was(home: Home, tree: Tree, victim: str) -> None:
    stuck = tree.leaves["g"][1]
    gateway = Gateway(tree.dag.blocks)
    gateway.stalled.add(stuck)
    with gateway.serving():
        options = ("--from", gateway.url, "--deadline", "60s")
        pid = home.json("mount", "--json", *options, home.mountpoint)["pid"]
        command = subprocess.Popen(
            [sys.executable, "-m", "ipfsfuse", "prefetch", tree.root], env=home.env, stderr=subprocess.DEVNULL
        )
        whole = [f"f{number}" for number in range(FILES)]
        wait_until(
            lambda: gateway.asked[stuck] and staged(home) >= FILES,
            "all files but the one with the stalled leaf are staged",
        )
        os.kill(command.pid if victim == "command" else pid, signal.SIGKILL)
        assert command.wait(60) != 0
        gateway.stalled.clear()
        if victim == "mount":
            wait_until(lambda: not alive(pid), "the mount is dead")
            pid = home.json("mount", "--json", *options, home.mountpoint)["pid"]
        try:
            answer = home.json("prefetch", "--json", tree.root)
            assert (answer["files"], tree.fetched(gateway)) == (FILES + 2, set(tree.leaves))
            assert [gateway.asked[leaf] for name in whole for leaf in tree.leaves[name]] == [1] * 3 * FILES
            entries = home.json("ls", "--json")["entries"]
            assert [entry["complete"] for entry in entries] == [True] * (FILES + 2)
        finally:
            home.run("unmount", home.mountpoint)


def staged(home: Home) -> int:
    """Files that have their final name."""
    return sum(not path.name.endswith(".part") for path in (home.store / "staging").iterdir())


def test_ls_shows_sizes_completeness_last_use_and_pins(home: Home, tree: Tree) -> None:
    with mounted(home, tree.dag) as (gateway, mount):
        before = time.time()
        with (mount.path / tree.root / "f0").open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), 10, LEAF)
        (mount.path / tree.root / "zbelow" / "g").read_bytes()
        pinned = os.getxattr(mount.path / tree.root / "zbelow" / "deep", "ipfs.cid").decode()
        home.run("pin", pinned)
        cid = {
            name: os.getxattr(mount.path / tree.root / path, "ipfs.cid").decode()
            for name, path in PATHS.items()
        }
        entries = {entry["cid"]: entry for entry in home.json("ls", "--json")["entries"]}
        assert set(entries) == set(cid.values())
        shown = {
            name: (
                entries[cid[name]]["complete"],
                entries[cid[name]]["pinned"],
                entries[cid[name]]["size"],
            )
            for name in PATHS
        }
        assert shown == {
            "f0": (False, "", 3 * LEAF),
            "g": (True, "", 3 * LEAF),
            "h": (True, "user", 3 * LEAF),
        }
        assert LEAF <= entries[cid["f0"]]["staged"] <= LEAF + (1 << 16)
        assert all(
            before - 1 <= datetime.fromisoformat(entry["last_used"]).timestamp() <= time.time() + 1
            and entry["source"] == gateway.url
            for entry in entries.values()
        )
        lines = {line.split()[0]: line for line in home.run("ls").stdout.splitlines()}
        assert "256.0 KiB of  768.0 KiB" in lines[cid["f0"]]
        assert "whole  768.0 KiB" in lines[cid["g"]]
        below = entries[cid["h"]]["paths"]
        assert below == [f"/ipfs/{cid['h']}"] or below[0].endswith("/h")
        assert f"pinned:user  {below[0]}" in lines[cid["h"]]


PATHS = {"f0": Path("f0"), "g": Path("zbelow/g"), "h": Path("zbelow/deep/h")}
