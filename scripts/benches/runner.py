"""A guest that reads 1 GiB, and one that opens 10,000 files: through a warm mount, against a folder of the same runner.

Figures are the quickest of some rounds, in which mount, folder and an empty folder take turns; what the run on the empty folder
takes (the runner's own start) is taken off. CPU time is the guest's, the runner's and the daemon's together: on a machine that
others use it says more than the clock. With TMPDIR=/dev/shm the folder is one of 4-KiB pages, as the mount's are.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

GUEST = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
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
int main(int argc, char **argv) {
  long total = 0, files = atol(argv[2]);
  for (long number = 0; number < files; number++) {
    char path[512];
    snprintf(path, sizeof path, "%s/%ld.txt", argv[1], number);
    total += take(path);
  }
  printf("%ld files, %ld bytes\n", files, total);
}
"""
ROUNDS = 10


class Cost(NamedTuple):
    """Seconds."""

    clock: float
    cpu: float


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        guest = _guest(folder)
        trees = {"read 1 GiB": (_big(folder / "big"), 1, 1.05), "open 10,000 files": (_many(folder / "many"), 10_000, 5.0)}
        for what, (tree, files, bound) in trees.items():
            cid = _ipfsfuse(folder, "add", "-Q", str(tree)).strip()
            mount = folder / "mnt"
            mount.mkdir(exist_ok=True)
            daemon = json.loads(_ipfsfuse(folder, "mount", "--json", str(mount)))["pid"]
            try:
                native, mounted = _compared(guest, folder, tree, mount / cid, daemon, files)
            finally:
                _ipfsfuse(folder, "unmount", str(mount))
            print(f"{what} (at most {bound:g} times):")
            for field in Cost._fields:
                one, other = getattr(native, field), getattr(mounted, field)
                print(f"  {field:<5}  {one:.3f} s native, {other:.3f} s through the mount: {other / one:.2f} times")
    return 0


def _guest(folder: Path) -> Path:
    (folder / "guest.c").write_text(GUEST)
    made = folder / "guest.wasm"
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "--target=wasm32-wasi", "-O2", "-o", str(made), str(folder / "guest.c")], check=True)
    return made


def _big(tree: Path) -> Path:
    tree.mkdir()
    with (tree / "0.txt").open("wb") as out:
        for _ in range(1024):
            out.write(os.urandom(1 << 20))
    return tree


def _many(tree: Path) -> Path:
    tree.mkdir()
    for number in range(10_000):
        (tree / f"{number}.txt").write_text(f"{number}\n" * 20)
    return tree


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "IPFSFUSE_CACHE_DIR": str(folder / "cache"), "IPFSFUSE_LIBRARY": str(folder / "library"), "XDG_CACHE_HOME": str(folder)}


def _ipfsfuse(folder: Path, *args: str) -> str:
    return subprocess.run([sys.executable, "-m", "ipfsfuse", *args], env=_environment(folder), check=True, capture_output=True, text=True).stdout


def _compared(guest: Path, folder: Path, native: Path, mounted: Path, daemon: int, files: int) -> tuple[Cost, Cost]:
    """(in the folder, in the mount), less what a run takes that finds nothing to do; once a round has warmed the caches."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    seen: dict[Path, list[Cost]] = {empty: [], native: [], mounted: []}
    for _ in range(1 + ROUNDS):
        for tree, costs in seen.items():
            costs.append(_run(guest, folder, tree, daemon, 0 if tree == empty else files))
    best = {tree: [min(values) for values in zip(*costs[1:], strict=True)] for tree, costs in seen.items()}
    nothing = best[empty]
    one, other = ([mine - start for mine, start in zip(best[tree], nothing, strict=True)] for tree in (native, mounted))
    return Cost(*one), Cost(*other)


def _run(guest: Path, folder: Path, tree: Path, daemon: int, files: int) -> Cost:
    command = [sys.executable, "-m", "runner", "--mount", str(tree.parent), str(guest), f"/ipfs/{tree.name}", str(files)]
    begin, cpu = time.perf_counter(), _cpu(daemon)
    subprocess.run(command, env=_environment(folder), check=True, capture_output=True)
    return Cost(time.perf_counter() - begin, _cpu(daemon) - cpu)


def _cpu(daemon: int) -> float:
    """Seconds that children of ours which have ended took, and the daemon so far."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    fields = Path(f"/proc/{daemon}/stat").read_text().rpartition(")")[2].split()
    return ended.ru_utime + ended.ru_stime + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
