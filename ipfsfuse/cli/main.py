"""`ipfsfuse`: one command, one exit code, and one line on standard error for everything that goes wrong."""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from ipfsfuse.cli import parser
from ipfsfuse.errors import IpfsFuseError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code: 0, 1 it failed, 2 usage, 130 interrupted, 141 nobody reads what it prints."""
    try:
        arguments = parser.parse(argv)
        module, function = arguments.run.split(":")
        code: int = getattr(import_module(f"ipfsfuse.cli.{module}"), function)(arguments)
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:
        if "IPFSFUSE_TRACEBACK" in os.environ:
            raise
        return _ended_by(exc)


def _ended_by(exc: BaseException) -> int:
    """Says why, and gives the exit code."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]  # a nursery's wrapping
    if isinstance(exc, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(exc, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no complaint from the interpreter's last flush
        return 128 + signal.SIGPIPE
    if isinstance(exc, IpfsFuseError):
        said = str(exc)
    elif isinstance(exc, OSError):
        said = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else str(exc)
    else:
        said = f"an error that nobody foresaw, {type(exc).__name__}: {exc} (IPFSFUSE_TRACEBACK=1 shows where)"
    print("ipfsfuse:", " ".join(said.splitlines()), file=sys.stderr)
    return 2 if isinstance(exc, UsageError) else 1
