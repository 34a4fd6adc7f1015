"""The process that serves a mount, and what it tells whoever started it.

On the descriptor `--ready-fd` it writes lines: any number of `progress {"done": ..., "total": ..., "what":
...}` while the index of a CAR file is built, then `ok {"mountpoint": ..., "control": ..., "pid": ...}` once
the mount answers, or `error REASON`. What it logs before goes to its starter's standard error, what it logs
afterwards to the log in the cache folder (`cache.store.folder`). If the starter ends before that, nobody
wants the mount any more, and it ends.

SIGHUP makes a daemon open its log anew, and read the budget and the log level from the configuration again.
In the foreground of a terminal it says that the terminal has gone: then the mount ends.
"""

import argparse
import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ipfsfuse import confinement, mount
from ipfsfuse.cache.store.folder import LOG, OLD_LOG
from ipfsfuse.cli import console, logs, parser, settings
from ipfsfuse.cli.settings import ALLOW_OTHER
from ipfsfuse.config import MountConfig
from ipfsfuse.errors import UsageError
from ipfsfuse.units import human

log = logging.getLogger("ipfsfuse.mount")

LOG_SECONDS = 5.0
"""Between two lines of the log that tell how far an index is."""
WATCH_MS = 500


def serve(asked: MountConfig, arguments: argparse.Namespace) -> None:
    """Mounts and serves until the mount is gone. Raises what prevents it."""
    confinement.hide_memory()
    log_to = logs.DaemonLog()
    logging.basicConfig(level=logging.INFO, handlers=[log_to])
    logging.getLogger("ipfsfuse").setLevel(arguments.log_level.upper())
    logs.escape_the_log(logs.FORMATS[arguments.log_format])
    ready_fd = arguments.ready_fd
    file = None if arguments.log_file is None else Path(arguments.log_file).absolute()
    starter = None if ready_fd is None else _Starter(ready_fd)

    def ready(control: Path) -> None:
        answer = {"mountpoint": str(asked.mountpoint), "control": str(control), "pid": os.getpid()}
        if file is not None:
            log_to.move(file, logs.FILE_BYTES, file.with_name(file.name + ".1"))
        elif starter is not None:
            limit = min(logs.LOG_BYTES, asked.budget // logs.LOG_PART)
            log_to.move(control.parent / LOG, limit, control.parent / OLD_LOG)
        if asked.allow_other:
            log.info("%s", ALLOW_OTHER)
        if starter is not None:
            starter.report(f"ok {json.dumps(answer)}")
        elif arguments.json:
            console.values(answer, indent=None)

    configured = asked.budget

    def reload() -> int | None:
        nonlocal configured
        log_to.reopen()
        try:
            again = parser.parse(arguments.argv)
        except UsageError as exc:
            log.warning("nothing is changed: %s", exc)
            return None
        logging.getLogger("ipfsfuse").setLevel(again.log_level.upper())
        later = [
            name
            for name in arguments.origins
            if name not in ("budget", "log-level")
            and settings.value(again, name) != settings.value(arguments, name)
        ]
        if later:
            log.warning("a new value of %s holds from the next mount on", ", ".join(later))
        before, configured = configured, again.budget
        return configured if configured != before else None  # `ipfsfuse budget` holds until the file changes

    try:
        hangup = None if starter is None and _has_terminal() else reload
        writes = [] if file is None else [file]
        mount.run(asked, ready, _Indexing(starter), hangup, settings.candidates(), writes)
    except BaseException as exc:
        if starter is not None:
            starter.report(f"error {console.one_line(console.unwrapped(exc))}")
        raise


class _Indexing:
    """Passes on how far an index is: to the starter each time, to the log now and then. Called in one thread
    at a time."""

    def __init__(self, starter: "_Starter | None") -> None:
        self._starter = starter
        self._logged = float("-inf")

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._starter is not None:
            self._starter.progress({"done": done, "total": total, "what": name})
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS or done == total:
            self._logged = now
            log.info("the index of %s is built: %s of %s", name, human(done), human(total))


class _Starter:
    """The process at the other end of the descriptor `fd`. It gets the result once, and is watched
    until then."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reported = False
        os.set_inheritable(fd, False)
        os.chdir("/")
        threading.Thread(target=self._watch, daemon=True).start()

    def progress(self, values: Mapping[str, object]) -> None:
        """For `cli.progress`. Before the result, from any thread."""
        with suppress(OSError):  # it has gone: `_watch` sees that
            os.write(self._fd, b"progress " + json.dumps(values).encode() + b"\n")

    def report(self, line: str) -> None:
        """Sends `line` as the result, unless there was one before."""
        if self._reported:
            return
        self._reported = True
        try:
            os.write(self._fd, line.encode(errors="surrogateescape") + b"\n")
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)
        os.close(self._fd)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)  # only that nobody reads it any more
        while not self._reported:
            if poll.poll(WATCH_MS) and not self._reported:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal: its SIGHUP then says that the terminal has gone."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
