"""Without the packages of an extra the rest works, and a command that needs them says what to install."""

import errno
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.extras import EXTRAS
from tests.mounting import Home

BLOCKED = "import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"
"""A module that is None in sys.modules can't be imported or found."""
KECCAK = cids.text(b"\x01\x55\x1b\x20" + bytes(32))
"""A raw block with a keccak-256 hash."""


@pytest.fixture
def without(tmp_path: Path, user: Home) -> Home:
    """A user whose Python has none of the extras' packages."""
    modules = {module for _what, *names in EXTRAS.values() for module in names}
    (tmp_path / "sitecustomize.py").write_text(BLOCKED.format(modules=modules))
    user.env["PYTHONPATH"] = f"{tmp_path}:{os.getcwd()}:{os.getcwd()}/runner"
    return user


def run_module(user: Home, module: str, *words: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, env=user.env, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_missing_extra_gives_one_line_that_says_what_to_install(without: Home) -> None:
    guest = without.folder / "guest.wat"
    guest.write_text('(module (func (export "_start")))')
    for extra, module, words in (
        ("run", "ipfsfuse_run", [guest]),
        ("keccak", "ipfsfuse", ["cat", "--raw", KECCAK]),
        ("names", "ipfsfuse", ["mount", "--ipns", without.folder / "names", without.mountpoint]),
    ):
        (without.folder / "names").mkdir(exist_ok=True)
        code, line = run_module(without, module, *words)
        assert code == (125 if extra == "run" else 1), (extra, line)
        assert line.count("\n") == 1, line
        assert f"ipfsfuse with its extra [{extra}]" in line
        assert "pip install '" in line


def test_the_live_view_needs_rich(without: Home) -> None:
    """It needs a terminal and a mount too, but checks for rich first."""
    leader, follower = pty.openpty()
    try:
        command = [sys.executable, "-m", "ipfsfuse", "status", "--watch"]
        done = subprocess.run(
            command, env=without.env, stdin=follower, stdout=follower, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"the live view needs the package rich" in done.stderr


def test_help_and_receipts_of_the_runner_need_no_wasmtime(without: Home) -> None:
    assert run_module(without, "ipfsfuse_run", "--help") == (0, "")
    code, line = run_module(without, "ipfsfuse_run", "inspect", without.folder / "none.car")
    assert code == 1
    assert "wasmtime" not in line


@pytest.mark.fuse
def test_a_mount_without_any_extra_reads_and_refuses_keccak(without: Home) -> None:
    (without.folder / "f").write_text("hello")
    cid = without.add(without.folder / "f")
    with without.mounted() as mount:
        assert (mount.path / cid).read_text() == "hello"
        with pytest.raises(OSError) as refused:
            os.stat(mount.path / KECCAK)
        assert refused.value.errno == errno.ENOTSUP
        assert "pycryptodome" in without.run("logs").stdout
        assert (mount.path / cid).read_text() == "hello"
