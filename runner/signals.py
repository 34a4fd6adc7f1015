"""The signals that end a run, its guest and its mount with it."""

import os
import signal
import sys
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """One of these came while no guest ran. BaseException, as KeyboardInterrupt is: only `cli.main` may catch it."""

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


def leave_by(number: int) -> NoReturn:
    """Ends this process by the signal that it was sent, as shells and scripts expect; by 128 + its number if it is blocked."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    sys.exit(128 + number)
