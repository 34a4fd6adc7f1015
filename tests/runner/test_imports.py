"""Modules that a plain run does not import, because each of them delays the start of a guest."""

import os
import subprocess
import sys

from tests.runner.conftest import TOP

HEAVY = {"trio", "httpx", "pyfuse3", "multiformats", "urllib3", "ipfsfuse.dag.cid", "asyncio"}
FOR_OTHERS = {"wasmtime", "subprocess", "tempfile", "socket", "wasmtime.component", "inspect", "threading"}
"""Modules that are needed only to start a mount or to run a component."""
SLOW = {"shutil", "platform", "datetime", "lzma", "email", "logging", "pathlib", "urllib", "fnmatch"}


def test_a_plain_run_imports_no_codec_and_no_mount() -> None:
    assert not (HEAVY | FOR_OTHERS | SLOW) & _loaded("ipfsfuse_run.execute")


def test_a_run_on_a_live_mount_imports_nothing_that_starts_one() -> None:
    loaded = _loaded("ipfsfuse_run.execute, ipfsfuse_run.mounts, ipfsfuse_run.command")
    assert not (HEAVY | FOR_OTHERS | SLOW) - {"socket"} & loaded


def _loaded(modules: str) -> set[str]:
    code = f"import sys, ipfsfuse_run.cli, {modules}; ipfsfuse_run.options.parse(['x']); print(*sys.modules)"
    done = subprocess.run(
        # -S: the hook that makes a checkout importable imports pathlib
        [sys.executable, "-S", "-c", code],
        cwd=TOP,
        env={**os.environ, "PYTHONPATH": f"{TOP}:{TOP / 'runner'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())
