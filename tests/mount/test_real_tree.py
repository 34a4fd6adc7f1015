"""A real tree: the standard library of the running Python."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import Sample
from tests.mounting import Home
from tests.realtree import copy_of_the_standard_library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sample]:
    folder = tmp_path_factory.mktemp("stdlib")
    copy = copy_of_the_standard_library(folder / "python")
    home = Home(folder)
    cid = home.add("-H", copy)
    with home.mounted() as mount:
        yield Sample(mount, copy, cid)


def test_the_standard_library_comes_out_as_it_went_in(library: Sample) -> None:
    assert sum(len(files) for _, _, files in os.walk(library.source)) > 500
    done = subprocess.run(
        ["diff", "-r", "--no-dereference", library.source, library.root], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_find_and_du_see_the_same_tree(library: Sample) -> None:
    def found(folder: Path) -> list[str]:
        shown = subprocess.run(
            ["find", ".", "-printf", "%P %y\n"], cwd=folder, capture_output=True, text=True, check=True
        )
        return sorted(shown.stdout.splitlines())

    assert found(library.root) == found(library.source)
    apparent = subprocess.run(
        ["du", "-sb", "--apparent-size", "."], cwd=library.root, capture_output=True, text=True, check=True
    )
    files = sum(path.stat().st_size for path in library.source.rglob("*") if path.is_file())
    assert int(apparent.stdout.split()[0]) == files


def test_python_runs_from_the_mount(library: Sample) -> None:
    script = "import json, sys; print(json.dumps({'from': json.__file__}))"
    env = {"PYTHONPATH": str(library.root), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(["python3", "-c", script], capture_output=True, text=True, env=env)
    assert str(library.root / "json" / "__init__.py") in done.stdout, done.stderr
