"""Makes components of preview 2 with the tools that people use: componentize-py from PyPI, and the parts of
jco from npm. A test that needs a tool is skipped, with the reason, if the tool can't be downloaded
(registries.py)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runner.registries import from_npm, from_pypi

COMPONENTIZE_PY, JCO, WIT = "0.25.1", "1.35.0", "0.2.12"
_JCO_PARTS = {"jco-transpile": "0.15.0", "preview2-shim": "0.26.1", "jco-node-fs": "0.3.2"}
"""The parts of jco that make a component from a module. The rest of jco is hundreds of megabytes."""
_NEW = """
import { readFile, writeFile } from "node:fs/promises";
import { componentNew } from "@bytecodealliance/jco-transpile/wasm-tools";
const [module, adapter, made] = process.argv.slice(2);
await writeFile(made, await componentNew(await readFile(module), [["wasi_snapshot_preview1", await readFile(adapter)]]));
"""
"""What `jco new --wasi-command` does."""


class Jco:
    """The parts of jco that the tests need, below `folder`."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("node") is None:
            pytest.skip("jco needs node, which is not installed")
        folder.mkdir()
        self._folder = folder
        self._own = from_npm(f"@bytecodealliance/jco@{JCO}", folder / "jco") / "lib"
        self.wit = self._own / "wit" / "builtin" / WIT
        """WASI's interfaces, a folder for each package."""

    def component(self, module: Path) -> Path:
        """Makes a component from a preview 1 command, with jco's adapter."""
        scope = self._folder / "node_modules" / "@bytecodealliance"
        if not scope.exists():
            scope.mkdir(parents=True)
            for name, version in _JCO_PARTS.items():
                (scope / name).symlink_to(
                    from_npm(f"@bytecodealliance/{name}@{version}", self._folder / name)
                )
        script, target = self._folder / "new.mjs", module.with_name(f"{module.stem}-p2.wasm")
        script.write_text(_NEW)
        # without --preserve-symlinks, node would resolve the symlinks, and not find the other packages
        command = [
            "node",
            "--preserve-symlinks",
            script,
            module,
            self._own / "wasi_snapshot_preview1.command.wasm",
            target,
        ]
        subprocess.run(command, check=True, cwd=self._folder)
        return target


def componentized(source: Path, wit: Path, folder: Path) -> Path:
    """Makes a component from the Python module `source`, which implements the world wasi:cli/command."""
    tool = from_pypi(f"componentize-py=={COMPONENTIZE_PY}", folder)
    worlds = [
        f"--wit-path={wit}/wasi-{name}" for name in ("io", "clocks", "random", "filesystem", "sockets", "cli")
    ]
    app, target = folder / "app", folder / f"{source.stem}.wasm"
    app.mkdir()
    shutil.copy(source, app)
    command = [
        sys.executable,
        "-c",
        "from componentize_py import script; script()",
        "--quiet",
        *worlds,
        f"--world=wasi:cli/command@{WIT}",
    ]
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | {
        "PYTHONPATH": str(tool)
    }
    subprocess.run(
        [*command, "componentize", source.stem, f"--python-path={app}", f"--output={target}"],
        check=True,
        env=env,
        cwd=folder,
    )
    return target
