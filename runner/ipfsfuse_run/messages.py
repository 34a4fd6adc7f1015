"""What the runner says on standard error: one line each, with every control character escaped."""

import sys

from ipfsfuse.text import printable


def say(message: object) -> None:
    """Prints `ipfsfuse-run: MESSAGE`. Names, paths and what a daemon said come from outside: none can forge a
    line."""
    print(f"ipfsfuse-run: {printable(str(message))}", file=sys.stderr)


def trap_text(name: str, trap: str) -> str:
    """Several lines: wasmtime's message and back-trace, in which function names are the module's own."""
    first, *rest = trap.strip().splitlines() or [""]
    return (
        "\n".join([f"ipfsfuse-run: {printable(name)} trapped: {printable(first)}", *map(printable, rest)])
        + "\n"
    )
