"""A trustless gateway (https://specs.ipfs.tech/http-gateways/trustless-gateway/): blocks, ranges of files,
and CARs.

The caller verifies blocks. A slow reader slows the request down.
"""

import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing, suppress
from functools import partial

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.car import StreamParser
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources import streams
from ipfsfuse.sources.base import LeafRange, Source, Subtree
from ipfsfuse.sources.http.client import Http, Response
from ipfsfuse.sources.http.failures import LONG, NOT_SUPPORTED, PAGE, STATUS
from ipfsfuse.sources.http.settings import Headers
from ipfsfuse.sources.streams import Delivery, Leases, Send

BELIEVED = 1 << 30
"""If a server offers more bytes than this for a block, that is a wrong answer and not a large block."""
MAX_SINGLE_LEAVES = 3
"""So few leaves come faster as single blocks than as a range."""
RECORD_TYPE = "application/vnd.ipfs.ipns-record"
MAX_RECORD = 10 * 1024
"""Bytes of an IPNS record (https://specs.ipfs.tech/ipns/ipns-record/#record-size-limit)."""
RANGES, CARS = "ranges of files", "CARs"
CAR_TYPE = "application/vnd.ipld.car"
SECTIONS = 1000
"""Sections of a CAR that are parsed and sent on in one step of the event loop."""
RANGE_PART = 16 << 20
"""A range of a file is cut into requests of at least so many bytes."""
CONNECTIONS_HERE, CONNECTIONS_FAR = 2, 4
"""Requests at a time of one call for many blocks. For a node on this machine with 2 cores, a second request
gained 5 to 25 % over 64 MiB, a third nothing."""


class NotOffered(SourceFailed):
    """The server does not support such a request. Another kind may work."""


class CarTooLong(SourceFailed):
    """The server sent far more bytes than the requested blocks have."""


