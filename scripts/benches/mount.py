"""This mount beside a folder, Kubo's own mount and rclone's: 1 GiB, listings, find, tar, random reads,
memory.

    scripts/bench mount [--runs 5] [--small] [--json] [ROW ...]      without ROW, all of them

As root (page caches are dropped between cold runs), with Kubo (see tests/kubo/node.py) and, if it is there,
rclone. The mount is measured twice: as root, who lets the kernel read far ahead, and as a user, who may not.
Medians, side by side within one run: what else the machine does meanwhile meets all of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from scripts.benches import _datasets, _jobs, _table
from scripts.benches._datasets import Scale
from scripts.benches._ways import KuboMount, Ours, Rclone, Way, cpu_seconds, drop_caches
from tests.kubo.node import Node
from tests.mounting import WITH_OPEN_DEVICE, is_open_device

NATIVE, ROOT, USER, HTTP, KUBO, RCLONE, LIBRARY, PASSTHROUGH = (
    "native",
    "root",
    "user",
    "http",
    "kubo",
    "rclone",
    "library",
    "passthrough",
)
"""`http`: as root, from the node's ports alone. `passthrough`: as root, with --passthrough, after the file
was verified whole."""
ALL = (NATIVE, ROOT, USER, KUBO)
WITH_HTTP = (*ALL, HTTP)
WITH_RCLONE = (*ALL, HTTP, RCLONE)
EVERY = (*WITH_RCLONE, LIBRARY, PASSTHROUGH)


class Row(NamedTuple):
    job: Callable[[_jobs.Prefix, Path], float]
    data: str
    below: str
    state: str
    """cold: nothing is cached anywhere; again: right after the same (some machines reclaim page cache within
    seconds); staged: page cache dropped after a first run."""
    ways: tuple[str, ...]
    against: str
    target: str


ROWS = {
    "read-cold": Row(
        _jobs.read, "big", "large", "cold", WITH_RCLONE, KUBO, "5 times, and faster than rclone"
    ),
    "read-cold-library": Row(_jobs.read, "big", "large", "cold", (NATIVE, LIBRARY), NATIVE, "0.5 GB/s"),
    "read-warm": Row(_jobs.read, "big", "large", "again", (*WITH_RCLONE, PASSTHROUGH), NATIVE, "0.95"),
    "read-staged": Row(
        _jobs.read, "big", "large", "staged", (NATIVE, ROOT, USER, PASSTHROUGH), NATIVE, "0.5"
    ),
    "first-byte-large": Row(
        _jobs.first_byte, "big", "large", "cold", WITH_HTTP, KUBO, "1, and 1.2 of first-byte-1MiB at most"
    ),
    "first-byte-1MiB": Row(_jobs.first_byte, "big", "1MiB", "cold", WITH_HTTP, KUBO, ""),
    "ls-cold": Row(_jobs.ls, "names", "", "cold", ALL, KUBO, "4"),
    "ls-again": Row(_jobs.ls, "names", "", "again", ALL, KUBO, "15"),
    "ls-unknown-cold": Row(_jobs.ls, "nodes", "", "cold", ALL, KUBO, "1.5"),
    "ls-unknown-again": Row(_jobs.ls, "nodes", "", "again", ALL, KUBO, "15"),
    "ls-long": Row(_jobs.ls_long, "names", "", "cold", ALL, KUBO, "4"),
    "find-cold": Row(_jobs.find, "tree", "", "cold", ALL, KUBO, "3"),
    "find-warm": Row(_jobs.find, "tree", "", "again", ALL, KUBO, "12"),
    "tar-cold": Row(_jobs.tar, "tree", "", "cold", WITH_HTTP, KUBO, "1"),
    "tar-warm": Row(_jobs.tar, "tree", "", "again", ALL, KUBO, "3.5"),
    "random": Row(_jobs.random_reads, "big", "large", "staged", (*ALL, PASSTHROUGH), KUBO, "1"),
}
MEMORY = "memory"


def main() -> int:
    options = _options()
    if os.getuid() != 0:
        print(
            "scripts/bench mount: run it as root: page caches must be dropped between runs", file=sys.stderr
        )
        return 1
    if not is_open_device() and (done := _with_open_device()) is not None:
        return done
    scale = _datasets.SMALL if options.small else _datasets.FULL
    with _ways(scale, options.only or list(EVERY)) as ways:
        results = [_measure(name, ROWS[name], ways, options.runs) for name in ROWS if name in options.rows]
        memory = _memory(ways[ROOT], scale) if MEMORY in options.rows and ROOT in ways else {}
    if options.json:
        print(json.dumps({"rows": [one.as_json() for one in results], "memory": memory}, indent=1))
    else:
        print(_table.text(results, [name for name in EVERY if name in ways]))
        for what, size in memory.items():
            print(f"resident, {what}: {size >> 20} MiB")
    return 0


def _with_open_device() -> int | None:
    """Runs this once more where every user may open /dev/fuse: in a mount namespace with a device of its own.
    Returns how it ended; None where no device can be made."""
    with tempfile.TemporaryDirectory() as folder:
        inside = ["unshare", "--mount", "sh", "-c", WITH_OPEN_DEVICE, "sh", folder]
        if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
            return None
        again = "import sys; from scripts.benches.mount import main; sys.exit(main())"
        return subprocess.run([*inside, sys.executable, "-c", again, *sys.argv[1:]], check=False).returncode


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench mount")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--small", action="store_true", help="small data sets, for a look whether all of it works"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--only",
        action="append",
        metavar="WAY",
        choices=EVERY,
        help="measure this way alone; repeatable",
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join([*ROWS, MEMORY])}")
    options = parser.parse_args()
    unknown = set(options.rows) - {*ROWS, MEMORY}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join([*ROWS, MEMORY])}")
    options.rows = options.rows or [*ROWS, MEMORY]
    return options


@contextmanager
def _ways(scale: Scale, wanted: list[str]) -> Iterator[dict[str, Way]]:
    """All ways that this machine has, their data in place."""
    data = _datasets.make(scale)
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ipfsfuse-bench-", ignore_cleanup_errors=True)
            )
        )
        folder.chmod(0o711)  # the user's mount lies in it
        node = stack.enter_context(Node())
        cids = _add_to(node, data)
        library, in_library = data / "library", {}
        if LIBRARY in wanted:
            in_library = {"big": _add_to_library(library, data / "big")}
        places = {"IPFS_PATH": str(node.repo)}
        makers: dict[str, Callable[[], Way]] = {
            NATIVE: lambda: Way(NATIVE, {name: data / name for name in cids}),
            ROOT: lambda: Ours(ROOT, "kubo", folder / ROOT, cids, places),
            USER: lambda: Ours(USER, "kubo", folder / USER, cids, places, user=True),
            HTTP: lambda: Ours(HTTP, f"kubo+{node.api_url}", folder / HTTP, cids, {}),
            KUBO: lambda: KuboMount(KUBO, node, cids, folder / KUBO),
            RCLONE: lambda: Rclone(RCLONE, node, cids, folder / RCLONE),
            PASSTHROUGH: lambda: Ours(
                PASSTHROUGH, "kubo", folder / PASSTHROUGH, cids, places, options=("--passthrough",)
            ),
            LIBRARY: lambda: Ours(
                LIBRARY, "library", folder / LIBRARY, in_library, {"IPFSFUSE_LIBRARY": str(library)}
            ),
        }
        missing = {
            RCLONE: "" if shutil.which("rclone") else "there is no rclone",
            USER: "" if is_open_device() else "/dev/fuse is for root alone, and no other can be made",
        }
        for name, why in missing.items():
            if why:
                del makers[name]
                print(f"without the way {name}: {why}", file=sys.stderr, flush=True)
        ways = {name: make() for name, make in makers.items() if name in wanted}
        for way in ways.values():
            stack.callback(way.close)
        yield ways


def _add_to(node: Node, data: Path) -> dict[str, str]:
    cids = {}
    for name in ("big", "names", "nodes", "tree"):
        print(f"adding {name} to Kubo", file=sys.stderr, flush=True)
        raw = "--raw-leaves=false" if name == "nodes" else "--raw-leaves"
        cids[name] = node.cmd(
            "add", "-Q", "-r", "--cid-version=1", "--chunker=size-1048576", raw, "--pin=false", data / name
        )
    return cids


def _add_to_library(library: Path, tree: Path) -> str:
    env = os.environ | {"IPFSFUSE_LIBRARY": str(library)}
    done = subprocess.run(
        [sys.executable, "-m", "ipfsfuse", "add", "-Q", str(tree)],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()[-1]


def _measure(name: str, row: Row, ways: dict[str, Way], runs: int) -> _table.Result:
    print(f"{name}:", end="", file=sys.stderr, flush=True)
    result = _table.Result(name, row.against, row.target)
    chosen = [ways[way] for way in row.ways if way in ways]
    if row.state != "cold":
        for way in chosen:
            way.cold()
        for way in chosen:  # only now: making one cold drops all page caches
            row.job(way.prefix, way.path(row.data, row.below))
            way.settle(way.path(row.data, row.below))
    for _ in range(runs):
        for way in chosen:
            _run(row, way, result)
    for way in chosen:
        print(f"  {way.name} {result.median(way.name):.3g} s", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return result


def _run(row: Row, way: Way, result: _table.Result) -> None:
    if row.state == "cold":
        way.cold()
    elif row.state == "staged":
        drop_caches()
    path = way.path(row.data, row.below)
    if row.state == "again":
        row.job(way.prefix, path)
    before = cpu_seconds(way.pid) if way.pid else 0.0
    seconds = row.job(way.prefix, path)
    result.note(way.name, seconds, cpu_seconds(way.pid) - before if way.pid else 0.0)


def _memory(way: Way, scale: Scale) -> dict[str, int]:
    """Resident bytes of a mount that did all of it, then of one whose kernel saw and forgot `scale.forgotten`
    inodes."""
    way.cold()
    sizes = {"at the start": _resident(way.pid)}
    for row in ROWS.values():
        if ROOT in row.ways:
            row.job(way.prefix, way.path(row.data, row.below))
    sizes["after all of it"] = _resident(way.pid)
    drop_caches(2)
    sizes["and all of it forgotten"] = _resident(way.pid)
    entries = scale.folders * (_datasets.FILES_EACH + 1)
    for _ in range(scale.forgotten // entries):
        _jobs.ls_long(way.prefix, way.path("names", ""))
        _jobs.find(way.prefix, way.path("tree", ""))
        drop_caches(2)
    sizes[f"after {scale.forgotten:,} inodes seen and forgotten"] = _resident(way.pid)
    return sizes


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
