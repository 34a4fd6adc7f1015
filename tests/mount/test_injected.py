"""Faults that can't be caused from outside, put into a real daemon: a libfuse that takes no device, a bug in a handler."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounting import Home, wait_until

NO_DEVICE = """
import pyfuse3
begun = pyfuse3.init
def init(operations, mountpoint, options):
    if mountpoint.startswith("/dev/fd/"):
        raise RuntimeError("fuse_session_mount failed")
    begun(operations, mountpoint, options)
pyfuse3.init = init
"""
BUG = """
from ipfsfuse.vfs.tree import Tree
async def readlink(self, cid):
    raise ZeroDivisionError("a bug")
Tree.readlink = readlink
"""
RUN = """
import sys
from ipfsfuse.cli.main import main
sys.exit(main(["mount", "--foreground", "--json", sys.argv[1]]))
"""


@contextmanager
def daemon(home: Home, fault: str) -> Iterator[Path]:
    """A daemon in the foreground with `fault` in it; yields its log."""
    log = home.folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", fault + RUN, str(home.mountpoint)], env=home.env, stdout=out, stderr=out)
        try:
            wait_until(lambda: '"mountpoint"' in log.read_text() or process.poll() is not None, "it is mounted")
            assert process.poll() is None, log.read_text()
            yield log
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def tree(home: Home) -> str:
    folder = home.folder / "tree"
    folder.mkdir()
    (folder / "file").write_text("content\n")
    (folder / "link").symlink_to("file")
    return home.add(folder)


def test_where_libfuse_takes_no_device_the_mount_is_a_plain_one_and_says_so(home: Home, tree: str) -> None:
    with daemon(home, NO_DEVICE) as log:
        assert (home.mountpoint / tree / "file").read_text() == "content\n"
        assert os.listdir(home.mountpoint) == [tree]
        with pytest.raises(PermissionError):
            (home.mountpoint / tree / "new").touch()
        assert "a plain mount, without parallel lookups" in log.read_text()


def test_a_bug_costs_one_call_eio_and_a_traceback_never_the_mount(home: Home, tree: str) -> None:
    with daemon(home, BUG) as log:
        with pytest.raises(OSError) as raised:
            os.readlink(home.mountpoint / tree / "link")
        assert raised.value.errno == errno.EIO
        assert (home.mountpoint / tree / "file").read_text() == "content\n"
        assert "ZeroDivisionError: a bug" in log.read_text()
