"""Answers that are not what was asked for, in the domain's words: not here, busy, refused, failed.

Concurrency: none.
"""

from email.utils import parsedate_to_datetime
from time import time

from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.web.answer import ERROR_BODY, Answer
from ipfsfuse.sources.web.failures import BUSY, REFUSED, STATUS

ABSENT = frozenset((404, 410, 412, 451, 504))
"""Not found, gone, not cached (only-if-cached), withheld, and nobody had it in time: no word about other sources."""
UNLIKE = frozenset((400, 405, 406, 415, 416, 501))
"""The server does not answer such a question at all."""


async def declined(name: str, answer: Answer, what: str) -> NotHere | SourceFailed:
    """What `answer`, to a question for `what`, means where it is no success."""
    text = (await answer.whole(ERROR_BODY)).decode(errors="replace").strip()
    if answer.status in ABSENT:
        return NotHere(f"{name} does not have {what} (status {answer.status})")
    return refusal(name, answer, text)


def refusal(name: str, answer: Answer, text: str) -> SourceFailed:
    """What an answer that is neither a block nor "not here" means for its server."""
    said = f"status {answer.status}" + (f": {text.splitlines()[0][:120]}" if text else "")
    if answer.status in (401, 403):
        return SourceFailed(f"{name} refused us ({said}): look at the Authorization line in the file given with --header-file", REFUSED)
    if answer.status in (429, 503):
        return SourceFailed(f"{name} is busy ({said})", BUSY, retry_after(answer.headers.get("retry-after", "")))
    return SourceFailed(f"{name} failed ({said})", STATUS)


def retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header: a number of them, or a date (RFC 9110, 10.2.3)."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None
