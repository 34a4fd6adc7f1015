"""The runner's side of a run: starts the guest's process, enforces limits, handles signals and copies output.

One thread with one selector waits for signals, the guest's process, its reports and its output. The
supervisor never touches the mount and never waits for the reader of the output. So it ends in time even if
the guest's process hangs in a read that no signal interrupts, or if nothing reads the output.
"""

import json
import os
import select
import selectors
import signal
import stat
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

from ipfsfuse import confinement, units
from ipfsfuse.text import printable
from ipfsfuse_run import child, growth, limits, processes
from ipfsfuse_run.child import Plan, Reports
from ipfsfuse_run.errors import COULD_NOT_RUN, TRAPPED, say, trap_reason
from ipfsfuse_run.growth import Growth, Usage, Watched
from ipfsfuse_run.sandbox import IPFS

OUT_OF_TIME = 124
END_GRACE_SECONDS = 0.4
"""Seconds to wait for a killed guest. A guest that hangs in the mount ends when the daemon answers."""
LAST_MEASUREMENT = 10.0
"""Seconds for the last measurement of the writable folders after the guest has ended."""

PROGRESS_SECONDS = 1.0
"""Seconds between two updates of the progress line on a terminal, until the guest begins."""

_CHUNK = select.PIPE_BUF
"""Bytes that can be written without waiting to a pipe that poll(2) calls writable."""
_MAX_REPORT = 1 << 20
"""Bytes of the longest report, which contains a back-trace escaped as JSON."""
_DAY = 86400.0
"""Seconds of the longest single wait: epoll accepts at most 24 days."""


class RunFiles(NamedTuple):
    """Files without names for the input and output of a recorded or replayed run."""

    block_log: BinaryIO
    """The daemon's log of blocks: JSON lines."""
    guest: BinaryIO
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO


class Outcome(NamedTuple):
    """How a run ended."""

    code: int
    signal: int | None = None
    """The signal that ended the run, if the runner itself received one."""
    refused: str | None = None
    """Why the guest could not be run."""
    trapped: bool = False
    trap: str | None = None
    """wasmtime's message and back-trace, several lines."""
    limit: str | None = None
    """The limit for which the runner ended the run: a field of Limits, or `tmp`."""
    killed: bool = False
    """Whether a signal ended the guest's process that the runner did not send."""
    why: str | None = None
    """Why a started guest did not exit by itself: one sentence."""


class CompletedRun(NamedTuple):
    """How a run ended, and its results."""

    outcome: Outcome
    out: str | None = None
    """The CID of the results, if --add, --cid-file, --record or `return_cid` was given."""
    receipt: bytes | None = None
    """The receipt that --record wrote: JSON."""


def over_quota(outcome: Outcome, given: limits.Limits) -> Outcome:
    """The outcome of a run that reached max-fetch, if it ended by itself before the runner could end it."""
    if outcome.limit is not None or outcome.signal is not None:
        return outcome
    if outcome.refused is not None:
        return outcome._replace(refused=f"{outcome.refused}: it {_quota_text(given)}")
    why = f"the guest {_quota_text(given)}"
    say(why)
    return outcome._replace(code=TRAPPED, limit="max_fetch", why=why, trapped=False, trap=None)


def _quota_text(given: limits.Limits) -> str:
    return f"had more than max-fetch={limits.value_text('max_fetch', given.max_fetch or 0)} fetched"


class _Progress:
    """Shows on a terminal what a guest waits for before it begins: one line, after the first second. The line
    is erased when the guest begins."""

    def __init__(self, plan: Plan) -> None:
        self._name = printable(plan.name)
        self._next = time.monotonic() + PROGRESS_SECONDS if os.isatty(2) else None
        self._shown = 0
        self.phase("fetching" if plan.options.guest.startswith(IPFS + "/") else "reading")

    def phase(self, what: str) -> None:
        self._what, self._begun = what, time.monotonic()

    def wait(self) -> float | None:
        """Seconds until the next update; None if there is none."""
        return None if self._next is None else max(0.0, self._next - time.monotonic())

    def update(self) -> None:
        """Shows the line again if an update is due."""
        now = time.monotonic()
        if self._next is None or now < self._next or not _is_writable(2):
            return
        self.erase()
        text = f"ipfsfuse-run: {self._what} for {now - self._begun:.0f} s: {self._name}"
        text = text[: (os.get_terminal_size(2).columns or 80) - 1]
        self._next, self._shown = now + PROGRESS_SECONDS, os.write(2, text.encode())

    def erase(self) -> None:
        if self._shown and _is_writable(2):
            os.write(2, b"\r" + b" " * self._shown + b"\r")
        self._shown = 0

    def stop(self) -> None:
        self.erase()
        self._next = None


