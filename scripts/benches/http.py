"""HTTP to a node on this machine: httpx alone, httpx with our transport, and the client of our own that came
before.

    scripts/bench http [--runs 5] [--small] [--json] [ROW ...]      without ROW, all of them

The last of the three is read from git, at the last commit that had it. The rows `get-8KiB`, `range-16MiB` and
`car-directory` ask the node's gateway port from a process that does nothing else; the others are a mount by
port. Medians of runs that take turns, so that what else the machine does meets all of them. As root: page
caches are dropped.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from scripts.benches import _datasets, _jobs, _table
from scripts.benches._http_jobs import JOBS
from scripts.benches._ways import Ours, cpu_seconds
from tests.kubo.node import Node

BEFORE, HTTPX, OWN = "before", "httpx", "own"
WAYS = (BEFORE, HTTPX, OWN)
BEFORE_COMMIT = "18dee8f"
"""The last commit with `ipfsfuse/sources/web`."""
HTTPX_ALONE = "import ipfsfuse.sources.http.client as client; client.OWN_TRANSPORT = False"
"""Run when Python starts, in the processes that are to use httpx alone."""


class Mounted(NamedTuple):
    job: Callable[[_jobs.Prefix, Path], float]
    data: str
    below: str
    target: str


MOUNTED = {
    "read": Mounted(_jobs.read, "big", "large", "at most 1.10 times the seconds"),
    "tar": Mounted(_jobs.tar, "tree", "", "at most 1.15 times the seconds"),
    "first-byte": Mounted(_jobs.first_byte, "big", "large", "at most 1.15 times the seconds"),
}
TARGETS = {"get-8KiB": "at most 1.5 times the seconds", "range-16MiB": "", "car-directory": ""}


def main() -> int:
    options = _options()
    if os.getuid() != 0:
        print("scripts/bench http: run it as root: page caches must be dropped between runs", file=sys.stderr)
        return 1
    scale = _datasets.SMALL if options.small else _datasets.FULL
    with _bench(scale) as bench:
        results = [bench.measure(row, options.runs, options.only or WAYS) for row in options.rows]
    if options.json:
        print(json.dumps({"rows": [one.as_json() for one in results]}, indent=1))
    else:
        print(_table.text(results, list(WAYS)))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench http")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="small data sets, for a look whether all of it works"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", action="append", choices=WAYS, help="measure this way alone; repeatable")
    rows = [*JOBS, *MOUNTED]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(rows):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    options.rows = options.rows or rows
    return options


class Bench:
    def __init__(self, node: Node, plan: Path, paths: dict[str, str], mounts: dict[str, Ours]) -> None:
        """`paths`: each way's PYTHONPATH."""
        self._node, self._plan, self._paths, self._mounts = node, plan, paths, mounts

    def measure(self, row: str, runs: int, ways: tuple[str, ...]) -> _table.Result:
        result = _table.Result(row, BEFORE, TARGETS[row] if row in TARGETS else MOUNTED[row].target)
        for _ in range(runs):
            for way in ways:
                result.note(way, *(self._job(row, way) if row in JOBS else self._mounted(row, way)))
        said = "".join(f"  {way} {result.median(way):.3g} s" for way in ways)
        print(f"{row}:{said}", file=sys.stderr, flush=True)
        return result

    def _job(self, row: str, way: str) -> tuple[float, float]:
        script = str(Path(__file__).with_name("_http_jobs.py"))
        command = [sys.executable, "-P", script, row, self._node.gateway_url, str(self._plan)]
        env = os.environ | {"PYTHONPATH": self._paths[way]}
        told = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
        return told["seconds"], told["cpu"]

    def _mounted(self, row: str, way: str) -> tuple[float, float]:
        mount, job = self._mounts[way], MOUNTED[row]
        mount.cold()
        before = cpu_seconds(mount.pid)
        seconds = job.job(mount.prefix, mount.path(job.data, job.below))
        cpu = cpu_seconds(mount.pid) - before
        mount.close()
        return seconds, cpu


@contextmanager
def _bench(scale: _datasets.Scale) -> Iterator[Bench]:
    data = _datasets.make(scale)
    here = Path(__file__).parents[2]
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ipfsfuse-bench-", ignore_cleanup_errors=True)
            )
        )
        before = _checked_out(here, folder / "before")
        (folder / "alone").mkdir()
        (folder / "alone" / "sitecustomize.py").write_text(HTTPX_ALONE)
        paths = {BEFORE: str(before), HTTPX: f"{folder / 'alone'}:{here}", OWN: str(here)}
        node = stack.enter_context(Node())
        named = {
            name: node.cmd(
                "add",
                "-Q",
                "-r",
                "--cid-version=1",
                "--chunker=size-1048576",
                "--raw-leaves",
                "--pin=false",
                data / name,
            )
            for name in ("big", "tree")
        }
        plan = folder / "plan.json"
        plan.write_text(json.dumps(_plan(node, data, named)))
        mounts = {
            way: Ours(way, f"kubo+{node.api_url}", folder / way, named, {"PYTHONPATH": path})
            for way, path in paths.items()
        }
        for mount in mounts.values():
            stack.callback(mount.close)
        yield Bench(node, plan, paths, mounts)


def _checked_out(here: Path, where: Path) -> Path:
    """The tree with the client that came before httpx, installed, so that its C parts are built."""
    where.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(here), "archive", BEFORE_COMMIT], check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(where)], input=archive, check=True)
    installed = where.with_name("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    subprocess.run([*pip, "--no-deps", "--target", str(installed), str(where)], check=True)
    return installed


def _plan(node: Node, data: Path, named: dict[str, str]) -> dict[str, object]:
    """What the jobs ask for: 4,000 blocks of 8 KiB, 256 MiB of a file, a directory."""
    content = (data / "big" / "large").read_bytes()[: 256 << 20]
    small, large = (
        content[: 4_000 * 8192],
        [content[at : at + (1 << 20)] for at in range(0, len(content), 1 << 20)],
    )
    node.cmd(
        "add", "-Q", "--cid-version=1", "--chunker=size-8192", "--raw-leaves", "--pin=false", stdin=small
    )
    file = node.cmd(
        "add", "-Q", "--cid-version=1", "--chunker=size-1048576", "--raw-leaves", "--pin=false", stdin=content
    )
    return {
        "blocks": [_raw(small[at : at + 8192]) for at in range(0, len(small), 8192)],
        "file": file,
        "leaves": [_raw(leaf) for leaf in large],
        "directory": named["tree"],
    }


def _raw(block: bytes) -> str:
    return cids.text(cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(block).digest()))
