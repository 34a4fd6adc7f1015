"""The progress line on a terminal while a guest is read and compiled."""

import contextlib
import os
import pty
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.benches._guests import large
from tests.runner.conftest import TOP, Runner


def on_terminal(command: Sequence[str], env: dict[str, str], meanwhile: Callable[[], object]) -> bytes:
    """Runs the command with a terminal as its standard error, and returns what it writes there. `meanwhile`
    is called after its first output."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(command, env=env, cwd=TOP, stdin=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        output = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(controller, 4096):
                if not output:
                    meanwhile()
                output += data
    os.close(controller)
    assert process.returncode == 0, output
    return output


def test_a_terminal_shows_what_a_slow_start_waits_for(run: Runner, tmp_path: Path) -> None:
    """The line is erased before the guest begins."""
    guest, pipe = tmp_path / "guest.wat", tmp_path / "pipe.wat"
    guest.write_text('(module (func (export "_start")))')
    os.mkfifo(pipe)

    output = on_terminal(run.command(pipe), run.env, lambda: pipe.write_bytes(guest.read_bytes()))
    assert re.search(rb"ipfsfuse-run: reading for \d+ s: /", output), output
    assert re.search(rb"\r +\r$", output), output


def test_a_terminal_shows_a_long_compilation(run: Runner, tmp_path: Path) -> None:
    for size in (2 << 20, 8 << 20, 32 << 20):  # how long that takes depends on the machine
        guest = tmp_path / f"{size}.wasm"
        guest.write_bytes(large(size))
        if output := on_terminal(run.command(guest), run.env, lambda: None):
            break
    assert re.search(rb"ipfsfuse-run: compiling for \d+ s: /", output), output
    assert re.search(rb"\r +\r$", output), output
    assert on_terminal(run.command(guest), run.env, lambda: None) == b""
