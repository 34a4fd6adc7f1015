"""A trustless gateway (https://specs.ipfs.tech/http-gateways/trustless-gateway/): blocks, ranges of files,
and CARs.

Nothing is verified here. A slow reader slows the request down.
"""

import functools
import itertools
from collections.abc import Awaitable, Callable, Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.car import StreamParser
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources import leaf_ranges
from ipfsfuse.sources.base import Block, Deliver, DeliverBlocks, LeafRange, Subtree, too_large
from ipfsfuse.sources.http.client import ERROR_BODY, Http, Response, translated
from ipfsfuse.sources.http.failures import LONG, NOT_SUPPORTED, PAGE, STATUS
from ipfsfuse.sources.http.settings import Headers

BELIEVED = 1 << 30
"""A server that offers more bytes than that for a block does not have a large block: it lies."""
FEW = 3
"""Ranges of so few leaves are faster block by block."""
RECORD_TYPE = "application/vnd.ipfs.ipns-record"
MAX_RECORD = 10 * 1024
"""Bytes of an IPNS record (https://specs.ipfs.tech/ipns/ipns-record/#record-size-limit)."""
CAR_TYPE = "application/vnd.ipld.car"
SECTIONS = 1000
"""Sections of a CAR that are parsed and handed on in one step of the event loop."""
RANGE_PART = 16 << 20
"""A range of a file is cut into requests of at least so many bytes."""

Take = Callable[[Sequence[tuple[Cid, bytes]]], Awaitable[bool]]


class NotOffered(SourceFailed):
    """The server does not support such a request. Its health does not suffer: another kind may work."""


