"""Real mounts for tests: a home for each test, the commands as a user runs them, and mounts that are removed
afterwards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
PATIENCE = 60
"""Seconds after which a command that should end is a failure. It is not a measure of speed."""


@dataclass
class Mounted:
    """A live mount."""

    path: Path
    pid: int
    control: Path
    home: "Home"

    def status(self) -> dict[str, Any]:
        return self.home.json("status", "--json")

    def peak_memory(self) -> int:
        """The most that the daemon ever had in memory, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    def log(self) -> str:
        return (self.control.parent / "log").read_text()


class Home:
    """Folders and environment of one imaginary user."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.store = self.cache / "ipfsfuse-cache"
        self.library = folder / "library"
        self.mountpoint = folder / "ipfs"
        self.mountpoint.mkdir(parents=True)
        self.runtime = folder.with_name(f"{folder.name}-runtime")
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        unset = ("IPFS", "XDG", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(unset)} | {
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "IPFS_PATH": str(folder / "no-node"),
            "IPFSFUSE_CACHE_DIR": str(self.cache),
            "IPFSFUSE_LIBRARY": str(self.library),
            "PYTHONPATH": os.getcwd(),
        }

    def run(
        self, *args: str | Path, check: bool = True, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Runs `ipfsfuse ARGS`; the output is text. `status` does not fail if a mount is degraded."""
        command = [sys.executable, "-m", "ipfsfuse", *map(str, args)]
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False, **options
        )
        if check and done.returncode and (args[0], done.returncode) != ("status", 3):
            raise AssertionError(
                f"ipfsfuse {' '.join(map(str, args))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def refused(
        self, *args: str | Path, names: str | Path, code: int = 1, wrapper: Sequence[str] = ()
    ) -> str:
        """Runs `ipfsfuse ARGS`, which must fail with one line that holds `names`, and leave no mount. Returns
        that line."""
        message = self.refused_while_mounted(*args, names=names, code=code, wrapper=wrapper)
        assert not fuse_mounts(self.folder)
        return message

    def refused_while_mounted(
        self, *args: str | Path, names: str | Path, code: int = 1, wrapper: Sequence[str] = ()
    ) -> str:
        """Like `refused`, but there may be mounts."""
        command = [*wrapper, sys.executable, "-m", "ipfsfuse", *map(str, args)]
        ran = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE)
        assert ran.stderr.startswith("ipfsfuse: "), ran.stderr
        assert ran.stderr.count("\n") == 1
        assert "Traceback" not in ran.stderr
        assert str(names) in ran.stderr
        assert ran.returncode == code
        return ran.stderr

    def json(self, *args: str | Path) -> Any:
        return json.loads(self.run(*args).stdout)

    def add(self, *args: str | Path) -> str:
        """Runs `ipfsfuse add`. Returns the last CID that it prints."""
        return self.run("add", "-Q", *args).stdout.split()[-1]

    @contextmanager
    def mounted(self, *options: str | Path, at: Path | None = None) -> Iterator[Mounted]:
        """Runs `ipfsfuse mount` in the background. The mount is unmounted at the end."""
        where = at or self.mountpoint
        if at is not None:
            at.mkdir(exist_ok=True)
        printed = self.json("mount", "--json", *options, where)
        mount = Mounted(Path(printed["mountpoint"]), printed["pid"], Path(printed["control"]), self)
        try:
            yield mount
        finally:
            self.unmount(mount)

    def unmount(self, mount: Mounted) -> None:
        """Unmounts, and waits until the daemon has ended. Ends the daemon if it goes on."""
        subprocess.run(["fusermount3", "-u", "-q", str(mount.path)], check=False, capture_output=True)
        if alive(mount.pid):
            # a copy of the mount in another mount namespace would keep it alive
            os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not alive(mount.pid), "the daemon ended")


def alive(pid: int) -> bool:
    """Whether the process still runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def open_device(test: Any) -> Any:
    """Marks a test in which an ordinary user mounts."""
    cannot = os.getuid() != 0 or shutil.which("setpriv") is None or not is_open_device()
    reason = "needs root (to become another user), setpriv, and a /dev/fuse that is open to all users"
    return pytest.mark.open_device(pytest.mark.skipif(cannot, reason=reason)(test))


WITH_OPEN_DEVICE = (
    'mount -t tmpfs none "$1" && mknod -m 666 "$1/fuse" c 10 229 && mount --bind "$1/fuse" /dev/fuse && '
    'shift && exec "$@"'
)


def pass_with_open_device(file: str) -> None:
    """Runs the tests of `file` that `open_device` marks, if only root may open /dev/fuse. They run in a mount
    namespace with another device."""
    if is_open_device():
        pytest.skip("/dev/fuse is open to all here: these tests run by themselves")
    if os.getuid() != 0:
        pytest.skip("needs root, for a mount namespace")
    with tempfile.TemporaryDirectory() as folder:
        device = Path(folder, "device")
        device.mkdir()
        inside = ["unshare", "--mount", "sh", "-c", WITH_OPEN_DEVICE, "sh", str(device)]
        if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
            pytest.skip("no device can be made here: this root lacks some rights of root")
        top = Path(__file__).parents[1]
        arguments = ["-q", "-p", "no:cacheprovider", "-m", "open_device", f"--rootdir={top}", file]
        done = subprocess.run(
            [*inside, sys.executable, "-m", "pytest", f"--basetemp={folder}/tests", *arguments],
            cwd=top,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[2-9] passed", done.stdout), done.stdout


def is_open_device() -> bool:
    """Whether every user may open /dev/fuse."""
    return os.path.exists("/dev/fuse") and os.stat("/dev/fuse").st_mode & 0o006 == 0o006


def command_of(user: int) -> list[str]:
    """Runs a command as an ordinary user, who may also read this environment's Python wherever it is."""
    caps = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *caps]


def wait_until(condition: Any, what: str, seconds: float = PATIENCE) -> None:
    """Waits until `condition` is true. `what` says in the failure what was expected."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def fuse_mounts(below: Path) -> list[str]:
    """The mountpoints of ipfsfuse below a folder, from the kernel's table."""
    lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    return [
        line.split()[4]
        for line in lines
        if "fuse.ipfsfuse" in line and line.split()[4].startswith(str(below))
    ]
