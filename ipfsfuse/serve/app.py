"""The trustless gateway as an ASGI application (https://asgi.readthedocs.io/en/latest/specs/www.html).

Concurrency: one task for each request. It is cancelled if its client disconnects. At most MAX_REQUESTS are
answered at a time. Others wait.
"""

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import trio

from ipfsfuse.dag import car, varint
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import (
    IpfsFuseError,
    NotADirectory,
    NotFound,
    NotHere,
    SourceFailed,
    StoreFailed,
    Unavailable,
    Unsupported,
    WrongRecord,
)
from ipfsfuse.serve import dag_stream
from ipfsfuse.serve import request as requests
from ipfsfuse.serve.dag_stream import ResolvedPath, Span
from ipfsfuse.serve.request import CAR, RAW, RECORD, GatewayRequest, Refused
from ipfsfuse.sources.names import record as records
from ipfsfuse.sources.names.record import KeyName, Record
from ipfsfuse.text import printable
from ipfsfuse.units import names_this_machine

log = logging.getLogger("ipfsfuse.serve")

MAX_REQUESTS: Final = 64
WAIT_SECONDS: Final = 10.0
"""A request waits for so long. Then the answer is 503, with Retry-After."""
WHOLE_ANSWER_SECONDS: Final = 3600.0
"""The longest answer. Then it is cut off. The client can use the blocks that came, and request the rest."""
SEND_BYTES: Final = 64 << 10
"""Small blocks are sent together, in pieces of so many bytes."""
SEND_SECONDS: Final = 30.0
"""The time for a client to receive SEND_BYTES: at least 2 KiB a second."""
IMMUTABLE: Final = "public, max-age=29030400, immutable"

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = dict[str, str]


GetBlock = Callable[[Cid, bool], Awaitable[bytes]]
"""(cid, fetch) -> the verified block. Without `fetch`, raises NotHere if the block is not here. With it,
raises the errors of the cache."""
GetRecord = Callable[[KeyName, bool], Awaitable[bytes]]
"""(name, fetch) -> the newest IPNS record, unverified; without `fetch` the newest that is here.

Raises NotHere, Unavailable."""


@dataclass
class Served:
    """Counts since the start, for `status`."""

    requests: int = 0
    refused: int = 0
    """Requests that were answered with an error, also because a block is not here."""
    broken: int = 0
    """Answers that were cut off: a block was missing, or the answer took too long or was too large."""
    blocks: int = 0
    bytes: int = 0
    """Bytes of blocks and records."""


