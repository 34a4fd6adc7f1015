"""Programs of other projects, downloaded by the registries' own clients, which cache them. A test that needs
one is skipped, with the reason, if the client is not installed or can't download the package."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

_PATIENCE_S = 300


def from_pypi(package: str, folder: Path) -> Path:
    """The files of a wheel, below `folder`. `package` is NAME==VERSION."""
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
    """The files of an npm package. `package` is NAME@VERSION."""
    _fetch(["pack", "--silent", package], "npm", package, folder)
    (packed,) = folder.glob("*.tgz")
    subprocess.run(["tar", "-xzf", packed.name], cwd=folder, check=True)
    return folder / "package"


def from_debian(package: str, folder: Path) -> Path:
    """The files of a Debian package, which is not installed."""
    _fetch(["download", package], "apt-get", package, folder)
    (packed,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "--extract", packed, folder], check=True)
    return folder


def _fetch(args: Sequence[str], client: str, package: str, folder: Path) -> None:
    folder.mkdir()
    if shutil.which(client) is None:
        pytest.skip(f"{package}: {client} is not installed")
    done = subprocess.run([client, *args], cwd=folder, capture_output=True, text=True, timeout=_PATIENCE_S)
    if done.returncode:
        pytest.skip(f"{package} can't be downloaded: {done.stderr.strip().rpartition(chr(10))[2]}")
