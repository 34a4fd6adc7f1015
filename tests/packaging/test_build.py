"""Installing from source: the parts in C are required."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


def test_an_installation_that_can_not_compile_fails_and_names_what_it_needs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        TOP,
        source,
        ignore=shutil.ignore_patterns(".*", "tests", "build", "*.egg-info", "*.so", "__pycache__"),
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--disable-pip-version-check",
        "-w",
        tmp_path / "wheels",
        source,
    ]
    done = subprocess.run(command, env=os.environ | {"CC": "/bin/false"}, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if "No matching distribution found for setuptools" in output:
        pytest.skip("no package index can be reached, and pip needs one to build")
    assert done.returncode != 0
    assert not (tmp_path / "wheels").exists() or not list((tmp_path / "wheels").iterdir())
    (line,) = [line for line in output.splitlines() if "ipfsfuse can't be installed" in line]
    assert "libfuse3-dev" in line
    assert "Traceback" not in output


def test_the_stamp_of_setup_covers_every_c_file() -> None:
    """scripts/setup builds if its stamp has changed, so the stamp must change with every C file."""
    stamped = next(
        line for line in (TOP / "scripts" / "setup").read_text().splitlines() if line.startswith("stamp() ")
    )
    patterns = [word for word in stamped.split() if word.startswith("ipfsfuse/")]
    found = {path for pattern in patterns for path in TOP.glob(pattern.rstrip(";"))}
    assert found == set((TOP / "ipfsfuse").rglob("*.[ch]"))
