"""All that the commands print. What is printed for people is escaped here, so that no command has to think of
it.

Names of files, messages of gateways and nodes, and arguments can hold escape codes, which a terminal would
obey, and line ends, which would forge lines. No other module of `cli` prints (ruff's rule T20 holds that).
"""

import json
import sys

from ipfsfuse.text import printable


def line(text: str) -> None:
    """One line of the command's output."""
    print(printable(text))


def note(text: str) -> None:
    """One line on standard error: a reason, a warning, progress."""
    print(printable(text), file=sys.stderr)


def values(value: object, indent: int | None = 2) -> None:
    """Output for programs: JSON in ASCII, so that every control character in it is escaped by JSON's own
    rules."""
    print(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"), flush=True)
