"""The runner's exceptions, besides those of ipfsfuse.errors, and the one-line messages that it prints on
standard error."""

import sys
from typing import TYPE_CHECKING

from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.text import printable

if TYPE_CHECKING:
    from ipfsfuse_run.supervisor import CompletedRun

COULD_NOT_RUN = 125
"""The exit code if no guest ran, the same as that of `env`, `timeout` and docker. A guest itself may exit
with 1."""
TRAPPED = 134
"""The exit code of a shell for SIGABRT, as `wasmtime run` gives."""


class GuestRefused(IpfsFuseError):
    """The guest can't be run: no such file, not WebAssembly, no entry point, an unknown import."""


class NotKept(IpfsFuseError):
    """The guest ran, but its results or its receipt could not be written or added to the library."""

    def __init__(self, message: str, run: "CompletedRun") -> None:
        super().__init__(message)
        self.run = run


class ReceiptRefused(IpfsFuseError):
    """The receipt can't be used: cut short, of a newer format, or different from its blocks."""


def say(message: object) -> None:
    """Prints `ipfsfuse-run: MESSAGE` on one line. The message is escaped, because names, paths and a daemon's
    answers come from outside and must not forge a line."""
    print(f"ipfsfuse-run: {printable(str(message))}", file=sys.stderr)


def trap_reason(name: str, trap: str) -> str:
    """The first line of `trap_text`."""
    first = (trap.strip().splitlines() or [""])[0]
    return f"{printable(name)} trapped: {printable(first)}"


def trap_text(name: str, trap: str) -> str:
    """wasmtime's message and back-trace, several lines. The module chose the function names in it."""
    rest = trap.strip().splitlines()[1:]
    return "\n".join([f"ipfsfuse-run: {trap_reason(name, trap)}", *map(printable, rest)]) + "\n"
