"""The files of a release, built once from a copy of the checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import Home

TOP = Path(__file__).parents[2]
_GENERATED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "*.egg-info", "*.so", "__pycache__", "*.pyc"
)


def not_source(folder: str, names: list[str]) -> set[str]:
    """The names that a copy of the checkout leaves out. Below the top folder, `build` is a script."""
    top = {"build", "dist"} if Path(folder) == TOP else set()
    return _GENERATED(folder, names) | top


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(TOP, folder / "source", ignore=not_source)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        folder / "dist",
        folder / "source",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.fixture
def user(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")
