"""A mount whose daemon counts the requests that reach Python."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mounting import Home, wait_until

COUNTING = """
import json, os, sys
from ipfsfuse.fuse.operations import Operations
counted = open(os.environ["COUNTED"], "a", buffering=1)
def counting(name):
    handler = getattr(Operations, name)
    async def counted_handler(*arguments):
        counted.write(name + "\\n")
        return await handler(*arguments)
    setattr(Operations, name, counted_handler)
for name in ("lookup", "getattr", "opendir", "readdir", "open", "read"):
    counting(name)
"""
RUN = """
from ipfsfuse.cli.main import main
sys.exit(main(["mount", "--foreground", "--json", "--from", sys.argv[1], "--pins", sys.argv[3], sys.argv[2]]))
"""


class Counted:
    """The requests of the kernel that have reached Python so far."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def since(self, before: Counter[str]) -> Counter[str]:
        return self.now() - before

    def now(self) -> Counter[str]:
        return Counter(self._path.read_text().split())


@contextmanager
def counted(home: Home, source: str, fault: str = "", pins: str = "none") -> Iterator[Counted]:
    """A mount of `source` whose daemon counts its requests."""
    path = home.folder / "counted"
    path.write_text("")
    output = home.folder / "told"
    command = [sys.executable, "-c", fault + COUNTING + RUN, source, str(home.mountpoint), pins]
    with output.open("w") as out:
        daemon = subprocess.Popen(command, env={**home.env, "COUNTED": str(path)}, stdout=out, stderr=out)
        try:
            wait_until(
                lambda: '"mountpoint"' in output.read_text() or daemon.poll() is not None,
                "the daemon has mounted",
            )
            assert daemon.poll() is None, output.read_text()
            yield Counted(path)
        finally:
            daemon.terminate()
            daemon.wait(60)
