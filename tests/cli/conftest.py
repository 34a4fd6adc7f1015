"""The command line with folders of the test's own: called in this process, or as a user runs it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ipfsfuse.cli.main import main
from tests.mounting import Home


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
    """The home folder of `user` as this process's own, and no variable that names other places."""
    for variable in ({*os.environ} - {*user.env}) | {"IPFSFUSE_CACHE_DIR", "IPFSFUSE_LIBRARY"}:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", user.env["HOME"])
    return user.folder


@pytest.fixture
def ipfsfuse(home: Path, capfd: pytest.CaptureFixture[str]) -> Ipfsfuse:
    """Runs `ipfsfuse ARGUMENT...`."""

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run
