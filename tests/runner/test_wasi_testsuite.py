"""The preview 1 cases of WebAssembly/wasi-testsuite. The variable WASI_TESTSUITE names a checkout of its
branch prod/testsuite-base, which has the compiled cases."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mounting import Home
from tests.runner.conftest import Runner

SUITE = os.environ.get("WASI_TESTSUITE")
DEVIATIONS = {
    "sock_shutdown-invalid_fd": "it expects descriptor 3 to be closed, but here it is the guest's /"
}


def _cases() -> list[Any]:
    """Each module of the suite with each engine."""
    if SUITE is None:
        skip = pytest.mark.skip(reason="WASI_TESTSUITE does not name a checkout of wasi-testsuite")
        return [pytest.param(Path(), "", marks=skip)]
    found = sorted(Path(SUITE).glob("tests/*/testsuite/wasm32-wasip1/*.wasm"))
    assert len(found) > 60, f"{SUITE} has no compiled cases: check out the branch prod/testsuite-base"
    return [
        pytest.param(
            module,
            engine,
            id=f"{module.stem}-{engine}",
            marks=[pytest.mark.xfail(reason=DEVIATIONS[module.stem], strict=True)]
            if module.stem in DEVIATIONS
            else [],
        )
        for engine in ("library", "command")
        for module in found
    ]


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory, wasmtime: Path) -> Iterator[Runner]:
    """A runner with a live mount. The command engine runs guests only on a mount."""
    home = Home(tmp_path_factory.mktemp("home"))
    path = f"{wasmtime}{os.pathsep}{home.env['PATH']}"
    with home.mounted("--offline"):
        yield Runner({**home.env, "XDG_CACHE_HOME": str(home.folder / "xdg"), "PATH": path})


@pytest.mark.fuse
@pytest.mark.parametrize(("module", "engine"), _cases())
def test_case(module: Path, engine: str, mounted: Runner, tmp_path: Path) -> None:
    expected = module.with_suffix(".json")
    case = json.loads(expected.read_text()) if expected.exists() else {}
    options = [f"--env={name}={value}" for name, value in case.get("env", {}).items()]
    if "root" in case:
        root = tmp_path / "root"
        shutil.copytree(module.parent / case["root"], root, symlinks=True)
        options.append(f"--dir={root}::/")
    done = mounted("--engine", engine, *options, module, *case.get("args", []))
    assert done.returncode == case.get("exit_code", 0), done
    for stream, output in (("stdout", done.stdout), ("stderr", done.stderr)):
        assert case.get(stream) in (None, output.decode())
