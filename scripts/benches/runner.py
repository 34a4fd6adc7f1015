"""A guest that reads 1 GiB, and one that opens 10,000 files: through a warm mount, against a folder of the same runner."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GUEST = r"""
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
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
  long total = 0, files = 0;
  DIR *dir = opendir(argv[1]);
  for (struct dirent *each; dir && (each = readdir(dir));) {
    char path[512];
    if (each->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "%s/%s", argv[1], each->d_name);
    total += take(path), files++;
  }
  printf("%ld files, %ld bytes\n", files, total);
}
"""
ROUNDS = 5


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        guest = _guest(folder)
        trees = {"read 1 GiB": (_big(folder / "big"), 1.05), "open 10,000 files": (_many(folder / "many"), 5.0)}
        for what, (tree, bound) in trees.items():
            cid = _ipfsfuse(folder, "add", "-Q", str(tree)).strip()
            mount = folder / "mnt"
            mount.mkdir(exist_ok=True)
            _ipfsfuse(folder, "mount", str(mount))
            try:
                native, mounted = _best(guest, folder, tree, "."), _best(guest, folder, mount, cid)
            finally:
                _ipfsfuse(folder, "unmount", str(mount))
            print(f"{what}: {native:.2f} s native, {mounted:.2f} s through the mount: {mounted / native:.2f} times (at most {bound:g})")
    return 0


def _guest(folder: Path) -> Path:
    (folder / "guest.c").write_text(GUEST)
    made = folder / "guest.wasm"
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "--target=wasm32-wasi", "-O2", "-o", str(made), str(folder / "guest.c")], check=True)
    return made


def _big(tree: Path) -> Path:
    tree.mkdir()
    with (tree / "file").open("wb") as out:
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


def _best(guest: Path, folder: Path, mount: Path, below: str) -> float:
    """Seconds of the quickest of some runs, once one has warmed the caches."""
    command = [sys.executable, "-m", "runner", "--mount", str(mount), str(guest), f"/ipfs/{below}"]
    best = float("inf")
    for _ in range(1 + ROUNDS):
        begin = time.perf_counter()
        subprocess.run(command, env=_environment(folder), check=True, capture_output=True)
        best = min(best, time.perf_counter() - begin)
    return best