class Gateway(Source):
    """A gateway. `local` means the gateway port of a node on this machine, from which leaves come fastest as
    a range of their file. From a remote gateway they come as a CAR: one request, whatever the distance. With
    `only_cached` the server must not fetch blocks itself."""

    def __init__(self, http: Http, name: str, *, local: bool = False, only_cached: bool = False) -> None:
        self.name, self.local = name, local
        self._http, self._connections = http, CONNECTIONS_HERE if local else CONNECTIONS_FAR
        self._headers = [("Accept", "application/vnd.ipld.raw")]
        self._headers += [("Cache-Control", "only-if-cached")] * only_cached
        # for the rest of a file, or of a directory, a node would ask its network
        self._offers = set[str]() if only_cached else {RANGES, CARS}

    async def get(self, cid: Cid) -> bytes:
        async with self._http.ask("GET", f"/ipfs/{cids.text(cid)}?format=raw", self._headers) as response:
            if response.status != 200:
                raise await response.refused(self.name, cids.text(cid))
            if response.content_type in ("text/html", "application/json"):
                raise SourceFailed(f"{self.name} sent a page, {response.content_type}, not a block", PAGE)
            if cids.MAX_BLOCK < (response.left or 0) <= BELIEVED:
                raise cids.too_large(self.name, cid, response.left)
            return await response.read(cids.MAX_BLOCK)

    async def ipns_record(self, name: str) -> bytes:
        """The newest record it has of the IPNS name `name`, unverified. Raises NotHere, SourceFailed."""
        target = f"/ipns/{name}?format=ipns-record"
        return await ask_for_record(self._http, self.name, target, self._headers[1:])

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        if len(wanted.leaves) > MAX_SINGLE_LEAVES and (RANGES if self.local else CARS) in self._offers:
            with suppress(NotOffered):
                if not self.local:
                    return await self._send_car_of_range(wanted, send)
                if streams.can_range(wanted.leaves):
                    return await self._send_ranges(wanted, send)
        return await streams.send_singly(self.get, wanted.leaves, send, self._connections)

    async def send_subtree(self, subtree: Subtree, send: Send[streams.BlockBatch]) -> None:
        if CARS in self._offers:
            scope = f"dag-scope={'all' if subtree.whole else 'entity'}"
            with suppress(NotOffered, CarTooLong):  # the blocks before the limit are of use
                async with aclosing(self._car(subtree.root, scope, subtree.limit)) as car:
                    async for blocks in car:
                        await send.send(blocks)

    async def aclose(self) -> None:
        await self._http.aclose()

    # -- several blocks by one request -------------------------------------------------------------------

    async def _send_ranges(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        """Fetches the file's bytes by HTTP ranges and cuts them into leaves. `streams.can_range` must hold.
        Raises NotOffered, SourceFailed."""
        count, size = len(wanted.leaves), sum(leaf.size for leaf in wanted.leaves)
        parts = max(1, min(self._connections, size // RANGE_PART))
        bounds = [count * part // parts for part in range(parts + 1)]

        async def send_part(start: int, end: int) -> None:
            leaves = wanted.leaves[start:end]
            first, last = leaves[0].offset, leaves[-1].offset + leaves[-1].size - 1
            target, header = f"/ipfs/{cids.text(wanted.file)}", ("Range", f"bytes={first}-{last}")
            share = self._http.share
            async with self._http.ask("GET", target, [header]) as response:
                given = response.headers.get("content-range", "")
                if response.status != 206 or not given.startswith(f"bytes {first}-"):
                    raise await self._not_offered(response, wanted.file, RANGES)
                segments = streams.segments_of(leaves)
                if self._http.settings.rate is not None:  # a reader waits only for the leaf that it needs
                    segments = ((index, [leaf]) for index, leaf in enumerate(leaves))
                with closing(Leases(share.give)) as leases:
                    for index, segment in segments:
                        sizes = [leaf.size for leaf in segment]
                        await share.take(sum(sizes))
                        release = leases.take(sum(sizes))
                        blocks = await response.receive_into(sizes)
                        await send.send(Delivery(start + index, blocks, release))

        await streams.all_of([partial(send_part, *part) for part in itertools.pairwise(bounds)])

    async def _send_car_of_range(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        """Fetches the blocks by a CAR of the range. Drops other blocks. Missing blocks are not an error here.
        Raises NotOffered, NotHere, SourceFailed."""
        first, last = wanted.leaves[0], wanted.leaves[-1]
        end = max(first.offset, last.offset + last.size - 1)
        indexes: dict[bytes, list[int]] = {}
        for index, leaf in enumerate(wanted.leaves):
            indexes.setdefault(cids.multihash(leaf.cid), []).append(index)
        limit = 2 * sum(leaf.size for leaf in wanted.leaves) + (8 << 20)
        scope = f"dag-scope=entity&entity-bytes={first.offset}:{end}"
        async with aclosing(self._car(wanted.file, scope, limit)) as car:
            async for blocks in car:
                for cid, block in blocks:
                    for index in indexes.pop(cids.multihash(cid), ()):
                        await send.send(Delivery(index, [block]))
                if not indexes:
                    return

    async def _car(self, root: Cid, scope: str, limit: int) -> AsyncGenerator[Sequence[tuple[Cid, bytes]]]:
        """The blocks of a CAR, some at a time, until it ends, which may be early.
        Raises NotOffered, NotHere, SourceFailed, and CarTooLong after `limit` bytes."""
        accept = ("Accept", f"{CAR_TYPE}; version=1; order=dfs; dups=n")
        parser = StreamParser()
        async with self._http.ask("GET", f"/ipfs/{cids.text(root)}?format=car&{scope}", [accept]) as response:
            if response.status != 200 or response.content_type != CAR_TYPE:
                raise await self._not_offered(response, root, CARS)
            while piece := await response.receive():
                found = parser.feed(piece)
                while blocks := list(itertools.islice(found, SECTIONS)):
                    yield blocks
                    await trio.lowlevel.checkpoint()
                limit -= len(piece)
                if limit < 0:
                    raise CarTooLong(f"{self.name} sent far more blocks than were asked for", LONG)

    async def _not_offered(self, response: Response, root: Cid, what: str) -> NotHere | SourceFailed:
        """The error for a response without `what` (RANGES, CARS). If the server does not offer it, it is not
        requested again."""
        if response.status not in (200, 206):
            refused = await response.refused(self._http.origin.text, cids.text(root))
            if response.status not in NOT_SUPPORTED:
                return refused
        self._offers.discard(what)
        return NotOffered(f"{self._http.origin.text} gives no {what} (status {response.status})", STATUS)


async def ask_for_record(http: Http, name: str, target: str, headers: Headers = ()) -> bytes:
    """The unverified IPNS record at `target` of the server called `name`. Raises NotHere, SourceFailed."""
    async with http.ask("GET", target, [("Accept", RECORD_TYPE), *headers]) as response:
        if response.status != 200:
            raise await response.refused(name, "that name's record")
        if response.content_type != RECORD_TYPE:
            raise NotHere(f"{name} sent no record, but {response.content_type or 'something'}")
        return await response.read(MAX_RECORD)
