"""Callers that were interrupted while a handler waits for them.

libfuse's interrupt flag is not exposed by pyfuse3, but a signal that waits for a process stands in
/proc/<pid>/status. One task looks at the callers that wait, five times a second, and cancels the handlers of
those that have one pending.
"""

import contextlib
import re
from collections.abc import Iterator

import trio

from ipfsfuse.errors import Interrupted

INTERVAL = 0.2
"""Seconds between looks: a caller is free well within one second."""
AT_ONCE = 50
"""Callers that are looked at before other tasks have their turn: 1 to 2 ms."""


class Interrupts:
    """The handlers that wait, by caller. `run` must be running."""

    def __init__(self) -> None:
        self._waiting: dict[trio.CancelScope, int] = {}
        self._some = trio.Event()

    @contextlib.contextmanager
    def watch(self, pid: int) -> Iterator[None]:
        """Raises Interrupted within the block's wait if `pid` (a thread's id; 0 if unknown) has a signal
        pending."""
        if pid <= 0:
            yield
            return
        with trio.CancelScope() as scope:
            self._waiting[scope] = pid
            self._some.set()
            try:
                yield
                return
            finally:
                del self._waiting[scope]
        if scope.cancelled_caught:
            raise Interrupted("the caller was interrupted")

    async def run(self) -> None:
        """Looks after the callers that wait, until cancelled; sleeps without a timer while nobody does."""
        spent = 0.0
        while True:
            await self._some.wait()
            await trio.sleep(max(INTERVAL, 4 * spent))  # a fifth of the time for it, at most
            began = trio.current_time()
            pending: dict[int, bool] = {}
            for scope, pid in list(self._waiting.items()):
                if pid not in pending:
                    pending[pid] = signal_pending(pid)
                    if len(pending) % AT_ONCE == 0:
                        await trio.lowlevel.checkpoint()
                if pending[pid] and scope in self._waiting:
                    scope.cancel()
            spent = trio.current_time() - began
            if not self._waiting:
                self._some = trio.Event()


def signal_pending(pid: int) -> bool:
    """True if the thread `pid` has a signal pending that it does not block. False if it can't be told."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as status:
            found = _MASKS.search(status.read(1 << 16))
    except OSError:
        return False
    if found is None:
        return False
    own, shared, blocked = (int(mask, 16) for mask in found.groups())
    return bool((own | shared) & ~blocked)


_MASKS = re.compile(rb"\nSigPnd:\s*([0-9a-f]+)\nShdPnd:\s*([0-9a-f]+)\nSigBlk:\s*([0-9a-f]+)\n")
