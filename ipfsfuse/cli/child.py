"""This program as a child process: how it is started, and what a daemon tells the process that started it.

The daemon writes lines to a pipe: while the index of a CAR file is built, `progress {"done": ..., "total":
..., "what": ...}`, then `ok {"mount": ..., "notes": [...]}` when the mount answers, or `error REASON`.
"""

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ipfsfuse
from ipfsfuse.cli.console import ProgressBar

PROGRAM = (sys.executable, "-P", "-m", "ipfsfuse")
_OK, _ERROR, _PROGRESS = "ok ", "error ", "progress "
_WATCH_MS = 500


def environment() -> dict[str, str]:
    """Our environment, with the folder of this package in PYTHONPATH: a checkout need not be installed."""
    top = str(Path(ipfsfuse.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))}


class Mounted(NamedTuple):
    """What a daemon says when its mount answers."""

    mount: dict[str, Any]
    """What `ipfsfuse mount --json` prints."""
    notes: Sequence[str]
    """What else the user is told."""


def result(lines: BinaryIO) -> Mounted | str:
    """Shows the daemon's progress. Returns its result: why it failed, if it did, and "" if it ended without a
    result."""
    with ProgressBar("indexing") as show:
        for each in lines:
            line = each.decode(errors="surrogateescape").rstrip("\n")
            if line.startswith(_OK):
                return Mounted(**json.loads(line.removeprefix(_OK)))
            if not line.startswith(_PROGRESS):
                return line.removeprefix(_ERROR)
            show(**json.loads(line.removeprefix(_PROGRESS)))
    return ""


class Starter:
    """The process at the other end of the descriptor `fd`. It is watched until it gets the result."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reported = False
        os.set_inheritable(fd, False)
        threading.Thread(target=self._watch, daemon=True).start()

    def progress(self, values: Mapping[str, object]) -> None:
        """Sends progress before the result, from any thread."""
        with suppress(OSError):  # the starter has gone: `_watch` sees that
            os.write(self._fd, f"{_PROGRESS}{json.dumps(values)}\n".encode())

    def mounted(self, mount: Mapping[str, object], notes: Sequence[str]) -> None:
        """Sends the result."""
        self._report(_OK + json.dumps({"mount": mount, "notes": notes}))

    def failed(self, reason: str) -> None:
        """Sends the result, unless one was sent."""
        self._report(_ERROR + reason)

    def _report(self, line: str) -> None:
        if self._reported:
            return
        self._reported = True
        try:
            os.write(self._fd, line.encode(errors="surrogateescape") + b"\n")
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)
        os.close(self._fd)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)  # reports only that the other end was closed
        while not self._reported:
            if poll.poll(_WATCH_MS) and not self._reported:
                os.kill(os.getpid(), signal.SIGTERM)
                return
