"""What pins at a Kubo node cost: `tar` of 10,000 small files with --pins kubo and with --pins none, in pairs.

    python -m scripts.benches.pins       ROUNDS=9 for more pairs

Each run is cold: a new cache folder and a new mount of the same node; the order within a pair changes with each pair.
The ratio is the median of the pairs' own: what else the machine does meets both runs of a pair alike.
"""

import os
import shutil
import statistics
import tempfile
from pathlib import Path

from scripts.benches._datasets import FULL, make
from scripts.benches._jobs import tar
from tests.kubo.node import Node
from tests.mounting import Home

ROUNDS = int(os.environ.get("ROUNDS", "5"))
MOST = 1.10
"""What pins may cost."""


def main() -> int:
    """1 where pins cost more than they may."""
    tree = make(FULL) / "tree"
    with tempfile.TemporaryDirectory(prefix="ipfsfuse-bench-") as folder, Node() as node:
        root = node.cmd("add", "-r", "-Q", "--cid-version=1", "--raw-leaves", tree)
        home = Home(Path(folder) / "home")
        pairs = []
        for number in range(ROUNDS):
            seconds = {way: _tar(home, node, root, way) for way in (("kubo", "none") if number % 2 else ("none", "kubo"))}
            pairs.append((seconds["kubo"], seconds["none"]))
            print(f"pinned {seconds['kubo']:.2f} s, not pinned {seconds['none']:.2f} s", flush=True)
    ratio = statistics.median(pinned / unpinned for pinned, unpinned in pairs)
    print(f"pins cost {ratio:.3f} times the time (at most {MOST:.2f}): pinned {_shown([p for p, _ in pairs])}, not {_shown([n for _, n in pairs])}")
    return int(ratio > MOST)


def _tar(home: Home, node: Node, root: str, pins: str) -> float:
    """Seconds for one cold `tar`."""
    shutil.rmtree(home.cache, ignore_errors=True)
    with home.mounted("--from", "kubo+" + node.api_url, "--pins", pins) as mount:
        return tar((), mount.path / root)


def _shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    raise SystemExit(main())
