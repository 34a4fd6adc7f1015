"""`ipfsfuse-run`: the command line to one run, and its end to an exit code."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ipfsfuse.errors import IpfsFuseError, UsageError
from runner import options as parsing
from runner import signals


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Leaves by the guest's exit code, 1 for what failed, 2 for usage; by a signal where one ended it."""
    signals.raise_ended()
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
    except IpfsFuseError as exc:
        print(f"ipfsfuse-run: {exc}", file=sys.stderr)
        code = 2 if isinstance(exc, UsageError) else 1
    except signals.Ended as exc:
        code = -exc.number
    if code < 0:
        signals.leave_by(-code)
    sys.exit(code)


def _main(argv: Sequence[str]) -> int:
    """An exit code, or a signal's number below 0. What takes long to import is imported for whom it serves."""
    if argv and argv[0] == "inspect":
        from runner import inspecting

        return inspecting.main(argv[1:])
    options = parsing.parse(argv)
    if options.replay is not None:
        from runner import replay

        return replay.replay(Path(options.replay), options.limits)
    from runner import run

    return run.run(options)
