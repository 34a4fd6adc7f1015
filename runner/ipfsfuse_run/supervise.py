"""The runner's side of a run: forks the guest's process, passes on signals, keeps time, and carries its
output.

Single-threaded: one selector waits for the signals, the child, its reports and its output. It never touches
the mount and never waits for whoever reads the output, so that it ends when it must even while the guest's
process hangs in a read that no signal can end, or nobody takes what the guest wrote.
"""

import json
import os
import select
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

from ipfsfuse_run import child, growth, limits, messages, signals
from ipfsfuse_run.child import Plan, Reports
from ipfsfuse_run.errors import COULD_NOT_RUN
from ipfsfuse_run.growth import Growth
from ipfsfuse_run.guest import TRAPPED

OUT_OF_TIME = 124
GRACE = 0.4
"""Seconds that a killed guest gets to go. One that hangs in the mount goes with it, or when the daemon
answers."""

LAST_LOOK = 10.0
"""Seconds that the watching process gets to measure the writable folders when the guest has ended."""

_CHUNK = select.PIPE_BUF
"""Bytes that a pipe which can be written takes without waiting."""
_DAY = 86400.0
"""The longest wait at once: epoll takes no more than 24 of them."""

Sink = Callable[[bytes], None]


class Streams(NamedTuple):
    """Where the guest's streams go; None leaves the runner's own in place. `stdin` is a descriptor."""

    stdin: int | None = None
    stdout: Sink | None = None
    stderr: Sink | None = None


class Outcome(NamedTuple):
    """How a run ended."""

    code: int
    signal: int | None = None
    """One that the runner itself was sent."""
    refused: str | None = None
    """Why the guest could not be run."""
    trapped: bool = False
    trap: str | None = None
    """wasmtime's message and back-trace, several lines."""
    kind: str | None = None
    limit: str | None = None
    """The field of Limits that ended the run, where the runner ended it for one."""


class LimitReached(Exception):
    """Raised by a sink: the guest wrote more than the field `limit` of its Limits allows."""

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


def run(plan: Plan, streams: Streams = Streams(), close: Sequence[int] = ()) -> Outcome:  # noqa: B008 # frozen
    """Runs the guest in a process of its own, which closes the descriptors `close` first."""
    return _Supervisor(plan, streams, close).watch()


