"""Runs a WASI guest with IPFS at /ipfs: beneath WASI, by a mount that it uses as any process would.

Concurrency rule: the runner's own process forks the guest's before it makes any thread, and never touches the
mount; the guest's process runs one guest and ends with it.

What stands in `__all__` is the Python interface (docs/RUNNING.md). Everything else is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipfsfuse_run.api import Asked, GuestFailed, Result, ResultsNotKept, run, run_trio
    from ipfsfuse_run.errors import GuestRefused

__all__ = ["Asked", "GuestFailed", "GuestRefused", "Result", "ResultsNotKept", "run", "run_trio"]


def __getattr__(name: str) -> object:
    """What is public is imported when it is first used: the command needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ipfsfuse_run.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
