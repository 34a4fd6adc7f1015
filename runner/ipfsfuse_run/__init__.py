"""Runs a WASI guest with IPFS at /ipfs. The guest reads a FUSE mount, as any process does, so nothing in WASI
is replaced.

The runner's process forks the guest's process before it starts any thread, and never touches the mount. The
guest's process runs one guest and ends with it.

`__all__` is the Python interface (docs/RUNNING.md). Everything else is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipfsfuse_run.api import Asked, GuestFailed, Result, ResultsNotKept, run, run_trio
    from ipfsfuse_run.errors import GuestRefused

__all__ = ["Asked", "GuestFailed", "GuestRefused", "Result", "ResultsNotKept", "run", "run_trio"]


def __getattr__(name: str) -> object:
    """Imports the Python interface when it is first used, because the command needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ipfsfuse_run.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
