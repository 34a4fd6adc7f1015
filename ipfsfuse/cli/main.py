"""`ipfsfuse`: one command, one exit code, and one line on standard error for everything that goes wrong."""

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
    """Runs one command. Its exit code: 0, 1 it failed, 2 usage, 75 another process has the cache
    folder, 130 interrupted or terminated, 141 nobody reads what it prints."""
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
    """Opens /dev/null where the caller closed a standard stream. Else a file of ours would get that number,
    and a child the file in the place of its own stream."""
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
    """SIGTERM ends a command as Ctrl-C does, so that it cleans up. (`mount` and `serve` have handlers of
    their own.)"""
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
    """Says why, and gives the exit code. With `as_json` standard output says it in JSON too."""
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
    """Discards what `stream` still buffers if it can't be written: the terminal hung up, or the reader
    has gone. The interpreter's last flush would fail on it, and make 120 of our exit code."""
    if stream is None:  # it was closed when we were started
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
