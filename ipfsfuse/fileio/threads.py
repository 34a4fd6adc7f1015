"""Runs blocking work in a worker thread, or on the event loop if no thread can be started.

A limit on processes (RLIMIT_NPROC, a cgroup's pids.max) may be reached at any time, also because of other
programs. Work on the event loop delays everything else, but nothing fails.
"""

import logging
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREADS_LOG_SECONDS = 60.0
"""Seconds between two log lines about missing threads."""

_logged = float("-inf")


async def run_sync(
    function: Callable[[*Ts], T],
    *arguments: *Ts,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """`trio.to_thread.run_sync`, but calls `function` on the event loop if no thread can be started.
    `function` must not start threads itself."""
    try:
        return await trio.to_thread.run_sync(
            function, *arguments, abandon_on_cancel=abandon_on_cancel, limiter=limiter
        )
    except RuntimeError as exc:
        if "start new thread" not in str(exc):
            raise
    _note()
    return function(*arguments)


def on_loop(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Calls `function` on the event loop, from a thread of `run_sync` or from the loop itself."""
    if trio.lowlevel.in_trio_run():
        return function(*arguments)
    return trio.from_thread.run_sync(function, *arguments)


def _note() -> None:
    global _logged
    now = trio.current_time()
    if now - _logged >= THREADS_LOG_SECONDS:
        _logged = now
        log.warning(
            "no more threads can be started (a limit on processes?): the work of one delays all others"
        )
