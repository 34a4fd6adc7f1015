"""The kinds of failure of an HTTP source (docs/SOURCES.md lists them), and what status codes mean. Pure."""

from email.utils import parsedate_to_datetime
from time import time
from typing import Final

from ipfsfuse.errors import SourceFailed

TIMEOUT, CONNECT, RESET, TLS, HOST, PROTOCOL = "timeout", "connect", "reset", "tls", "host", "protocol"
SHORT, LONG, STATUS, BUSY, REFUSED = "short", "long", "status", "busy", "refused"
PAGE, ENCODING, REDIRECT, CAR, FAILED = "page", "encoding", "redirect", "car", "failed"

ABSENT: Final = frozenset((404, 410, 412, 451, 504))
"""Not found, gone, not cached, withheld, not found in time. Another source may have the block."""
NOT_SUPPORTED: Final = frozenset((400, 405, 406, 415, 416, 501))
"""The server does not support such a request."""


def refused(name: str, status: int, retry: str, body: bytes) -> SourceFailed:
    """The error for a response that is neither a success nor "not here"."""
    lines = body.decode(errors="replace").strip().splitlines()
    said = f"status {status}" + (f": {one_line(lines[0])[:120]}" if lines else "")
    if status in (401, 403):
        advice = "look at the Authorization line in the file given with --header-file"
        return SourceFailed(f"{name} refused us ({said}): {advice}", REFUSED)
    if status in (429, 503):
        return SourceFailed(f"{name} is busy ({said})", BUSY, retry_after(retry))
    return SourceFailed(f"{name} failed ({said})", STATUS)


def retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header: a number or a date (RFC 9110, 10.2.3). None if it is neither."""
    if value.isascii() and value.isdigit():
        return float(value[:10])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def one_line(text: str) -> str:
    """A server's `text` for a log or a terminal: without line ends and escape codes, at most 300
    characters."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]
