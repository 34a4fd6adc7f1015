"""A trustless gateway (https://specs.ipfs.tech/http-gateways/trustless-gateway/): blocks and CARs over plain HTTP.

Concurrency: as every source. Nothing is verified here.
"""

from collections.abc import Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Deliver, DeliverBlocks, Run, Subtree
from ipfsfuse.sources.web.failures import PAGE
from ipfsfuse.sources.web.http import Http
from ipfsfuse.sources.web.refusals import declined

MAX_BLOCK = (2 << 20) + 1024
"""No block is larger than 2 MiB by the network's own rule; the rest is slack for what wraps it."""
RAW_TYPE = "application/vnd.ipld.raw"
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
            raise await declined(self.name, answer, cids.text(cid))

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

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        if self._cars:
            try:
                await runs.by_subtree(self._http, subtree, deliver)
            except runs.NotOffered:
                self._cars = False

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        await self._http.aclose()
