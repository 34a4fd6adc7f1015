"""Functions that a process of the runner calls for itself: signals, the death of its parent, open descriptors
and resource limits."""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """A signal of INTERRUPT_SIGNALS came while no guest ran. It is a BaseException, as KeyboardInterrupt is:
    only main functions (`cli`, `forkserver`) catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_on_signals() -> None:
    """From now on, a signal of INTERRUPT_SIGNALS raises Interrupted in the main thread, unless it is ignored
    (nohup)."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(number)

    handle_signals(interrupt)


def handle_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Sets the handler of the signals of INTERRUPT_SIGNALS, except those that are ignored (nohup)."""
    for each in INTERRUPT_SIGNALS:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, handler)


def ignore_signals() -> None:
    """From now on, no signal of INTERRUPT_SIGNALS ends this forked process. It ends when its work is done, or
    its owner kills it."""
    signal.set_wakeup_fd(-1)
    handle_signals(signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent, the process `parent`, ends. Exits if that has
    ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def fork(work: Callable[[], object], dies_with_us: bool = True) -> int:
    """Starts a process that runs `work` and exits with 0, or with 1 if `work` raises. Returns its number."""
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
    """Ends this process by the signal `number`, as shells and scripts expect. Exits with 128 + `number` if
    the signal is blocked."""
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
                pass  # the descriptor of the listing itself


def detach(*kept: int) -> None:
    """Closes all descriptors but `kept`; the standard streams become /dev/null. With a copy of a pipe's
    reading end in this process, the guest's writes would not fail when the reader has gone. With a copy of
    the control socket, the mount would not end."""
    null = os.open(os.devnull, os.O_RDWR)
    for own in (0, 1, 2):
        os.dup2(null, own)
    close_all_but(0, 1, 2, *kept)


# -- resource limits (setrlimit(2)) ------------------------------------------------------------------------


def limit(what: int, wanted: int) -> None:
    """Lowers a resource limit of this process to `wanted` for good. A lower limit stays. RLIMIT_DATA counts
    all private memory that the process may write to. RLIMIT_FSIZE also bounds files in memory
    (memfd_create(2))."""
    _soft, hard = resource.getrlimit(what)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(what, (value, value))


def deepen_stack(size: int) -> None:
    """Gives the main thread of the next program a stack of at least `size` bytes, if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY and soft < size:
        wanted = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
