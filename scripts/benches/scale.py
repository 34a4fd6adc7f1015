"""How cost grows with what is staged: 10,000, 100,000 and 1,000,000 staging files, and a tenth as many packs.

    scripts/bench scale [--json] [COUNT ...]

The files are sparse, of 100,000 bytes, with 4 KiB on the disk each; 500 of them are whole, and are read. As
root (page caches are dropped before a start). A mount is up when `ipfsfuse mount` returns. What an earlier
run left is counted after that, and reads go on meanwhile. In the end 1,000 processes read 4 KiB of staged
files at random, all at once, each page once and past the kernel's page cache.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ipfsfuse import client
from ipfsfuse.cache.store.folder import LAYOUT, MARKER
from ipfsfuse.cache.store.packs import section
from ipfsfuse.dag import cid as cids
from scripts.benches import _table
from scripts.benches._ways import drop_caches
from tests.mounting import Home, Mounted, wait_until

COUNTS = (10_000, 100_000, 1_000_000)
SIZE = 100_000
PAGE = 4096
WHOLE = 500
FOR_CLIENTS, MEANWHILE, FOR_LOOKUPS, FOR_EVICTIONS = (
    slice(300),
    slice(300, 350),
    slice(350, 400),
    slice(400, 500),
)
CLIENTS, READS_EACH = 1000, 7
PAUSE = 0.01
"""Seconds between two reads while all is counted: without it the count takes as many times as long as reads
and count share one interpreter."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench scale")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("counts", nargs="*", metavar="COUNT", type=int, default=list(COUNTS))
    options = parser.parse_args()
    if os.getuid() != 0:
        print(
            "scripts/bench scale: run it as root: page caches must be dropped between runs", file=sys.stderr
        )
        return 1
    results = [_measured(count) for count in [0, *options.counts]]
    if options.json:
        print(json.dumps({"scale": results}, indent=1))
    else:
        names = list(results[0])
        print(
            _table.markdown(
                [names[0], *(str(result[names[0]]) for result in results)],
                [[name, *(f"{result[name]:.4g}" for result in results)] for name in names[1:]],
            )
        )
    return 0


def _measured(count: int) -> dict[str, float]:
    """Seconds, but where the name says otherwise. Of nothing (0 files) there are still the whole files."""
    print(f"{count} files", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="ipfsfuse-bench-") as folder:
        home = Home(Path(folder) / "home")
        whole = _fill(home.store, count)
        with home.mounted(*OPTIONS) as mount:  # the index learns of the packs
            wait_until(partial(_is_counted, mount), "all is counted", 600)
        started = time.perf_counter()
        with home.mounted(*OPTIONS):
            up_warm = time.perf_counter() - started
        drop_caches()
        started = time.perf_counter()
        with home.mounted(*OPTIONS) as mount:
            up = time.perf_counter() - started
            paths = [mount.path / name for name in whole]
            reading = [_seconds(lambda: _read_page(paths[0], 0))]
            pages = iter([(path, at) for at in range(0, SIZE - PAGE, PAGE) for path in paths[MEANWHILE]])
            while not _is_counted(mount):
                reading.append(_seconds(partial(_read_page, *next(pages, (paths[0], 0)))))
                time.sleep(PAUSE)
            counted = time.perf_counter() - started
            result: dict[str, float] = {
                "staging files": count,
                "mounted, nothing in the page cache": up,
                "mounted, once more": up_warm,
                "first read": reading[0],
                "longest read until all is counted": max(reading),
                "until all is counted": counted,
                "memory, MiB": _memory(mount) / (1 << 20),
                "status": _median(lambda: client.call(mount.control, "status")),
                "ls --json": _seconds(lambda: _quietly(home, "ls", "--json")),
                "lookup, ms": 1000 * _median_of([_seconds(path.stat) for path in paths[FOR_LOOKUPS]]),
                "eviction, ms": 1000
                * _median_of(
                    [
                        _seconds(partial(client.call, mount.control, "evict", cid=name))
                        for name in whole[FOR_EVICTIONS]
                    ]
                ),
            }
            clients = _clients(paths[FOR_CLIENTS])
            result["4 KiB of 1,000 clients, median, ms"] = 1000 * statistics.median(clients)
            result["4 KiB of 1,000 clients, p99, ms"] = 1000 * statistics.quantiles(clients, n=100)[98]
            result["memory at the end, MiB"] = _memory(mount) / (1 << 20)
            ending = time.perf_counter()
        result["unmounted"] = time.perf_counter() - ending
        subprocess.run(["rm", "-r", str(home.store)], check=True)
    return result


OPTIONS = ("--offline", "--pins", "none", "--budget", "1TiB", "--reserve", "0")


def _fill(store: Path, count: int) -> list[str]:
    """A cache folder as a mount leaves it; the names of the whole files."""
    for part in (store, store / "staging", store / "packs"):
        part.mkdir(mode=0o700, parents=True)
    (store / "format").write_text(f"{MARKER} {LAYOUT}\n")
    whole = []
    chance = random.Random(1)
    for _ in range(WHOLE):
        content = chance.randbytes(SIZE)
        whole.append(cids.text(_cid(content)))
        (store / "staging" / whole[-1]).write_bytes(content)
    folder, page = os.open(store / "staging", os.O_RDONLY), chance.randbytes(PAGE)
    for number in range(count):
        name = cids.text(_cid(b"%d" % number))
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        os.write(file, page)
        os.ftruncate(file, SIZE)
        os.close(file)
    os.close(folder)
    for number in range(1, count // 10 + 1):
        block = b"block %d" % number
        (store / "packs" / f"{number}.pack").write_bytes(section(_cid(block), block).data)
    return whole


def _cid(content: bytes) -> cids.Cid:
    return cids.make(cids.RAW, b"\x12\x20" + hashlib.sha256(content).digest())


def _is_counted(mount: Mounted) -> bool:
    return bool(client.call(mount.control, "status")["cache"]["counted"])


def _clients(paths: Sequence[Path]) -> list[float]:
    """Seconds of each read of the clients, who begin together."""
    pages = [(path, at) for path in paths for at in range(0, SIZE - PAGE, PAGE)]
    random.Random(2).shuffle(pages)
    begin, ready = os.pipe()
    told, tell = os.pipe()
    children = []
    for number in range(CLIENTS):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.close(ready)
        os.read(begin, 1)  # until the pipe is closed
        mine = pages[number * READS_EACH : (number + 1) * READS_EACH]
        taken = [_seconds(partial(_read_page, *page)) for page in mine]
        os.write(tell, json.dumps(taken).encode() + b"\n")  # below PIPE_BUF: in one piece
        os._exit(0)
    os.close(begin)
    os.close(tell)
    os.close(ready)
    with os.fdopen(told) as lines:
        found = [seconds for line in lines for seconds in json.loads(line)]
    for child in children:
        os.waitpid(child, 0)
    return found


def _read_page(path: Path, at: int) -> None:
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    if len(os.pread(file, PAGE, at)) != PAGE:
        raise SystemExit(f"scripts/bench scale: {path} is short")
    os.close(file)


def _quietly(home: Home, *arguments: str) -> None:
    command = [sys.executable, "-m", "ipfsfuse", *arguments]
    subprocess.run(command, env=home.env, stdout=subprocess.DEVNULL, check=True)


def _memory(mount: Mounted) -> int:
    status = Path(f"/proc/{mount.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


def _seconds(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def _median(job: Callable[[], object]) -> float:
    return _median_of([_seconds(job) for _ in range(9)])


def _median_of(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
