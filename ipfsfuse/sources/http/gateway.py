"""A trustless gateway (https://specs.ipfs.tech/http-gateways/trustless-gateway/): blocks and CARs over HTTP.

Concurrency: as every source. Nothing is verified here.
"""

from collections.abc import Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources import runs
from ipfsfuse.sources.base import Deliver, DeliverBlocks, Run, Subtree, too_large
from ipfsfuse.sources.failures import PAGE
from ipfsfuse.sources.http import fetch
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.secrets import Headers

BELIEVED = 1 << 30
"""A server that offers more bytes than that for a block does not have a large block: it lies."""
RECORD_TYPE = "application/vnd.ipfs.ipns-record"
MAX_RECORD = 10 * 1024
"""Bytes of an IPNS record (https://specs.ipfs.tech/ipns/ipns-record/#record-size-limit)."""
FEW = 3
"""Runs of so few leaves are quicker block by block."""


class Gateway:
    """`local` for a node's own gateway port on this machine: there a run is fastest as a range of the file.
    From a remote gateway it comes as a CAR, one request whatever the distance."""

    in_place = False

    def __init__(
        self, http: Http, name: str, *, local: bool = False, only_cached: bool = False, connections: int = 4
    ) -> None:
        self.name, self.local = name, local
        self._http, self._connections = http, connections
        self._headers = [("Accept", "application/vnd.ipld.raw")]
        self._headers += [("Cache-Control", "only-if-cached")] * only_cached
        self._ranges = local and not only_cached  # a node looks for the rest of a file on the network
        self._cars = not only_cached

    async def get(self, cid: Cid) -> bytes:
        async with self._http.ask("GET", f"/ipfs/{cids.text(cid)}?format=raw", self._headers) as response:
            if response.status != 200:
                raise await response.declined(self.name, cids.text(cid))
            if response.content_type in ("text/html", "application/json"):
                raise SourceFailed(f"{self.name} sent a page, {response.content_type}, not a block", PAGE)
            if cids.MAX_BLOCK < (response.left or 0) <= BELIEVED:
                raise too_large(self.name, cid, response.left)
            return await response.read(cids.MAX_BLOCK)

    async def ipns_record(self, name: str) -> bytes:
        """The newest record it has of the IPNS name `name`, unverified. Raises NotHere, SourceFailed."""
        return await ask_for_record(
            self._http, self.name, f"/ipns/{name}?format=ipns-record", self._headers[1:]
        )

    async def stream(self, run: Run, deliver: Deliver) -> None:
        if len(run.leaves) > FEW:
            if self._ranges and runs.can_range(run.leaves):
                try:
                    return await fetch.by_range(self._http, run, deliver, self._connections)
                except fetch.NotOffered:
                    self._ranges = False
            if self._cars and not self.local:
                try:
                    return await fetch.by_car(self._http, run, deliver)
                except fetch.NotOffered:
                    self._cars = False
        return await runs.by_blocks(self.get, run, deliver, self._connections)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        if self._cars:
            try:
                await fetch.by_subtree(self._http, subtree, deliver)
            except fetch.NotOffered:
                self._cars = False

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        await self._http.aclose()


async def ask_for_record(http: Http, name: str, target: str, headers: Headers = ()) -> bytes:
    """The IPNS record at `target` of the server called `name`, unverified. Raises NotHere, SourceFailed."""
    async with http.ask("GET", target, [("Accept", RECORD_TYPE), *headers]) as response:
        if response.status != 200:
            raise await response.declined(name, "that name's record")
        if response.content_type != RECORD_TYPE:
            raise NotHere(f"{name} sent no record, but {response.content_type or 'something'}")
        return await response.read(MAX_RECORD)
