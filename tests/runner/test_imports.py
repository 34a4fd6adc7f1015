"""What a plain run does not import, because a guest that starts often would wait for it."""

import subprocess
import sys

from tests.runner.conftest import TOP

HEAVY = {"trio", "httpx", "pyfuse3", "multiformats", "urllib3", "ipfsfuse.dag.cid", "asyncio"}
FOR_OTHERS = {"wasmtime", "subprocess", "tempfile", "socket", "wasmtime.component", "inspect", "threading"}
"""What starts a mount, or runs a component."""
SLOW = {"shutil", "platform", "datetime", "lzma", "email", "logging"}


def test_a_plain_run_imports_no_codec_and_no_mount() -> None:
    code = "import sys, ipfsfuse_run.cli, ipfsfuse_run.execute; ipfsfuse_run.options.parse(['x']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not (HEAVY | FOR_OTHERS | SLOW) & set(loaded)
