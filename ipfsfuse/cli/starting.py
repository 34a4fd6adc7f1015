"""`ipfsfuse mount`: starts the daemon, and waits until it has mounted.

The daemon is this program in a new session (`--foreground --ready-fd N`). The daemon makes all checks.
This process imports little, because the daemon starts only after that.
"""

import argparse
import os
import signal
import subprocess
import tempfile
from typing import BinaryIO

from ipfsfuse.cli import console
from ipfsfuse.cli.child import PROGRAM, Mounted, Starter, environment, result
from ipfsfuse.errors import FolderInUse, MountFailed, UsageError


def run(arguments: argparse.Namespace) -> int:
    if arguments.all == (arguments.mountpoint is not None):
        raise UsageError("mount takes one MOUNTPOINT or NAME, or --all")
    if arguments.all:
        from ipfsfuse.cli import mounting

        return mounting.mount_all(arguments)
    if arguments.foreground:
        _run_daemon(arguments)
        return 0
    mounted = _start_daemon(arguments.argv)
    for note in mounted.notes:
        console.note(f"ipfsfuse: {note}")
    if arguments.json:
        console.values(mounted.mount, indent=None)
    return 0


def _start_daemon(argv: list[str]) -> Mounted:
    """Starts the daemon and waits for its result. Raises MountFailed, FolderInUse or UsageError with the
    daemon's reason."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output, open(reading, "rb") as line_from:
        at = argv.index("mount")
        ready = ["--foreground", "--ready-fd", str(writing)]
        command = [*PROGRAM, *argv[: at + 1], *ready, *argv[at + 1 :]]
        try:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writing],
                start_new_session=True,
                env=environment(),
            )
        finally:
            os.close(writing)
        try:
            answer = result(line_from)
        except KeyboardInterrupt:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
            raise
        if isinstance(answer, Mounted):
            daemon.returncode = 0  # it goes on without us: Popen must not wait for it
            return answer
        code = daemon.wait()
        reason = answer or _last_lines(output, code)
        raise {2: UsageError, os.EX_TEMPFAIL: FolderInUse}.get(code, MountFailed)(reason)


def _last_lines(output: BinaryIO, code: int) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    ending = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the mount {ending} before it was ready" + (f": {lines[-1]}" if lines else "")


# -- in the daemon -------------------------------------------------------------------------------------------


def _run_daemon(arguments: argparse.Namespace) -> None:
    starter = None if arguments.ready_fd is None else Starter(arguments.ready_fd)
    try:
        from ipfsfuse.cli import mounting

        mounting.run_daemon(arguments, starter)
    except BaseException as exc:
        if starter is not None:
            starter.failed(console.one_line(console.unwrapped(exc)))
        raise
