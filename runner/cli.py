"""`ipfsfuse-run`: the command line to one run, and its end to an exit code."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ipfsfuse.errors import IpfsFuseError, UsageError
from runner import options as parsing


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Leaves by the guest's exit code, 1 for what failed, 2 for usage; by a signal where one ended it."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
    except IpfsFuseError as exc:
        print(f"ipfsfuse-run: {exc}", file=sys.stderr)
        code = 2 if isinstance(exc, UsageError) else 1
    except KeyboardInterrupt:  # before the guest was there
        code = -signal.SIGINT
    if code < 0:
        _leave_by(-code)
    sys.exit(code)


def _main(argv: Sequence[str]) -> int:
    """An exit code, or a signal's number below 0."""
    options = parsing.parse(argv)
    from runner import run  # wasmtime takes 60 ms to import: not for --help and usage errors

    return run.run(options)


def _leave_by(number: int) -> NoReturn:
    """Ends this process by the signal that it was sent, as shells and scripts expect; 128 + its number if it is blocked."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
