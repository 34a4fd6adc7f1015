"""`ipfsfuse-run`: the command line to one run, and its end to an exit code."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse_run import messages, signals
from ipfsfuse_run import options as parsing
from ipfsfuse_run.errors import COULD_NOT_RUN


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Leaves by the guest's exit code, 125 where it could not be run, 2 for usage; by a
    signal where one ended it."""
    signals.raise_ended()
    given = sys.argv[1:] if argv is None else argv
    try:
        code = _main(given)
    except IpfsFuseError as exc:
        messages.say(exc)
        code = 2 if isinstance(exc, UsageError) else 1 if given[:1] == ["inspect"] else COULD_NOT_RUN
    except signals.Ended as exc:
        code = -exc.number
    if code < 0:
        signals.leave_by(-code)
    sys.exit(code)


def _main(argv: Sequence[str]) -> int:
    """An exit code, or a signal's number below 0. What takes long to import is imported for whom it
    serves."""
    if argv and argv[0] == "inspect":
        from ipfsfuse_run import inspecting

        return inspecting.main(argv[1:])
    options = parsing.parse(argv)
    if options.replay is not None:
        from ipfsfuse_run import replay

        return replay.replay(Path(options.replay), options.limits)
    from ipfsfuse_run import run

    return run.run(options)
