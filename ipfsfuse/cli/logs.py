"""The daemon's log: one line for each message. Text of gateways, nodes and file names is escaped."""

import argparse
import copy
import errno
import json
import logging
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from ipfsfuse import client
from ipfsfuse.cache.store.folder import LOG
from ipfsfuse.cli import console, folders
from ipfsfuse.errors import IpfsFuseError, StoreFailed, UsageError
from ipfsfuse.text import printable

INDENT = "    "
"""The prefix of each line of a traceback. The message of an exception may have several lines: with the
prefix, none looks like a log message."""


LOG_BYTES = 1 << 20
"""A longer log is renamed to OLD_LOG, and replaces the one there."""
FILE_BYTES = 16 << 20
"""The same limit for a file that --log-file names."""
LOG_PART = 32
"""Each of the two files takes at most this part of a small budget: one 32nd."""

FULL_MS = 100
"""How long a message waits for a slow reader. After a lost message, the next ones do not wait."""

DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
"""Errnos of a disk in trouble, which prevents no mount."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

log = logging.getLogger("ipfsfuse.mount")


class PrintableFormatter(logging.Formatter):
    """Escapes each message, so that callers need not do it."""

    def __init__(self, layout: str = LOG_FORMAT) -> None:
        super().__init__(layout)

    def format(self, record: logging.LogRecord) -> str:
        escaped = copy.copy(record)
        escaped.msg, escaped.args = printable(record.getMessage()), None
        if record.exc_info:
            escaped.exc_text = _indented(self.formatException(record.exc_info))
        if record.stack_info:
            escaped.stack_info = _indented(record.stack_info)
        return super().format(escaped)


def _indented(text: str) -> str:
    return "\n".join(INDENT + printable(line) for line in text.splitlines())


class JournalFormatter(PrintableFormatter):
    """Lines with journald's priorities (sd-daemon(3)). The journal keeps the time itself."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        priority = 7 if record.levelno <= logging.DEBUG else priority
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class JsonFormatter(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line).replace("\x7f", "\\u007f")


FORMATS: Mapping[str, Callable[[], logging.Formatter]] = {
    "text": PrintableFormatter,
    "json": JsonFormatter,
    "journal": JournalFormatter,
}


