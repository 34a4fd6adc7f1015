"""Faults that can't be caused from outside, so a real daemon is changed: a libfuse that takes no device, a
missing compiled part, a bug in a handler."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounting import Home, fuse_mounts, wait_until

NO_DEVICE = """
import pyfuse3
begun = pyfuse3.init
def init(operations, mountpoint, options):
    if mountpoint.startswith("/dev/fd/"):
        raise RuntimeError("fuse_session_mount failed")
    begun(operations, mountpoint, options)
pyfuse3.init = init
"""
GONE = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "ipfsfuse.fuse._native" else find(name, *more)
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
    """Runs a daemon in the foreground with `fault` in it. Yields its log."""
    log = home.folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", fault + RUN, str(home.mountpoint)], env=home.env, stdout=out, stderr=out
        )
        try:
            wait_until(
                lambda: '"mountpoint"' in log.read_text() or process.poll() is not None, "it is mounted"
            )
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


def test_a_mount_is_refused_in_one_line_if_libfuse_takes_no_device(home: Home, tree: str) -> None:
    command = [sys.executable, "-c", NO_DEVICE + RUN, str(home.mountpoint)]
    done = subprocess.run(command, env=home.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"ipfsfuse: {home.mountpoint} can't be served: this libfuse takes no device from outside"
    )
    assert done.stderr.count("\n") == 1
    assert fuse_mounts(home.folder) == []


def test_a_mount_is_refused_in_one_line_if_pyfuse3_was_imported_first(home: Home) -> None:
    command = [sys.executable, "-c", "import pyfuse3\n" + RUN, str(home.mountpoint)]
    done = subprocess.run(command, env=home.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"ipfsfuse: {home.mountpoint} can't be served: pyfuse3 was imported before ipfsfuse"
    )
    assert done.stderr.count("\n") == 1
    assert fuse_mounts(home.folder) == []


def test_a_mount_is_refused_in_one_line_if_the_compiled_part_is_missing(home: Home) -> None:
    command = [sys.executable, "-c", GONE + RUN, str(home.mountpoint)]
    done = subprocess.run(command, env=home.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "ipfsfuse: the compiled part ipfsfuse.fuse._native is missing: install ipfsfuse again"
    )
    assert done.stderr.count("\n") == 1


def test_a_bug_fails_one_call_with_eio_and_a_traceback_but_not_the_mount(home: Home, tree: str) -> None:
    with daemon(home, BUG) as log:
        with pytest.raises(OSError) as raised:
            os.readlink(home.mountpoint / tree / "link")
        assert raised.value.errno == errno.EIO
        assert (home.mountpoint / tree / "file").read_text() == "content\n"
        assert "ZeroDivisionError: a bug" in log.read_text()
