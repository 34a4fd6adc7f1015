"""Parses and formats sizes, durations, times and numbers, for the command line and the runner. Pure.

A wrong text raises UsageError. The message says how to write it."""

import re
from collections.abc import Iterable

from ipfsfuse.errors import UsageError

_UNITS = {"": 1, "b": 1} | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", 1)}
_UNITS |= {
    f"{prefix}{ending}": 1024**power for power, prefix in enumerate("kmgtp", 1) for ending in ("ib", "i", "")
}
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]*)", re.ASCII)

MAX_SIZE = (1 << 63) - 1


def size(text: str) -> int:
    """Bytes, at least 1: `10GiB`, `500MB`, `64K` (binary, as in dd), `1073741824`."""
    value = size_or_zero(text)
    if value == 0:
        raise UsageError(f"{text!r} is too small a size: it must be more than 0")
    return value


def size_or_zero(text: str) -> int:
    """Like `size`, but 0 is allowed."""
    value = _scaled(text, _UNITS)
    if value is None:
        raise UsageError(f"{text[:80]!r} is not a size: write it as 10GiB, 500MB or a number of bytes")
    if value > MAX_SIZE:
        raise UsageError(f"{text!r} is too large a size: it must be less than 8 EiB")
    return int(value)


def duration(text: str) -> float:
    """Seconds: `30s`, `5m`, `250ms`, `2h`, `30`."""
    value = _scaled(text, _SECONDS)
    if value is None:
        raise UsageError(f"{text[:80]!r} is not a duration: write it as 30s, 5m or a number of seconds")
    if not 0 < value <= 86400 * 366:
        raise UsageError(f"{text!r} can't be used as a duration: it must be more than 0 and at most a year")
    return value


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise UsageError(f"{text[:80]!r} is not a number: it must be a whole number, 0 or more")
    return int(text)


def owner(text: str) -> int:
    """The number of a user or a group. The largest 32-bit number is not allowed: to the kernel it means that
    there is none."""
    number = count(text)
    if number > (1 << 32) - 2:
        raise UsageError(f"{text} is not a number of a user or group: {(1 << 32) - 2} is the largest")
    return number


def address(text: str) -> tuple[str, int]:
    """(host, port) to listen at: HOST:PORT, [IPv6]:PORT, or PORT, which means 127.0.0.1."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--listen {text}: write HOST:PORT, as in 127.0.0.1:8080")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def host_name(text: str) -> str:
    """A host name as browsers send it: ASCII, without a port."""
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", text, re.ASCII | re.IGNORECASE):
        raise UsageError(
            f"{text[:200]!r} is not a host name: write it without a scheme and a port, as ipfs.example, and "
            "other letters than a to z in punycode (xn--)"
        )
    return text


def names_this_machine(host: str, others: Iterable[str] = ()) -> bool:
    """Whether `host`, a Host header, is an address, names this machine, or is one of `others`.

    With DNS rebinding, a web page lets its own name point to this machine. Its requests then have that name
    in the header."""
    import socket  # late: a starting guest would wait for these imports
    from ipaddress import ip_address
    from urllib.parse import urlsplit

    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
        known = ("localhost", socket.gethostname().lower(), *(each.lower().rstrip(".") for each in others))
        return name in known or name.endswith(".localhost") or bool(ip_address(name))
    except ValueError:
        return False


def octal(text: str) -> int:
    """Permission bits: `022`."""
    if not re.fullmatch("0?o?[0-7]{1,4}", text, re.ASCII):
        raise UsageError(f"{text[:80]!r} is not a mode: write it in octal, as 022")
    return int(text, 8)


def _scaled(text: str, units: dict[str, int] | dict[str, float]) -> float | None:
    match = _NUMBER.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        return None
    return int(match[1]) * factor if match[1].isdigit() else float(match[1]) * factor


def timestamp(seconds: float) -> str:
    """`seconds` since 1970 in ISO 8601, in UTC: `2026-01-31T12:00:00+00:00`. A time outside the years 1 to
    9999 gives the first or the last one."""
    from datetime import UTC, datetime  # late: a starting guest would wait for this import

    return datetime.fromtimestamp(min(max(seconds, _YEAR_1), _YEAR_9999), UTC).isoformat("T", "seconds")


_YEAR_1, _YEAR_9999 = -62135596800, 253402300799


def human(count: float) -> str:
    """`count` bytes as text: 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def size_text(size: int) -> str:
    """`size` as text that `size_or_zero` can parse: `64MiB`, or the number of bytes if no unit fits."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)


def duration_text(seconds: float) -> str:
    """`seconds` as text that `duration` can parse."""
    return f"{seconds:g}s" if seconds < 1e5 else f"{seconds:.0f}s"
