"""Programs that no one here wrote, by the registries' own clients (which keep what they fetched). A test that
needs one skips, saying so, where the client or the package can't be had."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

_PATIENCE_S = 300


def from_pypi(package: str, folder: Path) -> Path:
    """A wheel's files, below `folder`. `package` is NAME==VERSION."""
    _fetch(
        ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", ".", package],
        sys.executable,
        package,
        folder,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def from_npm(package: str, folder: Path) -> Path:
    """A package's files. `package` is NAME@VERSION."""
    _fetch(["pack", "--silent", package], "npm", package, folder)
    (packed,) = folder.glob("*.tgz")
    subprocess.run(["tar", "-xzf", packed.name], cwd=folder, check=True)
    return folder / "package"


def from_debian(package: str, folder: Path) -> Path:
    """A Debian package's files, not installed."""
    _fetch(["download", package], "apt-get", package, folder)
    (packed,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "--extract", packed, folder], check=True)
    return folder


def _fetch(args: Sequence[str], client: str, package: str, folder: Path) -> None:
    folder.mkdir()
    if shutil.which(client) is None:
        pytest.skip(f"{package}: there is no {client} here")
    done = subprocess.run([client, *args], cwd=folder, capture_output=True, text=True, timeout=_PATIENCE_S)
    if done.returncode:
        pytest.skip(f"{package} can't be had: {done.stderr.strip().rpartition(chr(10))[2]}")
