"""The signals that end a process of the runner's, and the death of its parent."""

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


class Interrupted(BaseException):
    """An ending signal came while no guest ran. BaseException, as KeyboardInterrupt is: only `cli.main`
    catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_on_signals() -> None:
    """From now on, an ending signal raises Interrupted in the main thread, unless it is ignored (nohup)."""

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        raise Interrupted(number)

    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def restore_defaults() -> None:
    """From now on, an ending signal ends this process at once, unless it is ignored (nohup)."""
    for each in ENDING:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent, the process `parent`, ends; exits if it has ended
    already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def exit_by_signal(number: int) -> NoReturn:
    """Ends this process by the signal that it was sent, as shells and scripts expect; with 128 + its number
    if the signal is blocked."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