class TrustlessGateway:
    def __init__(
        self,
        get_block: GetBlock,
        get_record: GetRecord,
        *,
        fetch: bool = False,
        hosts: Collection[str] | None = None,
    ) -> None:
        """With `fetch`, missing blocks are fetched from the sources. `hosts` are the host names under which
        it answers, besides addresses and this machine's own names; None for any name."""
        self._get_block, self._get_record, self._fetch = get_block, get_record, fetch
        self._hosts = hosts
        self._limiter = trio.CapacityLimiter(MAX_REQUESTS)
        self.served = Served()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, until its client disconnects."""
        if scope["type"] != "http":  # a websocket: to close it before it is open refuses it
            await send({"type": "websocket.close"})
            return
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            nursery.cancel_scope.deadline = trio.current_time() + WHOLE_ANSWER_SECONDS
            await self._answer(scope, _Response(send, scope["method"] == "HEAD"))
            nursery.cancel_scope.cancel()

    async def _answer(self, scope: Scope, reply: "_Response") -> None:
        self.served.requests += 1
        try:
            if self._hosts is not None:
                _check_host(scope, self._hosts)
            _check_method(scope)
            wanted = requests.parse(scope["raw_path"], scope["query_string"], scope["headers"])
            with trio.move_on_after(WAIT_SECONDS) as waiting:
                await self._limiter.acquire()
            if waiting.cancelled_caught:
                raise Refused(503, "there are too many requests: come again in a moment")
            try:
                give = {RAW: self._raw, CAR: self._car, RECORD: self._record}[wanted.format]
                await give(wanted, reply)
            finally:
                self._limiter.release()
        except Exception as exc:
            if reply.begun:
                self.served.broken += 1
                log.info("an answer was cut off: %s", printable(str(exc)))
                raise Broken from exc
            self.served.refused += 1
            await reply.refuse(*_refusal(exc))

    async def _block(self, wanted: GatewayRequest, cid: Cid) -> bytes:
        try:
            block = await self._get_block(cid, self._fetch and not wanted.only_if_cached)
        except NotHere as exc:
            if wanted.only_if_cached:
                raise Refused(412, str(exc)) from exc
            raise
        self.served.blocks += 1
        self.served.bytes += len(block)
        return block

    # -- one block -------------------------------------------------------------------------------------------

    async def _raw(self, wanted: GatewayRequest, reply: "_Response") -> None:
        text = cids.text(wanted.root)
        headers = _common(wanted, text, f'"{text}.raw"') | {"accept-ranges": "bytes", "content-type": RAW}
        unchanged = _is_unchanged(wanted, headers)
        if unchanged and "*" not in wanted.if_none_match:
            return await reply.start(304, headers, end=True)
        block = await self._block(wanted, wanted.root)
        if unchanged:  # "*" matches if the block is here (RFC 9110, section 13.1.2)
            return await reply.start(304, headers, end=True)
        if wanted.range is None:
            return await reply.whole(200, headers, block)
        part = requests.slice_of(wanted.range, len(block))
        if part is None:
            return await reply.refuse(416, "no such bytes", {"content-range": f"bytes */{len(block)}"})
        headers["content-range"] = f"bytes {part[0]}-{part[1] - 1}/{len(block)}"
        return await reply.whole(206, headers, block[part[0] : part[1]])

    # -- CARs ------------------------------------------------------------------------------------------------

    async def _car(self, wanted: GatewayRequest, reply: "_Response") -> None:
        async def get(cid: Cid) -> bytes:
            return await self._block(wanted, cid)

        resolved = await dag_stream.find(get, wanted.root, wanted.names)
        if cids.inline_block(resolved.entity) is None:
            await get(resolved.entity)  # reports a missing block before the answer begins
        headers = _common(wanted, cids.text(resolved.entity), _tag(wanted, resolved))
        dups = "y" if wanted.dups else "n"
        headers["content-type"] = f"{CAR}; version=1; order=dfs; dups={dups}"
        headers["accept-ranges"] = "none"
        if _is_unchanged(wanted, headers):
            return await reply.start(304, headers, end=True)
        await reply.start(200, headers)
        pieces, size = [car.encode_header([resolved.entity])], 0
        span = Span(wanted.first, wanted.last)
        async for cid, block in dag_stream.blocks(get, resolved, wanted.scope, span, wanted.dups):
            if reply.head:
                break
            pieces += [varint.put(len(cid) + len(block)), cid, block]
            size += len(block)
            if size >= SEND_BYTES:
                await reply.send(b"".join(pieces))
                pieces, size = [], 0
        return await reply.send(b"".join(pieces), end=True)

    # -- IPNS records ----------------------------------------------------------------------------------------

    async def _record(self, wanted: GatewayRequest, reply: "_Response") -> None:
        name = records.parse_name(wanted.name)
        if not isinstance(name, KeyName):
            raise Refused(400, f"{wanted.name[:200]!r} is not the name of a key")
        try:
            data = await self._get_record(name, self._fetch and not wanted.only_if_cached)
            found = records.verify(name, data)
            seconds = _seconds_left(found)
            if seconds <= 0:
                raise NotHere(f"{name}: the record that is here has expired")
        except (NotHere, WrongRecord) as exc:
            raise Refused(412 if wanted.only_if_cached else 404, str(exc)) from exc
        self.served.bytes += len(data)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = _common(wanted, "", tag) | {"content-type": RECORD}
        headers["cache-control"] = f"public, max-age={seconds}"
        if _is_unchanged(wanted, headers):
            return await reply.start(304, headers, end=True)
        return await reply.whole(200, headers, data)


class Broken(Exception):
    """An answer has begun and can't be completed. The server closes the connection, so that the client
    notices."""


_STATUSES: Final = (
    (Unavailable, 504), (SourceFailed, 502), (StoreFailed, 502), (Unsupported, 501),
    (NotHere, 404), (NotFound, 404), (NotADirectory, 404), (IpfsFuseError, 500),
)  # fmt: skip
"""The status for each error. The first that fits is used."""


def _refusal(exc: Exception) -> tuple[int, str]:
    """The status and the line of text to answer."""
    if isinstance(exc, Refused):
        return exc.status, str(exc)
    status = next((status for kind, status in _STATUSES if isinstance(exc, kind)), None)
    if status is None:
        log.error("a request failed unexpectedly", exc_info=exc)
        return 500, "this gateway failed unexpectedly: its log says more"
    return status, str(exc)


def _check_host(scope: Scope, hosts: Collection[str]) -> None:
    """Raises Refused for a wrong Host header. A request without one does not come from a browser."""
    for name, value in scope["headers"]:
        host = value.decode("latin-1")
        if name == b"host" and not names_this_machine(host, hosts):
            raise Refused(
                403,
                f"{host[:200]!r} is not a name of this gateway. A web page could use any name, so ask by the "
                "address itself or as localhost, or start the gateway with --allow-host NAME",
            )


def _check_method(scope: Scope) -> None:
    if scope["method"] not in ("GET", "HEAD"):
        raise Refused(405, "this gateway is read-only: GET and HEAD")
    if any(
        name in (b"content-length", b"transfer-encoding") and value != b"0"
        for name, value in scope["headers"]
    ):
        raise Refused(413, "a request has no body here")


def _common(wanted: GatewayRequest, root: str, tag: str) -> Headers:
    """The headers of every successful answer."""
    stem = root or wanted.name
    return {
        "etag": tag,
        "cache-control": IMMUTABLE,
        "content-disposition": requests.disposition(wanted, stem),
        "x-content-type-options": "nosniff",
        "x-ipfs-path": _header(wanted.path),
        "vary": "Accept",
    } | ({"x-ipfs-roots": root} if root else {})


def _header(text: str) -> str:
    """`text` as the value of a header: other characters are percent-encoded."""
    return "".join(
        c if "!" <= c <= "~" else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape"))
        for c in text
    )


def _tag(wanted: GatewayRequest, resolved: ResolvedPath) -> str:
    """The ETag of a CAR. It is weak, and covers all options of the request."""
    asked = (wanted.root, wanted.names, wanted.scope, wanted.first, wanted.last, wanted.dups)
    return f'W/"{cids.text(resolved.entity)}.car.{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}"'


def _is_unchanged(wanted: GatewayRequest, headers: Headers) -> bool:
    weak = headers["etag"].removeprefix("W/")
    return any(tag == "*" or tag.removeprefix("W/") == weak for tag in wanted.if_none_match)


def _seconds_left(record: Record) -> int:
    left = record.validity - time.time_ns()
    return min(left, max(record.ttl, records.NANOSECONDS)) // records.NANOSECONDS


class _Response:
    """The answer to one request."""

    def __init__(self, send: Send, head: bool) -> None:
        self._send = send
        self.head = head
        """Whether only the headers are wanted."""
        self.begun = False

    async def start(self, status: int, headers: Headers, *, end: bool = False) -> None:
        self.begun = True
        await self._send({
            "type": "http.response.start",
            "status": status,
            "headers": [(key.encode(), value.encode("latin-1")) for key, value in headers.items()],
        })  # fmt: skip
        if end:
            await self.send(b"", end=True)

    async def send(self, data: bytes, *, end: bool = False) -> None:
        """Raises Broken if the client is too slow. A client of HTTP/2 can stop reading one answer and keep
        its connection alive with others."""
        with trio.move_on_after(SEND_SECONDS * (1 + len(data) // SEND_BYTES)) as sending:
            await self._send({"type": "http.response.body", "body": data, "more_body": not end})
        if sending.cancelled_caught:
            raise Broken("the client reads too slowly")

    async def whole(self, status: int, headers: Headers, data: bytes) -> None:
        await self.start(status, headers | {"content-length": str(len(data))})
        await self.send(data, end=True)

    async def refuse(self, status: int, text: str, more: Headers | None = None) -> None:
        headers = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store", **(more or {})}
        if status == 405:
            headers["allow"] = "GET, HEAD"
        if status == 503:
            headers["retry-after"] = "1"
        if status == 413:
            headers["connection"] = "close"
        await self.whole(status, headers, f"{printable(text)[:1000]}\n".encode())
