"""The runner's side of a run: forks the guest's process, passes on signals, keeps time, and carries its output.

Single-threaded: one selector waits for the signals, the child, its reports and its output. It never touches the mount
and never waits for whoever reads the output, so that it ends when it must even while the guest's process hangs in a read
that no signal can end, or nobody takes what the guest wrote.
"""

import json
import os
import select
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NamedTuple

from runner import child, signals
from runner.child import Plan, Reports
from runner.guest import TRAPPED

OUT_OF_TIME = 124
GRACE = 0.4
"""Seconds that a killed guest gets to go. One that hangs in the mount goes with it, or when the daemon answers."""

_CHUNK = select.PIPE_BUF
"""Bytes that a pipe which can be written takes without waiting."""

Sink = Callable[[bytes], None]


class Streams(NamedTuple):
    """Where the guest's streams go; None leaves the runner's own in place. `stdin` is a descriptor."""

    stdin: int | None = None
    stdout: Sink | None = None
    stderr: Sink | None = None


class Outcome(NamedTuple):
    """How a run ended. `refused` says why it could not begin; `signal` is one that the runner itself was sent."""

    code: int
    signal: int | None = None
    refused: str | None = None
    trapped: bool = False
    kind: str | None = None


class OutputFull(Exception):
    """Raised by a sink: the guest wrote more than it may."""


def run(plan: Plan, streams: Streams = Streams(), close: Sequence[int] = ()) -> Outcome:  # noqa: B008 # frozen
    """Runs the guest in a process of its own, which closes the descriptors `close` first."""
    return _Supervisor(plan, streams, close).watch()


class _Supervisor:
    def __init__(self, plan: Plan, streams: Streams, close: Sequence[int]) -> None:
        self._plan = plan
        self._selector = selectors.DefaultSelector()
        self._deadline: float | None = None
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
        pumped = [(sink, target, os.pipe2(os.O_CLOEXEC)) for sink, target in ((streams.stdout, 1), (streams.stderr, 2)) if sink is not None]
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
            except OutputFull as exc:
                self._end(Outcome(TRAPPED), str(exc))
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
            if "started" in message:
                self._outcome = self._outcome._replace(kind=message["kind"])
                timeout = self._plan.box.limits.timeout
                self._deadline = None if timeout is None else time.monotonic() + timeout
            elif not self._final:
                self._outcome = self._outcome._replace(refused=message.get("refused"), trapped=message.get("trapped", False))

    def _reap(self) -> None:
        self._drop(self._pidfd)
        self._dead = True
        _pid, status = os.waitpid(self._pid, 0)
        if not self._final:
            self._deadline = None
            code = os.waitstatus_to_exitcode(status)
            self._outcome = self._outcome._replace(code=code if code >= 0 else 128 - code)

    def _end(self, outcome: Outcome, why: str | None = None) -> None:
        """Ends the guest for a reason of ours."""
        self._outcome, self._final = outcome._replace(kind=self._outcome.kind), True
        self._deadline = time.monotonic() + GRACE
        os.kill(self._pid, signal.SIGKILL)
        if why is not None and _takes(2, GRACE):
            print(f"ipfsfuse-run: {why}", file=sys.stderr)

    def _late(self) -> bool:
        """Whether to leave now: at the deadline a running guest is killed, one that was killed is left behind."""
        if self._deadline is None or time.monotonic() < self._deadline:
            return False
        if self._final:
            return True
        self._end(Outcome(OUT_OF_TIME), f"{self._plan.name} ran out of time after {self._plan.box.limits.timeout:g} s")
        return False

    def watch(self) -> Outcome:
        """Until the guest is gone and its output is carried."""
        with self._selector:
            while len(self._selector.get_map()) > 1 or not self._dead:  # the signals' pipe is always there
                wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
                for key, _events in self._selector.select(wait):
                    key.data()
                if self._late():
                    break
        self._leave_signals()
        return self._outcome


def _takes(file: int, seconds: float = 0) -> bool:
    """Whether a write to the descriptor `file` would not wait, at the latest after `seconds`; one that fails does not."""
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return bool(poll.poll(1000 * seconds))
