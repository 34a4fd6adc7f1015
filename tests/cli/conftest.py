"""The command line with folders of the test's own: called in this process, or as a user runs it."""

import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ipfsfuse.cli.main import main
from tests.mounting import PATIENCE, Home


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Ipfsfuse = Callable[..., Ran]


@pytest.fixture
def user(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def home(user: Home, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the home folder of `user` that of this process. Unsets all variables that name other places."""
    for variable in ({*os.environ} - {*user.env}) | {"IPFSFUSE_CACHE_DIR", "IPFSFUSE_LIBRARY"}:
        monkeypatch.delenv(variable, raising=False)
    for variable in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, user.env[variable])
    return user.folder


@pytest.fixture
def ipfsfuse(home: Path, capfd: pytest.CaptureFixture[str]) -> Ipfsfuse:
    """Runs `ipfsfuse ARGUMENT...`."""

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


def on_terminal(user: Home, *arguments: str | Path) -> str:
    """Runs `ipfsfuse ARGUMENTS` with a terminal as its standard error. Returns the text on that terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    try:
        command = [sys.executable, "-m", "ipfsfuse", *map(str, arguments)]
        subprocess.run(
            command, env=user.env, stdout=subprocess.DEVNULL, stderr=follower, timeout=PATIENCE, check=True
        )
        os.write(follower, b"\n")  # so that there is always something to read
        return os.read(leader, 1 << 16).decode()
    finally:
        os.close(leader)
        os.close(follower)
