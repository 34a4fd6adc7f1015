"""The HTTP client: `httpx.AsyncClient` on trio, with our rules about redirects, addresses, sizes and times.

No other module imports httpx. Every error of a request is raised as SourceFailed.

Concurrency: any number of tasks. Callers bound how many requests run at a time. A cancelled request closes
its connection.
"""

import functools
import io
import logging
import math
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Final

if "httpx" not in sys.modules:  # httpx imports its command line, with rich and click, in 30 ms if it can
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # makes that import fail

import httpx
import trio
from httptools import HttpParserError

import ipfsfuse
from ipfsfuse.errors import BlockTooLarge, Malformed, NotHere, SourceFailed, UsageError
from ipfsfuse.fileio import buffers
from ipfsfuse.sources.base import current_request
from ipfsfuse.sources.http import failures
from ipfsfuse.sources.http.addresses import public_host
from ipfsfuse.sources.http.failures import CONNECT, HOST, LONG, PROTOCOL, REDIRECT, RESET, SHORT, one_line
from ipfsfuse.sources.http.origin import Origin, proxy_for, redirected
from ipfsfuse.sources.http.settings import BodyShare, Headers, HttpSettings, tls_context
from ipfsfuse.sources.http.transport import Connection

OWN_TRANSPORT = True
"""Whether plain HTTP to this machine uses our `Connection`. False to test and measure httpcore there."""
USER_AGENT: Final = f"ipfsfuse/{ipfsfuse.__version__}"
REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS: Final = 5
TARGET: Final = re.compile(r"[!-~]+")  # no space, no control character: RFC 9112, 3.2
ERROR_BODY: Final = 64 * 1024
UNCOUNTED: Final = 64 * 1024
"""Smaller bodies do not count against the body budget."""
MAX_THREADS: Final = 16
SHORTEST_SILENCE, SILENCE = 1.0, 3.0
"""Seconds, at least and at most, until a request over a kept connection is sent again over a new one."""
BODY_END_SECONDS: Final = 1.0  # for the end of a body after its last byte

for _name in ("httpx", "httpcore", "h2", "hpack"):  # they log every request and every header
    logging.getLogger(_name).setLevel(logging.WARNING)

DEAD: Final = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, EOFError, ConnectionError)
"""The errors of a request over a kept connection that the server has closed meanwhile."""
BROKEN: Final = "it broke the connection off"
FAILURES: Final = (
    (ssl.SSLCertVerificationError, failures.TLS, "its certificate is not trusted: {0.verify_message}"),
    (ssl.SSLError, failures.TLS, "TLS failed: {0.reason}"),
    (socket.gaierror, HOST, "no such host: {0.strerror}"),
    ((ConnectionRefusedError, FileNotFoundError), CONNECT, "it takes no connections: is it running there?"),
    ((httpx.TimeoutException, trio.TooSlowError), failures.TIMEOUT, "it sent nothing for too long"),
    (httpx.ProxyError, CONNECT, "the proxy for it refused the way there: {0}"),
    ((httpx.ProtocolError, HttpParserError), PROTOCOL, "it does not speak HTTP as it should: {0}"),
    ((ConnectionError, EOFError, trio.BrokenResourceError, httpx.NetworkError), RESET, BROKEN),
    (OSError, CONNECT, "{0}"),
    (Malformed, failures.CAR, "it sent a broken CAR: {0}"),
)
"""(types, kind of failure, message). The first row that fits the exception or one of its causes is used."""


def source_failed(name: str, exc: Exception) -> SourceFailed:
    """The SourceFailed for an exception of a request to the server called `name`."""
    said = str(exc) if isinstance(exc, httpx.RemoteProtocolError) else ""
    if "disconnected" in said:
        return SourceFailed(f"{name}: {BROKEN}", RESET)
    if "without sending complete" in said:
        return SourceFailed(f"{name}: its body was cut short", SHORT)
    for types, kind, message in FAILURES:
        for cause in _causes(exc):
            if isinstance(cause, types):
                return SourceFailed(f"{name}: {one_line(message.format(cause))}", kind)
    return SourceFailed(f"{name}: {one_line(f'{type(exc).__name__}: {exc}')}", failures.FAILED)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """`exc` and its causes. httpcore clears __cause__ and keeps __context__."""
    seen: BaseException | None = exc
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):  # several addresses were tried
            for each in seen.exceptions:
                yield from _causes(each)
        seen = seen.__cause__ or seen.__context__


# -- connections ---------------------------------------------------------------------------------------------


