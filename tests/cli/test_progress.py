"""Progress: a bar on a terminal, plain lines elsewhere."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from ipfsfuse.cli import console
from ipfsfuse.cli.console import ProgressBar

SCRIPT = """
from ipfsfuse.cli.console import ProgressBar
with ProgressBar("fetching") as show:
    for done in range(0, 1025, 256):
        show(done << 20, 1 << 30, "a/b")
"""


def test_progress_in_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with ProgressBar("fetching") as show:
        show(3 << 20, 1 << 30)
        show(7, unit="blocks")
    assert capsys.readouterr() == ("", "fetching: 3.0 MiB of 1.0 GiB\nfetching: 7 blocks\n")


def test_quick_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("fetching") as show:
        show(1)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal() -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    subprocess.run([sys.executable, "-c", SCRIPT], stderr=follower, check=True)
    shown = os.read(leader, 1 << 16).decode()
    os.close(follower)
    os.close(leader)
    assert "fetching:" in shown
    assert "/1.00G" in shown
