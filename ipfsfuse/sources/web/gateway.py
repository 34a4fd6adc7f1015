"""A trustless gateway (https://specs.ipfs.tech/http-gateways/trustless-gateway/): blocks and CARs over plain HTTP.

Concurrency: as every source. Nothing is verified here.
"""

from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from time import time

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Deliver, Run
from ipfsfuse.sources.web.failures import BUSY, PAGE, REFUSED, STATUS
from ipfsfuse.sources.web.http import ERROR_BODY, Answer, Http

MAX_BLOCK = (2 << 20) + 1024
"""No block is larger than 2 MiB by the network's own rule; the rest is slack for what wraps it."""
RAW_TYPE = "application/vnd.ipld.raw"
ABSENT = frozenset((404, 410, 412, 451, 504))
"""Not found, gone, not cached (only-if-cached), withheld, and nobody had it in time: no word about other sources."""
FEW = 3
"""Runs of so few leaves are quicker block by block."""


class Gateway:
    """`local` for a node's own gateway port on this machine or one that is ours: its fastest way for a run is a range
    of the file. For a remote one it is a CAR, one request whatever the distance."""

    in_place = False

    def __init__(self, http: Http, name: str, *, local: bool = False, only_cached: bool = False, connections: int = 4) -> None:
        self.name = name
        self._http = http
        self.local = local
        self._only_cached = only_cached
        self._connections = connections
        self._whole_files = local and not only_cached  # a node looks for the rest of a file on the network
        self._cars = not only_cached

    async def get(self, cid: Cid) -> bytes:
        headers = [("Accept", RAW_TYPE)]
        if self._only_cached:
            headers.append(("Cache-Control", "only-if-cached"))
        async with self._http.ask("GET", f"/ipfs/{cids.text(cid)}?format=raw", headers) as answer:
            if answer.status == 200:
                if answer.content_type in ("text/html", "application/json"):
                    raise SourceFailed(f"{self.name} sent a page ({answer.content_type}) where a block was asked for", PAGE)
                return await answer.whole(MAX_BLOCK)
            raise await self._refusal(answer, cid)

    async def _refusal(self, answer: Answer, cid: Cid) -> NotHere | SourceFailed:
        text = (await answer.whole(ERROR_BODY)).decode(errors="replace").strip()
        if answer.status in ABSENT:
            return NotHere(f"{self.name} does not have {cids.text(cid)} (status {answer.status})")
        return refusal(self.name, answer, text)

    async def stream(self, run: Run, deliver: Deliver) -> None:
        if len(run.leaves) > FEW:
            if self._whole_files and runs.can_range(run.leaves):
                try:
                    return await runs.by_range(self._http, run, deliver, self._connections)
                except runs.NotOffered:
                    self._whole_files = False
            if self._cars and not self.local:
                try:
                    return await runs.by_car(self._http, run, deliver)
                except runs.NotOffered:
                    self._cars = False
        return await runs.by_blocks(self.get, run, deliver, self._connections)

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        await self._http.aclose()


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
