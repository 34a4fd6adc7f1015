"""What each process of the runner does with itself: signals, the death of its parent, open descriptors and
resource limits."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """An ending signal came while no guest ran. BaseException, as KeyboardInterrupt is: only main
    functions (`cli`, `forkserver`) catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_on_signals() -> None:
    """From now on, an ending signal raises Interrupted in the main thread, unless it is ignored (nohup)."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(number)

    handle_signals(interrupt)


def handle_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Sets the handler of the ending signals, but for one that is ignored (nohup)."""
    for each in ENDING:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, handler)


def ignore_signals() -> None:
    """From now on, no ending signal ends this forked process: its owner ends it, or its own work does."""
    signal.set_wakeup_fd(-1)
    handle_signals(signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent, the process `parent`, ends; exits if it has ended
    already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def fork(work: Callable[[], object], dies_with_us: bool = True) -> int:
    """Starts a process that runs `work` and ends: with 0, with 1 if it raises. Gives its number."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            if dies_with_us:
                die_with(parent)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def exit_by_signal(number: int) -> NoReturn:
    """Ends this process by the signal that it was sent, as shells and scripts expect; with 128 + its number
    if the signal is blocked."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


# -- open descriptors --------------------------------------------------------------------------------------


def close_all_but(*kept: int | None) -> None:
    for each in map(int, os.listdir("/proc/self/fd")):
        if each not in kept:
            try:
                os.close(each)
            except OSError:
                pass  # the listing's own


def detach(*kept: int) -> None:
    """Closes all descriptors but `kept`; the standard streams become /dev/null. A copy of a pipe's reading
    end would keep the guest's writes from failing, and a copy of the control socket would keep the mount
    alive."""
    null = os.open(os.devnull, os.O_RDWR)
    for own in (0, 1, 2):
        os.dup2(null, own)
    close_all_but(0, 1, 2, *kept)


# -- resource limits (setrlimit(2)) ------------------------------------------------------------------------


def limit(what: int, wanted: int) -> None:
    """Lowers a resource limit of this process to `wanted`, for good; one that is lower stays. RLIMIT_DATA
    counts what the process may write to in memory, whatever it is mapped from; RLIMIT_FSIZE bounds files in
    memory (memfd_create(2)) too."""
    _soft, hard = resource.getrlimit(what)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (value, value))


def deepen_stack(size: int) -> None:
    """The main thread of the next program gets a stack of at least `size` bytes, if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY and soft < size:
        wanted = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