class _HttpcoreConnection:
    """A connection to any server through httpcore, with the interface of `Connection`. It has one request at
    a time, also with HTTP/2: in httpcore, three stalled streams block a fourth, an abandoned stream is not
    reset, and a stream that is cancelled at its start breaks all others."""

    def __init__(self, origin: Origin, settings: HttpSettings, named: bool) -> None:
        """`named`: the user named this server; a redirect did not."""
        self._origin, self._settings = origin, settings
        self._public_only = settings.public_only or not named
        self.keep_alive = named  # httpcore itself drops a connection that the server does not keep
        self._pieces: AsyncIterator[bytes] | None = None  # of the last response's body
        proxy = proxy_for(origin)
        self._transport = httpx.AsyncHTTPTransport(
            tls_context(),
            trust_env=False,
            http2=True,
            limits=httpx.Limits(keepalive_expiry=settings.idle_seconds),
            proxy=httpx.Proxy(proxy.origin.text, auth=proxy.auth) if proxy else None,
            uds=origin.unix,
        )

    async def request(self, request: httpx.Request) -> None:
        origin, settings, opening = self._origin, self._settings, list[Any]()

        async def trace(event: str, info: dict[str, Any]) -> None:
            """Remembers the TCP stream while TLS starts: if that is cancelled, httpcore does not close it."""
            if event.endswith("connect_tcp.complete"):
                opening.append(info["return_value"])
            elif event.endswith("start_tls.complete"):
                opening.clear()

        await self._end(BODY_END_SECONDS)
        host = await public_host(origin) if self._public_only else origin.host
        path = request.extensions["path"].encode()
        request.url = httpx.URL(scheme=origin.scheme, host=host, port=origin.port, raw_path=path)
        timeout = {"connect": settings.connect, "read": settings.idle, "write": settings.idle, "pool": None}
        request.extensions |= {"timeout": timeout, "sni_hostname": origin.host, "trace": trace}
        try:
            with trio.fail_after(2 * settings.connect + settings.total):
                response = await self._transport.handle_async_request(request)
        except BaseException:
            with trio.CancelScope(shield=True):
                for stream in opening:
                    await stream.aclose()
            raise
        self.status, self.headers = response.status_code, dict(response.headers)
        self._pieces, self._rest = response.aiter_raw(), b""

    async def receive(self) -> bytes:
        assert self._pieces is not None
        piece, self._rest = self._rest or await anext(self._pieces, b""), b""
        return piece

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        filled = list(map(buffers.lend, sizes))
        left = [*filled]
        while left:
            piece = io.BytesIO(await self.receive())
            if not (count := sum(map(piece.readinto, left))):
                raise SourceFailed("the body was cut short", SHORT)
            buffers.advance(left, count)
            self._rest = piece.read()
        return filled

    async def _end(self, seconds: float) -> None:
        """Ends the generators of httpx and httpcore, since trio warns about generators that are not finished.
        A cancelled wait ends them all. Reads the end of a body for up to `seconds`, so that the connection
        can be used again."""
        pieces, self._pieces = self._pieces, None
        if pieces is not None:
            with trio.move_on_after(seconds), suppress(Exception):
                async for _ in pieces:
                    pass

    def is_fresh(self) -> bool:
        return True  # httpcore checks this itself

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await self._end(0)
            await self._transport.aclose()


AnyConnection = Connection | _HttpcoreConnection


