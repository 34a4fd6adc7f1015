"""The ways to read the same data: a folder, this mount as root and as a user, Kubo's own mount, and rclone on
Kubo's gateway.

Each cold run starts with a new mount without a cache, and with an empty page cache.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ipfsfuse import client
from scripts.benches import _jobs
from scripts.benches._jobs import Prefix
from tests.kubo.node import Node
from tests.mounting import NOBODY, Home, Mounted, command_of, wait_until

EMPTY = "bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354"
"""The empty directory: what every node has. Kubo's mount has been talking to its node, too."""
TICKS = os.sysconf("SC_CLK_TCK")


def drop_caches(which: int = 3) -> None:
    """Page cache (1), inodes and names (2). Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text(str(which))


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Way:
    """A folder, as it is."""

    prefix: Prefix = ()
    pid = 0
    """CPU seconds of the process that answers; 0 if that is the kernel."""

    def __init__(self, name: str, paths: dict[str, Path]) -> None:
        self.name = name
        self._paths = paths

    def path(self, data: str, below: str) -> Path:
        return self._paths[data] / below

    def cold(self) -> None:
        drop_caches()

    def settle(self, path: Path) -> None:
        """Waits until the work after the first reader is done, before a warm run is timed."""

    def close(self) -> None:
        pass


class Ours(Way):
    """A mount of ours, from one source; `user` for the mount of someone who is not root (whose node it is all
    the same)."""

    def __init__(
        self,
        name: str,
        source: str,
        folder: Path,
        cids: dict[str, str],
        places: dict[str, str],
        user: bool = False,
        options: tuple[str, ...] = (),
    ) -> None:
        """`places`: what its environment says about the library and the node's repository."""
        super().__init__(name, {})
        self._source, self._cids, self._options = source, cids, options
        self.prefix = tuple(command_of(NOBODY)) if user else ()
        self._home = Home(folder)
        self._home.env |= places
        if user:
            for path in (folder, self._home.mountpoint):
                os.chown(path, NOBODY, NOBODY)
        self.mount: Mounted | None = None

    def path(self, data: str, below: str) -> Path:
        return self._home.mountpoint / self._cids[data] / below

    def cold(self) -> None:
        self.close()
        shutil.rmtree(self._home.cache, ignore_errors=True)
        self.mount = self._mounted()
        self.pid = self.mount.pid
        # connects to the node
        subprocess.run(
            [*self.prefix, "stat", str(self._home.mountpoint / EMPTY)], check=False, capture_output=True
        )
        drop_caches()

    def _mounted(self) -> Mounted:
        command = [
            *self.prefix,
            sys.executable,
            "-m",
            "ipfsfuse",
            "mount",
            "--json",
            "--from",
            self._source,
            "--budget",
            "20GiB",
            "--pins",
            "none",
            *self._options,
        ]
        done = subprocess.run(
            [*command, str(self._home.mountpoint)], env=self._home.env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"scripts/bench: the way {self.name} can't be mounted: {done.stderr.strip()}")
        return _mount_of(done.stdout, self._home)

    def settle(self, path: Path) -> None:
        """With --passthrough the file is read whole once, and then verified whole."""
        if self.mount is None or "--passthrough" not in self._options:
            return
        _jobs.read(self.prefix, path)
        control = self.mount.control
        wait_until(
            lambda: (
                (state := client.call(control, "status")["passthrough"])["verified"] and not state["waiting"]
            ),
            "it is verified",
        )

    def close(self) -> None:
        if self.mount is not None:
            self._home.unmount(self.mount)
            self.mount = None


def _mount_of(told: str, home: Home) -> Mounted:
    answer: dict[str, Any] = json.loads(told)
    return Mounted(Path(answer["mountpoint"]), answer["pid"], Path(answer["control"]), home)


class KuboMount(Way):
    """`ipfs mount` of the node."""

    def __init__(self, name: str, node: Node, cids: dict[str, str], folder: Path) -> None:
        super().__init__(name, {})
        self._node, self._cids = node, cids
        self._points = [folder / part for part in ("ipfs", "ipns", "mfs")]
        for point in self._points:
            point.mkdir(parents=True)
        node.cmd("mount", "-f", self._points[0], "-n", self._points[1], "-m", self._points[2])
        assert node.process is not None
        self.pid = node.process.pid

    def path(self, data: str, below: str) -> Path:
        return self._points[0] / self._cids[data] / below

    def close(self) -> None:
        for point in self._points:
            subprocess.run(["umount", str(point)], check=False, capture_output=True)


class Rclone(Way):
    """`rclone mount` of a directory at the node's gateway. It verifies nothing."""

    def __init__(self, name: str, node: Node, cids: dict[str, str], folder: Path) -> None:
        super().__init__(name, {})
        self._node, self._cids, self._point = node, cids, folder / "rclone"
        self._point.mkdir(parents=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._data = ""

    def path(self, data: str, below: str) -> Path:
        if data != self._data:
            self.close()
            url = f"{self._node.gateway_url}/ipfs/{self._cids[data]}/"
            command = [
                "rclone",
                "mount",
                ":http:",
                str(self._point),
                "--http-url",
                url,
                "--read-only",
                "--config",
                "/dev/null",
            ]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self._data, self.pid = data, self._process.pid
            wait_until(self._point.is_mount, "rclone mounted")
        return self._point / below

    def close(self) -> None:
        if self._process is not None:
            subprocess.run(["fusermount3", "-u", "-q", str(self._point)], check=False)
            self._process.wait()
            self._process, self._data, self.pid = None, "", 0
