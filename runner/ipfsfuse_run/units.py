"""Numbers as people write them on a command line: sizes in bytes, durations in seconds. Pure."""

import re

from ipfsfuse.errors import UsageError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]i?)?B?")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DIGITS = 20
"""What is longer is larger than every limit, and `float` would make infinity of it."""


def size(name: str, text: str) -> int:
    """Bytes: `65536`, `64KiB`, `64K` (both 65,536) or `64kB` (64,000). Raises UsageError, naming the
    option."""
    match = _SIZE.fullmatch(text)
    if match is None or len(match[1]) > _DIGITS:
        raise UsageError(f"{name}={text[:80]} is not a number of bytes (such as 65536 or 64MiB)")
    unit = match[2] or ""
    decimal = text.endswith("B") and not unit.endswith("i")
    factor = (1000 if decimal else 1024) ** _POWERS[unit[0].lower()] if unit else 1
    return int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def count(name: str, text: str) -> int:
    """A plain number. Raises UsageError."""
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise UsageError(f"{name}={text[:80]} is not a number")
    return int(text)


def duration(name: str, text: str) -> float:
    """Seconds: `10s`, `500ms`, `2m`, or a plain number of seconds. Raises UsageError."""
    match = _DURATION.fullmatch(text)
    if match is None or len(match[1]) > _DIGITS:
        raise UsageError(f"{name}={text[:80]} is not a duration (such as 10s or 500ms)")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def size_text(size: int) -> str:
    """`size` as the option takes it: `64MiB`, or plain bytes where no unit fits."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)


def duration_text(seconds: float) -> str:
    """`seconds` as the option takes it."""
    return f"{seconds:g}s" if seconds < 1e5 else f"{seconds:.0f}s"
