"""The signals that end a run, its guest and its mount with it."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1


class Ended(BaseException):
    """One of these came while no guest ran. BaseException, as KeyboardInterrupt is: only `cli.main` may catch
    it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_ended() -> None:
    """From now on, an ending signal raises Ended in the main thread; one that is ignored (nohup) stays so."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _frame: object) -> NoReturn:
    raise Ended(number)


def default() -> None:
    """From now on, an ending signal ends this process at once; one that is ignored (nohup) stays so."""
    for each in ENDING:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent, the process `parent`, is gone; ends it where that is
    so already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def leave_by(number: int) -> NoReturn:
    """Ends this process by the signal that it was sent, as shells and scripts expect; by 128 + its number if
    it is blocked."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
