"""What pins at a Kubo node cost: `tar` of 10,000 small files with --pins kubo and with --pins none, in pairs.

    python -m scripts.benches.pins       ROUNDS=9 for more pairs

Each run is cold: a new cache folder and a new mount of the same node; the order within a pair changes with
each pair. The ratio is the median of the pairs' own: what else the machine does meets both runs of a pair
alike. Beside it the processor's seconds of daemon and node together, which depend less on what else runs.
"""

import os
import shutil
import statistics
import tempfile
from pathlib import Path

from scripts.benches._datasets import FULL, make
from scripts.benches._jobs import tar
from scripts.benches._ways import cpu_seconds
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
        times, work = [], []
        for number in range(ROUNDS):
            took = {
                way: _tar(home, node, root, way)
                for way in (("kubo", "none") if number % 2 else ("none", "kubo"))
            }
            pinned, plain = took["kubo"], took["none"]
            times.append(pinned[0] / plain[0])
            work.append(pinned[1] / plain[1])
            print(
                f"pinned {pinned[0]:.2f} s ({pinned[1]:.2f} s of CPU), not pinned {plain[0]:.2f} s "
                f"({plain[1]:.2f})",
                flush=True,
            )
    print(f"pins cost {_shown(times)} times the time (at most {MOST:.2f}), {_shown(work)} times the CPU")
    return int(statistics.median(times) > MOST)


def _tar(home: Home, node: Node, root: str, pins: str) -> tuple[float, float]:
    """One cold `tar`: (seconds, seconds of CPU of daemon and node)."""
    shutil.rmtree(home.cache, ignore_errors=True)
    assert node.process is not None
    with home.mounted("--from", "kubo+" + node.api_url, "--pins", pins) as mount:
        processes = mount.pid, node.process.pid
        before = sum(map(cpu_seconds, processes))
        seconds = tar((), mount.path / root)
        return seconds, sum(map(cpu_seconds, processes)) - before


def _shown(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


if __name__ == "__main__":
    raise SystemExit(main())