def run(plan: Plan, quota: int | None = None, files: RunFiles | None = None, show: bool = True) -> Outcome:
    """Runs the guest in a process of its own. The daemon's answer in the socket `quota` ends the run. With
    `files`, the guest's standard input is read from them and its output is written to them; with `show`, the
    output is also written to the runner's streams."""
    return _Supervisor(plan, quota, files, show).watch()


class _Supervisor:
    def __init__(self, plan: Plan, quota: int | None, files: RunFiles | None, show: bool) -> None:
        self._plan = plan
        self._files, self._show = files, show
        self._quota = quota
        self._progress = _Progress(plan)
        self._selector = selectors.DefaultSelector()
        self._deadline: float | None = None
        self._growth: Growth | None = None
        self._watcher: int | None = None
        self._watched: int | None = None
        self._outcome = Outcome(128 + signal.SIGKILL)
        self._final = False
        self._is_command = False
        self._has_begun = False
        self._dead = False
        self._pending = b""
        self._signals: list[int] = []
        self._handlers = {each: signal.getsignal(each) for each in processes.INTERRUPT_SIGNALS}
        self._catch_signals()
        self._fork()

    def _catch_signals(self) -> None:
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        processes.handle_signals(self._on_signal)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._on_wakeup(wake))

    def _restore_signals(self) -> None:
        """From now on, a signal ends the rest of the runner's work, such as writing a record."""
        signal.set_wakeup_fd(-1)
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        if self._signals and not self._final:
            self._outcome = self._outcome._replace(signal=self._signals[0])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _on_wakeup(self, wake: int) -> None:
        os.read(wake, 64)
        if self._signals and not self._final:
            self._kill(Outcome(128 + self._signals[0], signal=self._signals[0]))

    def _fork(self) -> None:
        reports, write_end = os.pipe2(os.O_CLOEXEC)
        carried = {
            target: os.pipe2(os.O_CLOEXEC)
            for target in (1, 2)
            if self._files or _must_carry(self._plan, target)
        }
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            signal.set_wakeup_fd(-1)
            for target, (_end, write) in carried.items():
                os.dup2(write, target)
            if self._files is not None:
                os.dup2(self._files.stdin.fileno(), 0)
            child.main(self._plan, parent, Reports(write_end))
        # after the fork: the guest's process could not create a user namespace otherwise
        confinement.hide_memory()
        os.close(write_end)
        self._selector.register(reports, selectors.EVENT_READ, lambda: self._on_report(reports))
        for target, (end, write) in carried.items():
            os.close(write)
            self._selector.register(end, selectors.EVENT_READ, self._pump(end, target))
        self._pidfd = os.pidfd_open(self._pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._on_exit)

    def _pump(self, end: int, target: int) -> Callable[[], None]:
        """Returns a function that copies output from the pipe `end` to the descriptor `target` and to its
        file."""
        kept = None if self._files is None else (self._files.stdout, self._files.stderr)[target - 1]
        bound = left = self._plan.options.limits.max_stdout

        def carry(data: bytes) -> bool:
            """Returns whether the copying can go on."""
            nonlocal left
            passed = data[:left]
            try:
                if kept is not None:
                    kept.write(passed)
                    kept.flush()
            except OSError as exc:
                why = f"what the guest writes can't be kept for the receipt: {exc.strerror}"
                self._kill(Outcome(COULD_NOT_RUN, refused=why))
                return False
            try:
                while self._show and passed:
                    passed = passed[os.write(target, passed) :]
            except OSError:  # the reader of our output is gone: the guest's next write fails
                return False
            if bound is None or left is None:
                return True
            left -= len(data)
            if left < 0:
                name = "standard output" if target == 1 else "standard error"
                why = f"the guest wrote more than max-stdout={units.size_text(bound)} to {name}"
                self._kill(Outcome(TRAPPED, limit="max_stdout", why=why))
            return left >= 0

        def resume() -> None:
            self._selector.unregister(target)
            self._selector.register(end, selectors.EVENT_READ, pump)

        def pump() -> None:
            if not _is_writable(target):
                self._selector.unregister(end)
                self._selector.register(target, selectors.EVENT_WRITE, resume)
                return
            data = os.read(end, _CHUNK)
            if not data or not carry(data):
                self._drop(end)

        return pump

    def _drop(self, file: int) -> None:
        self._selector.unregister(file)
        os.close(file)

    def _on_report(self, reports: int) -> None:
        data = os.read(reports, _CHUNK)
        if not data:
            self._drop(reports)
        *lines, self._pending = (self._pending + data).split(b"\n")
        try:
            if len(self._pending) > _MAX_REPORT:
                raise ValueError("a report without an end")
            for line in lines:
                if not self._final:
                    self._on_message(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # a guest that broke out of wasmtime may send anything
            self._pending = b""
            if not self._final:
                why = f"{self._plan.name} was ended: its process reported what can't be understood"
                self._kill(Outcome(TRAPPED, trapped=True, why=why))

    def _on_message(self, message: Mapping[str, Any]) -> None:
        """Handles a report. After the guest has begun, only the report of its end has an effect."""
        if "says" in message and not self._has_begun:
            self._progress.erase()
            say(message["says"])
        elif "compiling" in message and self._growth is None:
            self._progress.phase("compiling" if message["compiling"] else "starting")
            seconds = self._plan.options.limits.compile_seconds
            self._deadline = time.monotonic() + seconds if message["compiling"] else None
        elif "growth" in message and self._growth is None:
            self._growth = [
                Watched(what, folders, Usage(*before), bound)
                for what, folders, before, bound in message["growth"]
            ]
            # until the guest has begun: code that a broken compiler made might never report that
            self._deadline = time.monotonic() + self._plan.options.limits.compile_seconds
        elif "started" in message and not self._has_begun:
            self._has_begun = True
            self._started(message)
        elif "ended" in message or "refused" in message:
            trap, refused = message.get("trap"), message.get("refused")
            if not isinstance(trap, str | None) or not isinstance(refused, str | None):
                raise TypeError("not texts")
            self._outcome = self._outcome._replace(
                refused=refused,
                trapped=message.get("trapped", False) is True,
                trap=trap,
                why=None if trap is None else trap_reason(self._plan.name, trap),
            )
        else:
            raise ValueError("an unknown report")

    def _started(self, message: Mapping[str, Any]) -> None:
        self._progress.stop()
        self._is_command = "command" in message
        timeout = self._plan.options.limits.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        if self._quota is not None:  # before this, the guest's process reports failed reads itself
            self._selector.register(self._quota, selectors.EVENT_READ, self._on_quota)
        if self._growth and not self._dead:
            self._watcher, watched = growth.watch(self._growth, self._pidfd)
            self._watched = watched
            self._selector.register(watched, selectors.EVENT_READ, self._on_watched)

    def _on_watched(self) -> None:
        assert self._watched is not None
        why = os.read(self._watched, _CHUNK)
        self._stop_watcher()
        if self._final:
            return
        if self._dead:
            self._deadline = None
        if why:
            what, _space, text = why.decode().partition(" ")
            self._kill(Outcome(TRAPPED, limit=what, why=f"{self._plan.name} {text}"))

    def _stop_watcher(self) -> None:
        if self._watched is not None and self._watcher is not None:
            self._drop(self._watched)
            os.kill(self._watcher, signal.SIGKILL)
            os.waitpid(self._watcher, 0)
            self._watched = self._watcher = None

    def _on_quota(self) -> None:
        assert self._quota is not None
        answer = os.read(self._quota, _CHUNK)
        self._stop_quota()
        if _is_yes(answer):
            why = f"{self._plan.name} {_quota_text(self._plan.options.limits)}"
            self._kill(Outcome(TRAPPED, limit="max_fetch", why=why))

    def _stop_quota(self) -> None:
        if self._quota is not None and self._quota in self._selector.get_map():
            self._selector.unregister(self._quota)
        self._quota = None

    def _on_exit(self) -> None:
        self._drop(self._pidfd)
        self._progress.stop()
        self._stop_quota()
        self._dead = True
        _pid, status = os.waitpid(self._pid, 0)
        if self._final:
            return
        self._deadline = None if self._watched is None else time.monotonic() + LAST_MEASUREMENT
        code = os.waitstatus_to_exitcode(status)
        self._outcome = self._outcome._replace(code=code if code >= 0 else 128 - code)
        if code < 0:
            why = f"{self._plan.name} was ended by {signal.Signals(-code).name}"
            self._outcome = self._outcome._replace(killed=True, why=why)
        if self._is_command and code == TRAPPED:  # a guest's own 134 would be 1 there
            self._outcome = self._outcome._replace(trapped=True, why=f"{self._plan.name} trapped")
        if code == -signal.SIGXFSZ and self._growth:
            first = self._growth[0]
            why = f"{self._plan.name} wrote more than {first.text} to one file"
            self._kill(Outcome(TRAPPED, limit=first.what, why=why))

    def _kill(self, outcome: Outcome) -> None:
        """Kills the guest, and prints the runner's reason."""
        self._outcome, self._final = outcome, True
        self._deadline = time.monotonic() + END_GRACE_SECONDS
        self._progress.stop()
        if not self._dead:
            os.kill(self._pid, signal.SIGKILL)
        self._stop_watcher()
        self._stop_quota()
        if outcome.why is not None and _is_writable(2, END_GRACE_SECONDS):
            say(outcome.why)

    def _past_deadline(self) -> bool:
        """Whether to stop waiting. At the deadline a running guest is killed; a killed guest that has not
        ended by the next deadline is left behind."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        if self._final:
            return True
        if self._dead:  # the watching process hangs in a file system that does not answer
            self._deadline = None
            self._stop_watcher()
        elif not self._has_begun:
            given = limits.value_text("compile_timeout", self._plan.options.limits.compile_seconds)
            why = f"{self._plan.name} was not compiled within {given}: give -W compile-timeout=TIME for more"
            self._kill(Outcome(COULD_NOT_RUN, refused=why, limit="compile_timeout"))
        else:
            why = f"{self._plan.name} ran out of time after {self._plan.options.limits.timeout:g} s"
            self._kill(Outcome(OUT_OF_TIME, limit="timeout", why=why))
        return False

    def watch(self) -> Outcome:
        """Returns when the guest has ended and its output is copied."""
        with self._selector:
            while len(self._selector.get_map()) > 1 or not self._dead:  # the signals' pipe is always there
                left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                waits = [each for each in (left, self._progress.wait()) if each is not None]
                for key, _events in self._selector.select(min(*waits, _DAY) if waits else None):
                    # An earlier call of this round may have closed this file: the guest's end and its
                    # watcher's are often found together.
                    if self._selector.get_map().get(key.fileobj) is key:
                        key.data()
                self._progress.update()
                if self._past_deadline():
                    break
            self._stop_watcher()
        self._restore_signals()
        return self._outcome


def _is_yes(answer: bytes) -> bool:
    """Whether the daemon's answer is `ok`. It is not if the daemon ended or refused."""
    try:
        return json.loads(answer).get("ok") is True
    except (ValueError, RecursionError, AttributeError):
        return False


def _is_writable(file: int, seconds: float = 0) -> bool:
    """Whether a write to the descriptor `file` would not block. Waits up to `seconds` for that. A write that
    fails does not block."""
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return bool(poll.poll(1000 * seconds))


def _must_carry(plan: Plan, target: int) -> bool:
    """Whether the guest's output must go through the supervisor: the output is counted, or the stream is a
    file and the guest's process has a limit on the size of files."""
    if plan.options.limits.max_stdout is not None:
        return True
    try:
        return any(each.writable for each in plan.box.preopens) and stat.S_ISREG(os.fstat(target).st_mode)
    except OSError:
        return False
