"""The sdist and the wheel: their files, and that they work as the checkout does."""

import ast
import ctypes
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

from ipfsfuse.extras import EXTRAS

TOP = Path(__file__).parents[2]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def unpacked(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    [sdist] = release.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    [top] = folder.iterdir()
    return top


@pytest.fixture(scope="session")
def wheel(release: Path) -> Path:
    [found] = release.glob("*.whl")
    return found


def test_the_sdist_has_every_file_of_the_checkout(release: Path, unpacked: Path) -> None:
    source = files(release.parent / "source")
    assert len(source) > 300
    assert {"packaging/deb/build", "tests/kubo/build"} <= source
    missing = {path for path in source if ".egg-info/" not in path} - files(unpacked)
    assert missing <= {".setup.lock"}
    modes = {path: os.stat(unpacked / path).st_mode & 0o777 for path in source & files(unpacked)}
    assert {path for path, mode in modes.items() if mode & 0o111} >= {
        "scripts/test",
        "scripts/setup",
        ".ci/run",
    }


def test_the_tests_of_the_sdist_pass(unpacked: Path, wheel: Path) -> None:
    """Runs some of them, with the compiled parts of the wheel that was built from the sdist. CI runs all."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [each for each in archive.namelist() if each.endswith(".so")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/dag/test_cid.py"]
    command += ["tests/test_semantics.py", "tests/test_security.py", "tests/fuse/test_init.py"]
    environment = {**os.environ, "PYTHONPATH": f"{unpacked}:{unpacked}/runner"}
    done = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_the_wheel_has_the_two_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ipfsfuse", "ipfsfuse_run"}
    installed = {name for name in names if name.endswith((".py", ".typed"))}
    expected = {str(path.relative_to(TOP)) for path in (TOP / "ipfsfuse").rglob("*.py")}
    expected |= {str(path.relative_to(TOP / "runner")) for path in (TOP / "runner").rglob("*.py")}
    assert installed == expected | {"ipfsfuse/py.typed", "ipfsfuse_run/py.typed"}


def test_one_wheel_serves_every_python(wheel: Path, tmp_path: Path) -> None:
    """PEP 425: cp311-abi3. Its libraries use only the stable ABI, so any newer Python loads them."""
    assert re.fullmatch(r"ipfsfuse-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        archive.extractall(tmp_path, libraries)
    assert sorted(libraries) == ["ipfsfuse/fileio/_native.abi3.so", "ipfsfuse/fuse/_native.abi3.so"]
    for library in libraries:
        symbols = subprocess.run(
            ["nm", "-D", "-u", tmp_path / library], capture_output=True, text=True, check=True
        )
        used = set(re.findall(r"\b_?Py\w+", symbols.stdout))
        assert used <= STABLE, library
        ctypes.CDLL(str(tmp_path / library))
    for newer in filter(shutil.which, ("python3.12", "python3.13", "python3.14")):
        if subprocess.run([newer, "-V"], capture_output=True, check=False).returncode:
            continue  # a command of pyenv for a version that is not installed
        script = "import ctypes, sys; [ctypes.CDLL(path) for path in sys.argv[1:]]"
        subprocess.run([newer, "-c", script, *(tmp_path / each for each in libraries)], check=True)


STABLE = {"PyBuffer_Release", "PyErr_Clear", "PyMem_Free", "PyMem_Malloc", "PyObject_GetBuffer"}
"""The functions that our C code calls, all in the stable ABI of Python 3.11 (its Misc/stable_abi.toml)."""


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_metadata_is_complete_and_its_links_are_absolute(metadata: Message) -> None:
    description = metadata.get_payload()
    assert isinstance(description, str)
    assert "# ipfsfuse" in description
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert [target for target in targets if not target.startswith("https://")] == []
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_extras_are_those_that_the_code_names(metadata: Message) -> None:
    assert set(metadata.get_all("Provides-Extra") or ()) == {*EXTRAS, "all"}
    needed = [each for each in metadata.get_all("Requires-Dist") or () if "extra ==" not in each]
    for heavy in ("wasmtime", "pycryptodome", "cryptography", "dnspython", "rich", "pytest"):
        assert not [each for each in needed if each.startswith(heavy)], heavy
    [runner] = [each for each in metadata.get_all("Requires-Dist") or () if each.startswith("wasmtime")]
    assert "<" in runner  # a new major version breaks the calls that we use


def imported(package: Path) -> set[str]:
    """The modules of others that a package imports, anywhere in its code."""
    found = set[str]()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    tops = {name.partition(".")[0] for name in found}
    return tops - sys.stdlib_module_names - {"ipfsfuse", "ipfsfuse_run"}


def test_the_dependencies_and_extras_are_what_the_code_imports() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    stated = chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {re.split(r"[\[<>=]", each)[0] for each in stated} - {"ipfsfuse"}
    modules = imported(TOP / "ipfsfuse") | imported(TOP / "runner" / "ipfsfuse_run")
    distributions = packages_distributions()
    assert {distributions[module][0].lower() for module in modules} == names


def test_dependencies_have_lower_bounds_and_test_tools_are_not_in_extras() -> None:
    """The test tools are in dependency groups."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())
    assert all(">=" in each for each in project["project"]["dependencies"])
    assert "pytest" in str(project["dependency-groups"]["test"])
    assert "pytest" not in str(project["project"]["optional-dependencies"])