def escape_the_log(formatter: Callable[[], logging.Formatter] = PrintableFormatter) -> None:
    """Makes every handler of the root logger escape messages. Also logs what Python would print itself:
    warnings, and uncaught exceptions of threads and finalizers."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter())
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


class DaemonLog(logging.Handler):
    """Writes to standard error. `move` directs standard error to a file. Only the last part of the file is
    kept.

    A message that can't be written within FULL_MS is lost: a pipe without a reader, a stopped terminal or a
    full disk must not stop the daemon. A line before the next written message says that messages were lost.

    Concurrency: any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        """Lost messages since the last one that was written."""
        self._rest = b""
        """The unwritten part of a message."""
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)
        self._path: Path | None = None
        self._limit = 0
        self._older = Path()

    def move(self, path: Path, limit: int, older: Path, needed: bool = False) -> None:
        """Directs standard output and error to the file `path`, which starts with the messages so far. It and
        the file `older` each get at most `limit` bytes and a line. If `path` can't be opened, there is no
        log; if it is `needed`, raises UsageError, unless the disk is in trouble."""
        with self._alone():
            self._limit, self._older = limit, older
            try:
                if path.exists() and path.stat().st_size > limit:
                    path.replace(older)
                target = _open_log(path)
            except OSError as exc:
                if needed and exc.errno not in DISK_TROUBLE:
                    reason = "nobody reads this pipe" if exc.errno == errno.ENXIO else exc.strerror
                    raise UsageError(f"the log {path} can't be written: {reason}") from exc
                log.warning("there will be no log: %s: %s", path, exc.strerror)
                return
            stream: TextIO | None = sys.stderr  # None where the caller closed it
            if stream is not None:
                stream.flush()
            if stat.S_ISREG(os.fstat(2).st_mode):  # a pipe or a terminal has it already
                # on a full disk, or from a file opened for writing alone, that is lost; the mount goes on
                with suppress(OSError), open(target, "wb", closefd=False) as out:
                    at = 0
                    while piece := os.pread(2, 1 << 16, at):
                        out.write(piece)
                        at += len(piece)
            _lead_to(target)
            self._path = path

    def reopen(self) -> None:
        """Opens the file again, after a program that rotates logs has moved it away."""
        with self._alone():
            if self._path is not None:
                try:
                    _lead_to(_open_log(self._path))
                    log.info("this log was opened anew")
                except OSError as exc:
                    log.warning("the log can't be opened anew: %s: %s", self._path, exc.strerror)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._put(record)
        except Exception:
            self.handleError(record)
        if self._path is not None and os.fstat(2).st_size > self._limit:
            try:
                with suppress(FileNotFoundError):  # a program that rotates logs has moved it away already
                    self._path.replace(self._older)
                _lead_to(_open_log(self._path))
            except OSError:  # the folder is gone, or can't be written: the same file begins again
                with suppress(OSError):
                    os.ftruncate(2, 0)

    def _put(self, record: logging.LogRecord) -> None:
        wait = 0 if self._lost or self._rest else FULL_MS
        self._rest = self._written(self._rest, wait)
        if not self._rest:
            data = self._encoded(record)
            if self._lost:
                what = "%d messages before this one are lost: they could not be written"
                lost = logging.LogRecord(log.name, logging.WARNING, "", 0, what, (self._lost,), None)
                data = self._encoded(lost) + data
            rest = self._written(data, wait)
            if len(rest) < len(data):
                self._rest, self._lost = rest, 0
                return
        self._lost += 1

    def _encoded(self, record: logging.LogRecord) -> bytes:
        stream: TextIO | None = sys.stderr  # as above
        encoding = "utf-8" if stream is None else stream.encoding
        return f"{self.format(record)}\n".encode(encoding, "backslashreplace")

    def _written(self, data: bytes, wait: int) -> bytes:
        """Writes `data`, and waits up to `wait` milliseconds for each part. Returns the rest."""
        while data and self._poll.poll(wait) == [(2, select.POLLOUT)]:
            try:
                data = data[os.write(2, data[: select.PIPE_BUF]) :]  # what a pipe surely takes then
            except OSError:
                break
        return data

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does not report a full disk, since the report would go into the log on the same disk."""
        if self._path is None:
            super().handleError(record)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.acquire()  # a reentrant lock: what is logged within goes the same way
        try:
            yield
        finally:
            self.release()


def _open_log(path: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags | os.O_NONBLOCK, 0o600)  # a FIFO that nobody reads would wait


def _lead_to(target: int) -> None:
    """Directs standard output and error to `target`, and closes `target`."""
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


# -- `ipfsfuse logs` -----------------------------------------------------------------------------------------

FOLLOW_SECONDS = 0.3
PID_SECONDS = 5.0


def show(arguments: argparse.Namespace) -> int:
    """Prints the last lines of a mount's log, also from the older file. With --follow, also prints new
    lines."""
    path = Path(arguments.log_file) if arguments.log_file else _log_of(arguments)
    last = deque[str](maxlen=arguments.lines)
    with suppress(OSError), _text(path.with_name(f"{path.name}.1")) as older:
        last.extend(older)
    try:
        file = _text(path)
    except OSError as exc:
        raise StoreFailed(f"there is no log to show: {path}: {exc.strerror}") from exc
    with file:
        last.extend(file)
        if arguments.json and not arguments.follow:
            console.values({"log": str(path), "lines": [printable(each.rstrip("\n")) for each in last]})
            return 0
        for each in last:
            _show(each, arguments.json)
        if arguments.follow:
            _follow(path, file, arguments.json)
    return 0


def _log_of(arguments: argparse.Namespace) -> Path:
    """The log file that the daemon names. If no daemon answers, the log in the cache folder. Raises
    UsageError if the daemon does not log to a file."""
    daemon = folders.last_daemon_of(arguments)
    try:
        state = client.call(daemon.control, "status", timeout=PID_SECONDS)
    except IpfsFuseError:
        return daemon.control.parent / LOG
    if "log" not in state:  # a daemon of an older version
        return daemon.control.parent / LOG
    if state["log"] is None:
        raise UsageError(
            f"process {state['pid']} logs to no file: look where it was started (a service: journalctl)"
        )
    return Path(state["log"])


def _text(path: Path) -> TextIO:
    return path.open(encoding="utf-8", errors="surrogateescape")


def _show(each: str, as_json: bool) -> None:
    """Prints a line of the log. A line of JSON is printed as it is."""
    if as_json and not each.startswith("{"):
        console.values({"line": printable(each.rstrip("\n"))}, indent=None)
    else:
        console.line(each.rstrip("\n"))


def _follow(path: Path, file: TextIO, as_json: bool) -> None:
    """Prints the lines that are added to `path`, also after the daemon has started a new file there."""
    while True:
        for each in file:
            _show(each, as_json)
        console.flush()
        time.sleep(FOLLOW_SECONDS)
        with suppress(FileNotFoundError):
            now = os.stat(path)
            if now.st_ino != os.fstat(file.fileno()).st_ino:
                for each in file:  # what came before the new file was begun
                    _show(each, as_json)
                file.close()
                file = _text(path)
            elif now.st_size < file.buffer.tell():  # a file that can't be moved away begins again
                file.seek(0)