class Gateway:
    """`local` for a node's own gateway port on this machine: there leaves come fastest as a range of their
    file. From a remote gateway they come as a CAR, by one request whatever the distance. With `only_cached`
    the server is asked not to fetch anything itself."""

    in_place = False

    def __init__(
        self, http: Http, name: str, *, local: bool = False, only_cached: bool = False, connections: int = 4
    ) -> None:
        self.name, self.local = name, local
        self._http, self._connections = http, connections
        self._headers = [("Accept", "application/vnd.ipld.raw")]
        self._headers += [("Cache-Control", "only-if-cached")] * only_cached
        self._ranges = local and not only_cached  # for the rest of a file a node would ask its network
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
        target = f"/ipns/{name}?format=ipns-record"
        return await ask_for_record(self._http, self.name, target, self._headers[1:])

    async def stream(self, wanted: LeafRange, deliver: Deliver) -> None:
        if len(wanted.leaves) > FEW:
            if self._ranges and leaf_ranges.can_range(wanted.leaves):
                try:
                    return await self._by_range(wanted, deliver)
                except NotOffered:
                    self._ranges = False
            if self._cars and not self.local:
                try:
                    return await self._by_car(wanted, deliver)
                except NotOffered:
                    self._cars = False
        return await leaf_ranges.by_blocks(self.get, wanted, deliver, self._connections)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        async def take(blocks: Sequence[tuple[Cid, bytes]]) -> bool:
            await deliver(blocks)
            return True

        if self._cars:
            scope = f"dag-scope={'all' if subtree.whole else 'entity'}"
            try:
                await self._car(subtree.root, scope, subtree.limit, take)
            except NotOffered:
                self._cars = False

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        await self._http.aclose()

    # -- several blocks by one request -------------------------------------------------------------------

    async def _by_range(self, wanted: LeafRange, deliver: Deliver) -> None:
        """The file's bytes by HTTP ranges, cut where its leaves end (`leaf_ranges.can_range` must hold).
        Raises NotOffered, SourceFailed."""
        count, size = len(wanted.leaves), sum(leaf.size for leaf in wanted.leaves)
        parts = max(1, min(self._connections, size // RANGE_PART))
        bounds = [count * part // parts for part in range(parts + 1)]

        async def fetch(start: int, end: int) -> None:
            leaves = wanted.leaves[start:end]
            first, last = leaves[0].offset, leaves[-1].offset + leaves[-1].size - 1
            target, header = f"/ipfs/{cids.text(wanted.file)}", ("Range", f"bytes={first}-{last}")
            async with self._http.ask("GET", target, [header]) as response:
                given = response.headers.get("content-range", "")
                if response.status == 206 and not given.startswith(f"bytes {first}-"):
                    raise NotOffered(
                        f"{self._http.origin.text} gives another range than was asked for", STATUS
                    )
                if response.status != 206:
                    raise await self._not_offered(response, wanted.file, "ranges of files")

                async def read(some: Sequence[Leaf]) -> tuple[Sequence[Block], Callable[[], None]]:
                    return await response.receive_into([leaf.size for leaf in some]), response.detach()

                async def give(index: int, blocks: Sequence[Block]) -> None:
                    await deliver(start + index, blocks)

                await leaf_ranges.in_stretches(leaves, read, give)

        await leaf_ranges.all_of([functools.partial(fetch, *part) for part in itertools.pairwise(bounds)])

    async def _by_car(self, wanted: LeafRange, deliver: Deliver) -> None:
        """The blocks by a CAR of the range. Other blocks in it are dropped; missing ones are not an error
        here. Raises NotOffered, NotHere, SourceFailed."""
        first, last = wanted.leaves[0], wanted.leaves[-1]
        end = max(first.offset, last.offset + last.size - 1)
        indexes: dict[bytes, list[int]] = {}
        for index, leaf in enumerate(wanted.leaves):
            indexes.setdefault(cids.multihash(leaf.cid), []).append(index)

        async def take(blocks: Sequence[tuple[Cid, bytes]]) -> bool:
            for cid, block in blocks:
                for index in indexes.pop(cids.multihash(cid), ()):
                    await deliver(index, [block])
            return bool(indexes)

        limit = 2 * sum(leaf.size for leaf in wanted.leaves) + (8 << 20)
        scope = f"dag-scope=entity&entity-bytes={first.offset}:{end}"
        if await self._car(wanted.file, scope, limit, take):
            raise SourceFailed(
                f"{self._http.origin.text} sent far more than the blocks that were asked for", LONG
            )

    async def _car(self, root: Cid, scope: str, limit: int, take: Take) -> bool:
        """Gives the blocks of a CAR to `take` until that returns False. True if the CAR exceeds `limit`
        bytes; one that ends early is not an error here. Raises NotOffered, NotHere, SourceFailed."""
        parser, accept = StreamParser(), ("Accept", f"{CAR_TYPE}; version=1; order=dfs; dups=n")
        async with self._http.ask("GET", f"/ipfs/{cids.text(root)}?format=car&{scope}", [accept]) as response:
            if response.status != 200 or response.content_type != CAR_TYPE:
                raise await self._not_offered(response, root, "CARs")
            while limit >= 0 and (piece := await response.receive()):
                limit -= len(piece)
                found = parser.feed(piece)
                while True:
                    with translated(self._http.origin.text):
                        blocks = list(itertools.islice(found, SECTIONS))
                    if not blocks:
                        break
                    if not await take(blocks):
                        return False
                    await trio.lowlevel.checkpoint()
        return limit < 0

    async def _not_offered(self, response: Response, root: Cid, what: str) -> NotHere | SourceFailed:
        """The error for a response that does not contain `what`."""
        if response.status != 200 and response.status not in NOT_SUPPORTED:
            return await response.declined(self._http.origin.text, cids.text(root))
        if response.status != 200:
            await response.read(ERROR_BODY)
        return NotOffered(f"{self._http.origin.text} gives no {what} (status {response.status})", STATUS)


async def ask_for_record(http: Http, name: str, target: str, headers: Headers = ()) -> bytes:
    """The IPNS record at `target` of the server called `name`, unverified. Raises NotHere, SourceFailed."""
    async with http.ask("GET", target, [("Accept", RECORD_TYPE), *headers]) as response:
        if response.status != 200:
            raise await response.declined(name, "that name's record")
        if response.content_type != RECORD_TYPE:
            raise NotHere(f"{name} sent no record, but {response.content_type or 'something'}")
        return await response.read(MAX_RECORD)
