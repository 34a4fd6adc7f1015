"""Numbers as people write them on a command line: sizes in bytes, durations in seconds. Pure."""

import re

from ipfsfuse.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def size(name: str, text: str) -> int:
    """Bytes: `65536`, `64KiB`, `64K` (both 65,536) or `64kB` (64,000). Raises UsageError, naming the option."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{name}={text} is no number of bytes (such as 65536 or 64MiB)")
    unit = match[2] or ""
    decimal = text.endswith("B") and not unit.endswith("i")
    base = 1000 if decimal else 1024
    return int(float(match[1]) * base ** _POWERS[unit[0].lower()]) if unit else int(float(match[1]))


def count(name: str, text: str) -> int:
    """A plain number. Raises UsageError."""
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise UsageError(f"{name}={text} is no number")
    return int(text)


def duration(name: str, text: str) -> float:
    """Seconds: `10s`, `500ms`, `2m`, or a plain number of seconds. Raises UsageError."""
    match = _DURATION.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{name}={text} is no duration (such as 10s or 500ms)")
    return float(match[1]) * _SECONDS[match[2] or "s"]
