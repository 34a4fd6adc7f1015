"""The daemon's log: one line for each message, whatever a gateway, a node or a file name put into it."""

import logging
import sys
import threading
from types import TracebackType
from typing import Any

from ipfsfuse.text import printable

INDENT = "    "
"""Before each line of a traceback: an exception's message may have several, and none of them looks like a
message."""

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

log = logging.getLogger("ipfsfuse.mount")


class PrintableFormatter(logging.Formatter):
    """Escapes each message once, so that no caller of the log has to think of it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(INDENT + printable(line) for line in text.splitlines())


def escape_the_log() -> None:
    """Lets every handler of the root logger escape, and logs what Python would print itself: warnings, and
    exceptions that nothing caught in threads and in finalizers."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter(FORMAT))
    logging.captureWarnings(True)
    threading.excepthook = _in_thread
    sys.unraisablehook = _unraisable


def _in_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "?"
    _log(f"a thread failed: {name}", args.exc_value, args.exc_traceback)


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    _log(f"{args.err_msg or 'exception ignored in'} {args.object!r}", args.exc_value, args.exc_traceback)


def _log(what: str, exc: BaseException | None, trace: TracebackType | None) -> None:
    log.error("%s", what, exc_info=None if exc is None else (type(exc), exc, trace))
