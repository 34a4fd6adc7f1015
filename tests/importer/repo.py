"""A Kubo repository without a daemon: enough for `ipfs add --only-hash`, `dag import` and `get`."""

import json
import os
import subprocess
from pathlib import Path

from tests.kubo.node import find_ipfs, keep_on_loopback


class Repo:
    """A new repository in `folder`, set to a UnixFS profile. It does not use the network."""

    def __init__(self, folder: Path, profile: str) -> None:
        program = find_ipfs()
        if program is None:
            raise FileNotFoundError("no ipfs program")
        self._program = program
        self._environment = os.environ | {"IPFS_PATH": str(folder), "IPFS_TELEMETRY": "off"}
        self.run("init", "--profile=test")
        config = json.loads((folder / "config").read_text())
        keep_on_loopback(config, 0, 0, 0)
        (folder / "config").write_text(json.dumps(config))
        self.run("config", "profile", "apply", profile)

    def run(self, *args: str | Path) -> str:
        """Runs `ipfs ARGS`. Returns its output. Raises RuntimeError with its error message."""
        return self.run_raw(*args).decode()

    def run_raw(self, *args: str | Path) -> bytes:
        done = subprocess.run([self._program, *args], env=self._environment, capture_output=True, timeout=600)
        if done.returncode:
            raise RuntimeError(
                f"ipfs {' '.join(map(str, args))}: {done.stderr.decode(errors='replace').strip()}"
            )
        return done.stdout
