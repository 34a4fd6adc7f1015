"""`ipfsfuse`: runs one command. A failure prints one line on standard error."""

import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import TextIO

from ipfsfuse.cli import console, parser
from ipfsfuse.cli.console import unwrapped
from ipfsfuse.errors import FolderInUse, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 success, 1 failure, 2 wrong usage, 75 another process has the cache
    folder, 130 interrupted or terminated, 141 the reader of the output has gone."""
    _fill_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the locale's encoding lacks is escaped. Each line is written at once, also into a
        # pipe: `serve` and `metrics --listen` say where they listen, and then run on.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return _run(argv)
    finally:
        _discard_unwritable(sys.stderr)


def _fill_standard_streams() -> None:
    """Opens /dev/null in place of each closed standard stream. Else a file of ours would get its number, and
    a child process would use the file as its stream."""
    while (file := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(file)


def _run(argv: Sequence[str] | None) -> int:
    if os.getpid() == 1:  # in a container: the kernel drops signals without a handler
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    try:
        arguments = parser.parse(argv)
        module, function = arguments.run.split(":")
        run = getattr(import_module(f"ipfsfuse.cli.{module}"), function)
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # `__main__` has set it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with nullcontext() if arguments.command in ("mount", "serve") else _terminated_as_interrupted():
            code: int = run(arguments)
        console.flush()
        return code
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as exc:
        if "IPFSFUSE_TRACEBACK" in os.environ:
            for line in "".join(traceback.format_exception(exc)).splitlines():
                console.note(line)
        return _ended_by(exc, as_json="--json" in (sys.argv[1:] if argv is None else argv))


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM end a command like Ctrl-C, so that it cleans up. (`mount` and `serve` have their own
    handlers.)"""
    terminal = {signal.SIGINT}
    in_background = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if in_background:  # a script's shell starts `command &` so: Ctrl-C must not end it, SIGTERM must
        signal.pthread_sigmask(signal.SIG_BLOCK, terminal)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def end(_number: int, _frame: object) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, terminal)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if in_background:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, terminal)


def _ended_by(exc: BaseException, as_json: bool) -> int:
    """Prints the reason of a failure. Returns the exit code. With `as_json`, also prints it as JSON on
    standard output."""
    exc = unwrapped(exc)
    if isinstance(exc, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(exc, BrokenPipeError):
        _discard_unwritable(sys.stdout)
        return 128 + signal.SIGPIPE
    console.failure(exc)
    code = 2 if isinstance(exc, UsageError) else os.EX_TEMPFAIL if isinstance(exc, FolderInUse) else 1
    if as_json and sys.stdout is not None:
        with suppress(OSError):  # what can't be written is why it failed
            console.values(console.failure_values(exc, code), indent=None)
    _discard_unwritable(sys.stdout)
    return code


def _discard_unwritable(stream: TextIO | None) -> None:
    """Discards the buffer of `stream` if it can't be written, since the terminal or the reader has gone. Else
    the interpreter's last flush would fail and change our exit code to 120."""
    if stream is None:  # it was closed when we were started
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
