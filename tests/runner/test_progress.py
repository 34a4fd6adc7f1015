"""What a terminal is shown while a guest is read and compiled."""

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
    """What the command writes to a terminal that is its standard error. `meanwhile` is called when the first
    of it has come."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=env, cwd=TOP, stdin=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 4096):
                if not said:
                    meanwhile()
                said += data
    os.close(ours)
    assert process.returncode == 0, said
    return said


def test_a_terminal_shows_what_a_slow_start_waits_for(run: Runner, tmp_path: Path) -> None:
    """And nothing of it is left when the guest begins."""
    guest, pipe = tmp_path / "guest.wat", tmp_path / "pipe.wat"
    guest.write_text('(module (func (export "_start")))')
    os.mkfifo(pipe)

    said = on_terminal(run.command(pipe), run.env, lambda: pipe.write_bytes(guest.read_bytes()))
    assert re.search(rb"ipfsfuse-run: reading for \d+ s: /", said), said
    assert re.search(rb"\r +\r$", said), said


def test_a_terminal_shows_a_long_compilation(run: Runner, tmp_path: Path) -> None:
    for size in (2 << 20, 8 << 20, 32 << 20):  # how long that takes depends on the machine
        guest = tmp_path / f"{size}.wasm"
        guest.write_bytes(large(size))
        if said := on_terminal(run.command(guest), run.env, lambda: None):
            break
    assert re.search(rb"ipfsfuse-run: compiling for \d+ s: /", said), said
    assert re.search(rb"\r +\r$", said), said
    assert on_terminal(run.command(guest), run.env, lambda: None) == b""
