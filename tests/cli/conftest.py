"""The command line, called in this process, with folders of the test's own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ipfsfuse.cli.main import main


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
