"""`ipfsfuse add` beside `ipfs add`, and beside `cp` with a sync of what was copied, on the same input, ratios
first: 1 GiB in one file, 10,000 small files.

Both as a user runs them, start-up included, into a fresh library and a fresh repository under the profile
unixfs-v1-2025; without a daemon, flatfs (Kubo's default) for `ipfs`. `ipfs` is $IPFSFUSE_IPFS, or the one on
PATH, or the tests' own; without one its column is empty. The copy shows what the disk allows.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROUNDS = int(os.environ.get("ROUNDS", "5"))
MIB = 1 << 20


def main() -> None:
    ipfs = _find_ipfs()
    if ipfs is None:
        print("no ipfs on PATH: ours alone")
    with tempfile.TemporaryDirectory(prefix="ipfsfuse-bench-") as folder:
        top = Path(folder)
        for title, source in (("1 GiB in one file", _large(top)), ("10,000 files of 2-20 KiB", _small(top))):
            _compare(title, source, top, ipfs)


def _compare(title: str, source: Path, top: Path, ipfs: str | None) -> None:
    ours, theirs, copies, memory, cids = [], [], [], 0, set[str]()
    for _ in range(ROUNDS):  # in turns, so that a busy machine is busy for both
        with _fresh(top / "library") as library:
            seconds, cid, peak = _run(
                [sys.executable, "-m", "ipfsfuse", "add", "-Q", "--library", str(library), str(source)], {}
            )
            ours.append(seconds)
            cids.add(cid)
            memory = max(memory, peak)
        if ipfs is not None:
            with _repo(ipfs, top / "repo") as environment:
                seconds, cid, _peak = _run([ipfs, "add", "-r", "-Q", "--pin=true", str(source)], environment)
                theirs.append(seconds)
                cids.add(cid)
        copies.append(_copy(source, top / "copy"))
    ratio = (
        f"{statistics.median(theirs) / statistics.median(ours):.2f} times as fast as ipfs"
        if theirs
        else "no ipfs to compare"
    )
    equal = "same CID" if len(cids) == 1 else f"DIFFERENT CIDS {cids}"
    print(
        f"{title}: {ratio}, {statistics.median(copies) / statistics.median(ours):.2f} times as fast as cp; "
        f"ours {_shown(ours)}, ipfs {_shown(theirs)}, cp {_shown(copies)}; "
        f"{memory // MIB} MiB at most; {equal}",
        flush=True,
    )


def _shown(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})" if seconds else "-"


def _copy(source: Path, to: Path) -> float:
    """Seconds until a copy is on the disk."""
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    subprocess.run(["sync", "-f", str(to)], check=True)
    seconds = time.perf_counter() - started
    subprocess.run(["rm", "-r", str(to)], check=True)
    return seconds


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, str, int]:
    """(seconds, last line, peak memory in bytes)."""
    os.sync()
    started = time.perf_counter()
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _pid, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return seconds, printed.split()[-1], usage.ru_maxrss * 1024


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _repo(ipfs: str, folder: Path) -> Iterator[dict[str, str]]:
    environment = {"IPFS_PATH": str(folder), "IPFS_TELEMETRY": "off"}

    def run(*args: str) -> None:
        subprocess.run([ipfs, *args], env=os.environ | environment, check=True, capture_output=True)

    with _fresh(folder):
        run("init", "--empty-repo")
        for key, value in (
            ("AutoConf.Enabled", "false"),
            ("Bootstrap", "[]"),
            ("Routing.Type", '"none"'),
            ("Discovery.MDNS.Enabled", "false"),
        ):
            run("config", "--json", key, value)
        run("config", "profile", "apply", "unixfs-v1-2025")
        yield environment


def _find_ipfs() -> str | None:
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipfsfuse-tests"
    built = sorted(cached.glob("kubo-*/ipfs"))
    return os.environ.get("IPFSFUSE_IPFS") or shutil.which("ipfs") or (str(built[-1]) if built else None)


def _large(top: Path) -> Path:
    return _written(top / "large", lambda out: [_random(out, MIB) for _ in range(1024)])


def _small(top: Path) -> Path:
    chance = random.Random(1)
    for number in range(10_000):
        folder = top / "small" / f"{number // 100:02}"
        folder.mkdir(parents=True, exist_ok=True)
        _written(folder / str(number), lambda out: _random(out, chance.randrange(2 << 10, 20 << 10)))
    return top / "small"


def _written(path: Path, fill: Callable[[int], object]) -> Path:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        fill(fd)
    finally:
        os.close(fd)
    return path


def _random(out: int, size: int) -> None:
    os.write(out, os.urandom(size))


if __name__ == "__main__":
    main()