class _Transport(httpx.AsyncBaseTransport):
    """Connections with one request at a time. Connections to the server `named` are kept. With `own`,
    requests to that server use `Connection`: plain HTTP/1.1.
    Headers of a response are not given to httpx, so that it keeps no cookies: servers could recognise a
    client by them. The headers are in the `connection` of the response's extensions."""

    def __init__(self, named: Origin, settings: HttpSettings, own: bool) -> None:
        self._named, self._settings, self._own = named, settings, own
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self.idle: list[tuple[float, AnyConnection]] | None = []
        """Connections that can be used again, and since when they are idle. None after `aclose`."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        origin: Origin = request.extensions["origin"]
        while self.idle and origin == self._named:
            since, connection = self.idle.pop()
            if trio.current_time() - since < self._settings.idle_seconds and connection.is_fresh():
                break
            await connection.aclose()
        else:
            connection = await self._open_connection(origin)
        try:
            if isinstance(connection, Connection):
                lines = [f"{request.method} {request.extensions['path']} HTTP/1.1".encode()]
                lines += map(b"%s: %s".__mod__, request.headers.raw)
                assert isinstance(request.stream, httpx.SyncByteStream)
                data = b"\r\n".join([*lines, b"", b"".join(request.stream)])
                await connection.request(data, trio.current_time() + self._settings.total)
            else:
                await connection.request(request)
        except BaseException:
            await connection.aclose()
            raise
        return httpx.Response(connection.status, extensions={"connection": connection})

    async def _open_connection(self, origin: Origin) -> AnyConnection:
        if origin != self._named or not self._own:
            return _HttpcoreConnection(origin, self._settings, origin == self._named)
        with trio.fail_after(self._settings.connect):
            if origin.unix is None:
                stream = await trio.open_tcp_stream(origin.host, origin.port)
            else:
                stream = await trio.open_unix_socket(origin.unix)
        return Connection(stream, self._settings.idle, self._threads)

    async def release(self, connection: AnyConnection, whole: bool) -> None:
        """Called after each response. `whole`: its body was read to the end."""
        idle = self.idle if whole and connection.keep_alive else None
        if idle is not None and len(idle) < self._settings.idle_connections:
            idle.append((trio.current_time(), connection))
        else:
            await connection.aclose()

    async def close_idle(self) -> None:
        while self.idle:
            await self.idle.pop()[1].aclose()

    async def aclose(self) -> None:
        await self.close_idle()
        self.idle = None


# -- the client ----------------------------------------------------------------------------------------------


class Response:
    """A response: its head, and its body, which one task can read once."""

    def __init__(self, connection: AnyConnection, http: "Http") -> None:
        self.connection = connection
        self.status = connection.status
        self.headers: dict[str, str] = connection.headers  # by names in lower case
        self.content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._name, self._settings, self._share = http.origin.text, http.settings, http.share
        length = self.headers.get("content-length", "")
        known = length.isdecimal() and "transfer-encoding" not in self.headers
        self.left = 0 if self.status in (204, 304) else int(length[:18]) if known else None
        """Bytes of the body that were not received yet; None if the length is not known."""
        self.ended = self.left == 0

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes. Raises SourceFailed: long, short, timeout, reset.

        A large body waits first for room in the body budget. The server's time starts after that. The wait
        for our own rate limit is not part of it, and needs no room."""
        size, total = self.left, self._settings.total
        if size is not None and size > limit:
            raise SourceFailed(f"{self._name} offered {size} bytes: {limit} are the most", LONG)
        if size is not None and size > UNCOUNTED:
            await self._share.take(size)
            try:
                with trio.fail_after(total):
                    (buffer,) = await self.connection.receive_into([size])
            finally:
                self._share.give(size)
            self._count(size)
            content = bytes(buffer)
        else:
            found = bytearray()
            with trio.fail_after(total):
                while piece := await self._receive():
                    found += piece
                    if len(found) > limit:
                        raise SourceFailed(f"{self._name} sent more than {limit} bytes", LONG)
            content = bytes(found)
        if self._settings.rate is not None:
            await self._settings.rate.spend(len(content))
        return content

    async def receive(self) -> bytes:
        """The next piece of the body; b"" at its end."""
        piece = await self._receive()
        if self._settings.rate is not None:
            await self._settings.rate.spend(len(piece), self.ended)
        return piece

    async def _receive(self) -> bytes:
        if self.left == 0:
            return b""
        piece = await self.connection.receive()
        self._count(len(piece))
        return piece

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes of a body of known length, in a buffer for each of `sizes`."""
        count = sum(sizes)
        if self.left is None or self.left < count:
            raise SourceFailed(f"{self._name} sent a shorter body than was asked for", SHORT)
        filled = await self.connection.receive_into(sizes)
        self._count(count)
        if self._settings.rate is not None:
            await self._settings.rate.spend(count)
        return filled

    def _count(self, count: int) -> None:
        """Counts received bytes; 0 at the end of the body. Raises QuotaReached."""
        if self.left is not None:
            self.left -= count
        self.ended = not count or self.left == 0
        if self._settings.quota is not None:
            self._settings.quota.spend(count)

    async def read_error(self) -> bytes:
        """The body of an error response; b"" if it is long, since the status says enough."""
        try:
            return await self.read(ERROR_BODY)
        except SourceFailed as exc:
            if exc.kind != LONG:
                raise
            return b""

    async def refused(self, name: str, what: str = "") -> NotHere | SourceFailed:
        """The exception for this error response. NotHere if the status says that `what` is absent."""
        said = await self.read_error()
        if what and self.status in failures.ABSENT:
            return NotHere(f"{name} does not have {what} (status {self.status})")
        return failures.refused(name, self.status, self.headers.get("retry-after", ""), said)


class _Client(httpx.AsyncClient):
    cookies = SimpleNamespace(extract_cookies=id)  # type: ignore[assignment]  # to look for some takes 40 us


class Http:
    """Requests to one origin."""

    def __init__(self, origin: Origin, settings: HttpSettings | None = None) -> None:
        self.origin = origin
        self.settings = s = settings or HttpSettings()
        self.share = BodyShare(s.budget)
        """For bodies that are not `read` whole: the receiver takes room for each piece and gives it back."""
        self._answered = -math.inf  # when the last head came
        self._named = replace(origin, base="")
        self._host = origin.authority  # the Host header for the origin itself
        self._url = httpx.URL(scheme=origin.scheme, host=origin.host)
        """The URL for httpx. Our transports get origin and path as extensions: to parse a URL takes 100 us,
        as long as all the rest of a small block."""
        own = OWN_TRANSPORT and origin.is_local and origin.scheme == "http" and not s.public_only
        self._transport = _Transport(self._named, s, own)
        self._client = _Client(transport=self._transport, trust_env=False)
        self._headers = functools.lru_cache(64)(self._make_headers)  # half as long as all else for a block

    async def aclose(self) -> None:
        """Requests after this still work: each opens a connection of its own."""
        await self._transport.aclose()

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        target: str,
        headers: Headers = (),
        file: bytes | None = None,
        *,
        repeatable: bool = True,
    ) -> AsyncIterator[Response]:
        """Sends one request for `target`, a path and query below the origin's base. `file` is sent as the
        file of a form. Allowed redirects are followed. A `repeatable` request is sent again if a kept
        connection turns out to be dead. Raises SourceFailed."""
        if self.settings.quota is not None:
            self.settings.quota.check()
        origin, path = self._named, self.origin.base + target
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._send(origin, method, path, headers, file, repeatable)
                try:
                    if response.status not in REDIRECTS or "location" not in response.headers:
                        if response.headers.get("content-encoding", "identity").lower() != "identity":
                            raise SourceFailed(f"{self.origin.text} compressed its answer", failures.ENCODING)
                        yield response
                        return
                    origin, path = self._follow(origin, path, method, response.headers["location"])
                    await response.read_error()
                finally:
                    await self._transport.release(response.connection, response.ended)
        except (SourceFailed, NotHere, BlockTooLarge):
            raise
        except Exception as exc:
            raise source_failed(origin.text, exc) from exc
        raise SourceFailed(f"{self.origin.text} redirects in a circle", REDIRECT)

    def _follow(self, origin: Origin, path: str, method: str, location: str) -> tuple[Origin, str]:
        try:
            target, target_path = redirected(origin, path, location)
        except UsageError as exc:
            raise SourceFailed(f"{self.origin.text} {one_line(str(exc))}", REDIRECT) from exc
        if target.authority == self._named.authority:
            return self._named, target_path
        subdomain = target.host.endswith(".localhost") and target.port == origin.port
        if subdomain and origin == self._named and origin.is_local:
            # A node redirects `localhost` to a host name for each CID. Under 127.0.0.1 it does not.
            self._host = f"127.0.0.1:{origin.port}"
            self._headers.cache_clear()
            return origin, path
        if method != "GET":
            raise SourceFailed(f"{self.origin.text} redirects {method} to {target.text}: refused", REDIRECT)
        return target, target_path

    async def _send(
        self, origin: Origin, method: str, path: str, headers: Headers, file: bytes | None, repeatable: bool
    ) -> Response:
        """The response's head. A `repeatable` request is sent again if a kept connection turns out dead."""
        if not TARGET.fullmatch(path):
            raise SourceFailed(f"{self.origin.text}: {one_line(path)[:80]!r} can't be asked for", PROTOCOL)
        request = httpx.Request(
            method,
            self._url,
            headers=self._headers(origin, tuple(headers)),
            files=None if file is None else {"data": ("data", file, "application/octet-stream")},
            stream=httpx.ByteStream(b"") if method == "GET" else None,
            extensions={"origin": origin, "path": path},
        )
        began, patience = trio.current_time(), math.inf
        if repeatable and self._transport.idle and origin == self._named:
            # A kept connection may be dead without notice: after the machine slept or changed its network.
            current = current_request.get()
            left = min(current.deadline, current.wanted_until) - began
            patience = max(SHORTEST_SILENCE, min(SILENCE, left / 3))
        sent: httpx.Response | None = None
        try:
            with trio.move_on_after(patience) as silence:
                sent = await self._client.send(request, stream=True)
            if silence.cancelled_caught and self._answered < began:
                await self._transport.close_idle()  # no request was answered since
        except DEAD:
            if not repeatable:
                raise
        if sent is None:
            sent = await self._client.send(request, stream=True)
        self._answered = trio.current_time()
        return Response(sent.extensions["connection"], self)

    def _make_headers(self, origin: Origin, headers: Headers) -> httpx.Headers:
        host = self._host if origin == self._named else origin.authority
        every = [("Host", host), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity"), *headers]
        return httpx.Headers(every + [*self.settings.headers.of(origin)] * (origin == self._named))
