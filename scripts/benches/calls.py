"""Counts the functions of ours that one READ enters: cold from a gateway, and fetched ahead.

A cold READ stages its bytes after its answer. Those calls are counted separately."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import CodeType, FrameType

from tests.kubo.node import Node
from tests.mounting import Home, wait_until

TOGGLE = signal.SIGWINCH
"""The mount ignores the others that have no meaning of their own."""
SIZE = 64 << 20
"""Bytes of the file that is read: large enough for read-ahead."""
QUIET = 1.0
"""Seconds after which nothing is under way any more."""


class Recorder:
    """In the daemon: which functions of ours are entered while recording is on, in all threads. The first
    recording, while nothing is asked, finds what runs by itself: later ones leave that out, and what it
    calls."""

    def __init__(self, package: str, out: Path) -> None:
        self._package, self._out = package, out
        self._on = False
        self._background: set[str] | None = None
        """The outermost functions of the first recording; None before it has ended."""
        self._roots: set[str] = set()
        self._all: set[str] = set()
        self._before_answer: set[str] | None = None
        """Those of `_all` that were entered before the first READ was answered."""
        self._reads: dict[int, set[str]] = {}

    def toggle(self, _number: int, _frame: FrameType | None) -> None:
        self._on = not self._on
        if not self._on:
            reads = sorted(map(sorted, self._reads.values()), key=len)
            fresh = self._out.with_suffix(".new")
            answered = sorted(self._before_answer or ())
            fresh.write_text(json.dumps({"all": sorted(self._all), "answered": answered, "reads": reads}))
            fresh.replace(self._out)
            if self._background is None:
                self._background = set(self._roots)
            self._all, self._before_answer, self._reads = set(), None, {}

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if not self._on or event != "call" or not frame.f_code.co_filename.startswith(self._package):
            return
        name = root = self._name(frame.f_code)
        above: FrameType | None = frame
        read = 0
        while above is not None and above.f_code.co_name != "unrolled_run":  # trio's loop
            if above.f_code.co_filename.startswith(self._package):
                root = self._name(above.f_code)
            if root == "fuse/operations.py:Operations.read":
                read = id(above)
            above = above.f_back
        self._roots.add(root)
        if self._background is None or root not in self._background:
            self._all.add(name)
            if read:
                self._reads.setdefault(read, set()).add(name)
            caller = frame.f_back
            if name == "structures.py:Histogram.add" and caller and caller.f_code.co_name == "_call":
                self._before_answer = self._before_answer or set(self._all)  # what `_call` does at its end

    def _name(self, code: CodeType) -> str:
        return f"{code.co_filename.removeprefix(self._package)}:{code.co_qualname}"


def daemon(out: str, arguments: list[str]) -> int:
    """Runs `ipfsfuse ARGUMENTS` under the recorder. Each signal TOGGLE begins or ends a recording."""
    import ipfsfuse
    from ipfsfuse import process
    from ipfsfuse.cache.store import recovery
    from ipfsfuse.cli.main import main as run

    recovery.MEASURE_SECONDS = float("inf")  # the look at the disk's free space belongs to no READ
    process.short_collections = nullcontext  # nor do passes of the garbage collector, which call it back
    recorder = Recorder(str(Path(ipfsfuse.__file__).parent) + os.sep, Path(out))
    signal.signal(TOGGLE, recorder.toggle)
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    return run(arguments)


def recorded(pid: int, out: Path, action: object) -> dict[str, list[object]]:
    """What the daemon entered while `action` ran, and until nothing was under way any more."""
    out.unlink(missing_ok=True)
    os.kill(pid, TOGGLE)
    time.sleep(0.2)
    assert callable(action)
    action()
    time.sleep(QUIET)
    os.kill(pid, TOGGLE)
    wait_until(out.exists, "the recording was written")
    found: dict[str, list[object]] = json.loads(out.read_text())
    return found


def read_slowly(file: int) -> None:
    """16 MiB, so slowly that all of it was fetched ahead: one read in 4 MiB then reaches Python."""
    for _ in range(16):
        os.read(file, 1 << 20)
        time.sleep(0.05)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--names", action="store_true", help="print the names of the functions too")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, Node() as node:
        (data := Path(folder) / "data").write_bytes(os.urandom(SIZE))
        cid = node.cmd("add", "-Q", "--raw-leaves", "--cid-version=1", "--chunker=size-1048576", data)
        home, out = Home(Path(folder) / "home"), Path(folder) / "calls.json"
        code = (
            "import sys; from scripts.benches.calls import daemon; sys.exit(daemon(sys.argv[1], "
            "sys.argv[2:]))"
        )
        mount = ["mount", "--foreground", "--unconfined", "--from", node.gateway_url, str(home.mountpoint)]
        process = subprocess.Popen([sys.executable, "-c", code, str(out), *mount], env=home.env)
        try:
            wait_until(home.mountpoint.is_mount, "mounted")
            with open(home.mountpoint / cid, "rb", buffering=0) as file:
                time.sleep(QUIET)
                recorded(process.pid, out, lambda: time.sleep(QUIET))
                cold = recorded(process.pid, out, lambda: os.pread(file.fileno(), 4096, 0))
                for _ in range(24):
                    file.read(1 << 20)
                time.sleep(QUIET)
                ahead = recorded(process.pid, out, lambda: read_slowly(file.fileno()))
        finally:
            process.terminate()
            process.wait()
    fetched_ahead = ahead["reads"][0] if ahead["reads"] else []
    assert isinstance(fetched_ahead, list)
    counts = {
        "cold": len(cold["all"]),
        "cold_before_answer": len(cold["answered"]),
        "fetched_ahead": len(fetched_ahead),
    }
    if arguments.json:
        functions = {"cold_functions": cold["all"], "fetched_ahead_functions": fetched_ahead}
        print(json.dumps({**counts, **functions}, indent=2))
        return 0
    print(
        f"a cold READ from a gateway enters {counts['cold']} functions, {counts['cold_before_answer']} of "
        f"them before its answer; one fetched ahead {counts['fetched_ahead']}"
    )
    if arguments.names:
        print("\n".join(["cold:", *map(str, cold["all"]), "fetched ahead:", *fetched_ahead]))
    return 0
