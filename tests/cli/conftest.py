"""The command line with folders of the test's own: called in this process, or as a user runs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ipfsfuse.cli.main import main
from tests.mounting import Home, fuse_mounts


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Ipfsfuse = Callable[..., Ran]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the test's own; nothing of the user's is read or written."""
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "IPFSFUSE_CACHE_DIR", "IPFSFUSE_LIBRARY", "IPFSFUSE_TRACEBACK"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def ipfsfuse(home: Path, capfd: pytest.CaptureFixture[str]) -> Ipfsfuse:
    """Runs `ipfsfuse ARGUMENT...`."""

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def user(tmp_path: Path) -> Home:
    return Home(tmp_path)


def refused(user: Home, *arguments: str | Path, names: str | Path, code: int = 1, wrapper: tuple[str, ...] = ()) -> str:
    """Runs `ipfsfuse ARGUMENTS`, which must say why not in one line that holds `names`; that line."""
    command = [*wrapper, sys.executable, "-m", "ipfsfuse", *map(str, arguments)]
    ran = subprocess.run(command, env=user.env, capture_output=True, text=True, timeout=60)
    assert ran.stderr.startswith("ipfsfuse: "), ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "Traceback" not in ran.stderr
    assert str(names) in ran.stderr
    assert ran.returncode == code
    assert not fuse_mounts(user.folder)
    return ran.stderr
