"""`ipfsfuse-run`: the command line, and how a run's end becomes an exit code."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ipfsfuse import extras
from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse_run import options as parsing
from ipfsfuse_run import processes
from ipfsfuse_run.errors import COULD_NOT_RUN, NotKept, say, trap_text


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Exits with the guest's code, 125 if the guest could not be run, 2 for a usage error, or by the signal
    that ended the run."""
    _open_streams()
    processes.raise_on_signals()
    given = sys.argv[1:] if argv is None else argv
    try:
        code = _main(given)
    except IpfsFuseError as exc:
        say(exc)
        code = 2 if isinstance(exc, UsageError) else 1 if given[:1] == ["inspect"] else COULD_NOT_RUN
    except processes.Interrupted as exc:
        code = -exc.number
    if code < 0:
        processes.exit_by_signal(-code)
    _exit(code)


def _open_streams() -> None:
    """Opens /dev/null for each standard stream that the caller closed. Otherwise a file of the runner's own
    would get that number, and the guest would inherit it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            file = os.open(os.devnull, os.O_RDWR)
            if file != number:
                os.dup2(file, number)
                os.close(file)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 # as long as the process


def _exit(code: int) -> NoReturn:
    """Exits without Python's own clean-up, which takes 5 ms and is not needed."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader of our output is gone
        code = code or 1
    os._exit(code)


def _main(argv: Sequence[str]) -> int:
    """Returns an exit code, or the negated number of a signal. Modules that take long to import are imported
    where they are used."""
    if argv and argv[0] == "inspect":
        from ipfsfuse_run import inspecting

        return inspecting.main(argv[1:])
    word = argv[0] if argv and argv[0] in ("run", "compile") else None
    options = parsing.parse(argv[1:] if word else argv)
    if word == "compile":
        if options.args or options.record is not None or options.replay is not None:
            raise UsageError("compile takes a GUEST, and no arguments or receipts")
        options = options._replace(compile_only=True)
    extras.require("run")
    if options.replay is not None:
        from ipfsfuse_run import replaying

        return replaying.replay(options)
    from ipfsfuse_run.execute import execute

    not_kept = None
    try:
        outcome = execute(options).outcome
    except NotKept as exc:
        outcome, not_kept = exc.run.outcome, exc
    if outcome.trap is not None:
        sys.stderr.write(trap_text(options.guest_name, outcome.trap))
    if not_kept is not None:
        raise not_kept
    if outcome.refused is not None:
        say(outcome.refused)
    return outcome.code if outcome.signal is None else -outcome.signal