class _Supervisor:
    def __init__(self, plan: Plan, streams: Streams, close: Sequence[int]) -> None:
        self._plan = plan
        self._selector = selectors.DefaultSelector()
        self._deadline: float | None = None
        self._compiling = False
        self._growth: Growth | None = None
        self._watcher: int | None = None
        self._watched: int | None = None
        self._outcome = Outcome(128 + signal.SIGKILL)
        self._final = False
        self._dead = False
        self._pending = b""
        self._signals: list[int] = []
        self._handlers = {each: signal.getsignal(each) for each in signals.ENDING}
        self._catch_signals()
        self._fork(streams, close)

    def _catch_signals(self) -> None:
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for each in signals.ENDING:
            if self._handlers[each] != signal.SIG_IGN:  # nohup
                signal.signal(each, self._on_signal)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._woken(wake))

    def _leave_signals(self) -> None:
        """One that comes from now on ends what the runner still does, such as writing a record."""
        signal.set_wakeup_fd(-1)
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        if self._signals and not self._final:
            self._outcome = self._outcome._replace(signal=self._signals[0])

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _woken(self, wake: int) -> None:
        os.read(wake, 64)
        if self._signals and not self._final:
            self._end(Outcome(128 + self._signals[0], signal=self._signals[0]))

    def _fork(self, streams: Streams, close: Sequence[int]) -> None:
        reports, told = os.pipe2(os.O_CLOEXEC)
        pumped = [
            (sink, target, os.pipe2(os.O_CLOEXEC))
            for sink, target in ((streams.stdout, 1), (streams.stderr, 2))
            if sink is not None
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            signal.set_wakeup_fd(-1)
            for _sink, target, (end, write) in pumped:
                os.dup2(write, target)
                os.close(end)  # else no write would ever fail for want of a reader
                os.close(write)
            if streams.stdin is not None:
                os.dup2(streams.stdin, 0)
            for each in (reports, *close):
                os.close(each)
            child.main(self._plan, parent, Reports(told))
        os.close(told)
        self._selector.register(reports, selectors.EVENT_READ, lambda: self._told(reports))
        for sink, target, (end, write) in pumped:
            os.close(write)
            self._selector.register(end, selectors.EVENT_READ, self._pump(end, sink, target))
        self._pidfd = os.pidfd_open(self._pid)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._reap)

    def _pump(self, end: int, sink: Sink, target: int) -> Callable[[], None]:
        def go_on() -> None:
            self._selector.unregister(target)
            self._selector.register(end, selectors.EVENT_READ, pump)

        def pump() -> None:
            if not _takes(target):
                self._selector.unregister(end)
                self._selector.register(target, selectors.EVENT_WRITE, go_on)
                return
            data = os.read(end, _CHUNK)
            try:
                if data:
                    sink(data)
                    return
            except OSError:  # whoever read our output is gone: the guest's next write tells it
                pass
            except LimitReached as exc:
                self._end(Outcome(TRAPPED, limit=exc.limit), str(exc))
            self._drop(end)

        return pump

    def _drop(self, file: int) -> None:
        self._selector.unregister(file)
        os.close(file)

    def _told(self, reports: int) -> None:
        data = os.read(reports, _CHUNK)
        if not data:
            self._drop(reports)
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if self._final:
                continue
            if "compiling" in message:
                self._compiling = message["compiling"]
                self._deadline = time.monotonic() + self._compile_timeout() if self._compiling else None
            elif "started" in message:
                self._started(message)
            else:
                self._outcome = self._outcome._replace(
                    refused=message.get("refused"),
                    trapped=message.get("trapped", False),
                    trap=message.get("trap"),
                )

    def _compile_timeout(self) -> float:
        given = self._plan.box.limits.compile_timeout
        return limits.COMPILE_TIMEOUT if given is None else given

    def _started(self, message: Mapping[str, Any]) -> None:
        self._outcome = self._outcome._replace(kind=message["kind"])
        timeout = self._plan.box.limits.timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        if message["growth"] is not None and not self._dead:
            folders, before, bound = message["growth"]
            self._growth = Growth(folders, growth.Usage(*before), bound)
            self._watcher, watched = growth.watch(self._growth, self._pidfd)
            self._watched = watched
            self._selector.register(watched, selectors.EVENT_READ, self._on_watched)

    def _on_watched(self) -> None:
        assert self._watched is not None
        why = os.read(self._watched, _CHUNK)
        self._end_watching()
        if self._final:
            return
        if self._dead:
            self._deadline = None
        if why:
            self._end(Outcome(TRAPPED, limit="max_out"), f"{self._plan.name} {why.decode()}")

    def _end_watching(self) -> None:
        if self._watched is not None and self._watcher is not None:
            self._drop(self._watched)
            os.kill(self._watcher, signal.SIGKILL)
            os.waitpid(self._watcher, 0)
            self._watched = self._watcher = None

    def _reap(self) -> None:
        self._drop(self._pidfd)
        self._dead = True
        _pid, status = os.waitpid(self._pid, 0)
        if self._final:
            return
        self._deadline = None if self._watched is None else time.monotonic() + LAST_LOOK
        code = os.waitstatus_to_exitcode(status)
        self._outcome = self._outcome._replace(code=code if code >= 0 else 128 - code)
        if code == -signal.SIGXFSZ and self._growth is not None:
            bound = self._growth.bound
            self._end(
                Outcome(TRAPPED, limit="max_out"),
                f"{self._plan.name} wrote more than max-out={bound} bytes to one file",
            )

    def _end(self, outcome: Outcome, why: str | None = None) -> None:
        """Ends the guest for a reason of ours."""
        self._outcome, self._final = outcome._replace(kind=self._outcome.kind), True
        self._deadline = time.monotonic() + GRACE
        if not self._dead:
            os.kill(self._pid, signal.SIGKILL)
        self._end_watching()
        if why is not None and _takes(2, GRACE):
            messages.say(why)

    def _late(self) -> bool:
        """Whether to leave now: at the deadline a running guest is killed, one that was killed is left
        behind."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        if self._final:
            return True
        if self._dead:  # the watching process hangs: in a file system that does not answer
            self._deadline = None
            self._end_watching()
        elif self._compiling:
            given = limits.value_text("compile_timeout", self._compile_timeout())
            why = f"{self._plan.name} was not compiled within {given}: give -W compile-timeout=TIME for more"
            self._end(Outcome(COULD_NOT_RUN, refused=why, limit="compile_timeout"))
        else:
            timeout = f"{self._plan.box.limits.timeout:g} s"
            self._end(
                Outcome(OUT_OF_TIME, limit="timeout"), f"{self._plan.name} ran out of time after {timeout}"
            )
        return False

    def watch(self) -> Outcome:
        """Until the guest is gone and its output is carried."""
        with self._selector:
            while len(self._selector.get_map()) > 1 or not self._dead:  # the signals' pipe is always there
                wait = (
                    None if self._deadline is None else min(max(0.0, self._deadline - time.monotonic()), _DAY)
                )
                for key, _events in self._selector.select(wait):
                    key.data()
                if self._late():
                    break
            self._end_watching()
        self._leave_signals()
        return self._outcome


def _takes(file: int, seconds: float = 0) -> bool:
    """Whether a write to the descriptor `file` would not wait, at the latest after `seconds`; one that fails
    does not."""
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return bool(poll.poll(1000 * seconds))
