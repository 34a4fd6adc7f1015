"""The one HTTP client: `httpx.AsyncClient` on trio, with our rules about redirects, addresses, sizes, times.

No other module imports httpx, and here whatever a request may raise becomes SourceFailed.

Concurrency: any number of tasks; how many requests run at a time is for the callers to say. Cancelling a request
closes its connection, or gives up its HTTP/2 stream.
"""

import contextlib
import functools
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final

import httpx
import trio
from httptools import HttpParserError

import ipfsfuse
from ipfsfuse.errors import NotHere, SourceFailed, UsageError
from ipfsfuse.fileio import buffers
from ipfsfuse.sources import failures
from ipfsfuse.sources.body_budget import BodyShare
from ipfsfuse.sources.failures import CONNECT, HOST, LONG, PROTOCOL, REDIRECT, RESET, SHORT, one_line
from ipfsfuse.sources.http_settings import HttpSettings
from ipfsfuse.sources.loopback import Connection, ConnectionPool
from ipfsfuse.sources.origin import Origin, Proxy, proxy_for, redirected
from ipfsfuse.sources.resolving import public_host
from ipfsfuse.sources.secrets import Headers

OWN_TRANSPORT = True
"""Whether plain HTTP to this machine goes by `loopback` instead of httpcore: False to test and measure that."""
USER_AGENT: Final = f"ipfsfuse/{ipfsfuse.__version__}"
REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS: Final = 5
TARGET: Final = re.compile(r"[!-~]+")
"""What may stand in a request line (RFC 9112, 3.2): no space, no control character."""
ERROR_BODY: Final = 64 * 1024
PIECE: Final = 256 * 1024
SMALL: Final = 64 * 1024
"""Bodies of so many bytes are not counted among those that are on their way."""
END_SECONDS: Final = 1.0
"""For the end of a body all of whose bytes have come."""
STREAMS: Final = 32
"""Requests at a time over one client, so over one HTTP/2 connection: its server takes about 100, and those that
stall must not stop the others."""
GIVEN_UP_STREAMS: Final = 32
GIVEN_UP_BYTES: Final = 8 << 20
"""httpcore neither resets an HTTP/2 stream that is given up nor acknowledges what still comes for it: after so much
of that, a connection gets no more requests."""

for _name in ("httpx", "httpcore", "h2", "hpack"):  # they log every request and every header
    logging.getLogger(_name).setLevel(logging.WARNING)


DEAD: Final = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, EOFError, ConnectionError, trio.BrokenResourceError)
"""What a request over a kept connection raises that the server has closed meanwhile."""
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
)
"""Types, kind of failure, what to say: the first row that fits the exception, or one that it came from."""


class translated:  # noqa: N801  # a context manager that costs a fourth of contextlib's
    """Turns whatever a request to the server called `name` raises into SourceFailed: its failure, and no more."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, Exception) and not isinstance(exc, SourceFailed | NotHere):
            kind, message = _explain(exc)
            raise SourceFailed(f"{self._name}: {one_line(message)}", kind) from exc


def _explain(exc: Exception) -> tuple[str, str]:
    """The kind of failure, and what to say of it."""
    if isinstance(exc, httpx.RemoteProtocolError) and "disconnected" in str(exc):
        return RESET, BROKEN
    if isinstance(exc, httpx.RemoteProtocolError) and "without sending complete" in str(exc):
        return SHORT, "its body was cut short"
    for types, kind, message in FAILURES:
        for cause in _causes(exc):
            if isinstance(cause, types):
                return kind, message.format(cause)
    return failures.FAILED, f"{type(exc).__name__}: {exc}"


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """`exc` and what it came from. httpcore clears __cause__ on the way, and keeps __context__."""
    seen: BaseException | None = exc
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):  # several addresses were tried
            for each in seen.exceptions:
                yield from _causes(each)
        seen = seen.__cause__ or seen.__context__


# -- responses ---------------------------------------------------------------------------------------------------


class _HttpcoreBody:
    """The body of a response that came by httpcore, read as that of a `loopback.Connection` is."""

    def __init__(self, response: httpx.Response) -> None:
        self._pieces = response.aiter_raw()
        self._rest = b""

    @property
    def buffered(self) -> int:
        return len(self._rest)

    async def receive(self, most: int) -> bytes:
        piece = self._rest or await anext(self._pieces, b"")
        self._rest = piece[most:]
        return piece[:most]

    async def close(self, *, whole: bool) -> None:
        """Ends the generators of httpx and httpcore, of which trio warns otherwise: a cancelled wait ends them all.
        Behind a body that is `whole` its end is read, so that the connection can be used again."""
        deadline = trio.current_time() + END_SECONDS if whole else 0.0
        with trio.CancelScope(shield=True, deadline=deadline), suppress(Exception):
            async for _ in self._pieces:
                pass


class Response:
    """A response's head, and its body to be read once, by one task."""

    def __init__(self, response: httpx.Response, name: str, total: float, share: BodyShare) -> None:
        own: Connection | None = response.extensions.get("connection")
        self.status = response.status_code
        self.headers: dict[str, str] = dict(response.headers) if own is None else own.headers
        """By names in lower case."""
        self._body = own or _HttpcoreBody(response)
        self._response, self._name, self._total, self._share = response, name, total, share
        self._held = 0
        length = self.headers.get("content-length", "")
        self.left = int(length[:18]) if length.isdecimal() and "transfer-encoding" not in self.headers else None
        """Bytes of the body still to come; None where only its end tells."""
        if self.status in (204, 304):
            self.left = 0
        self._ended = self.left == 0

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes. Raises SourceFailed: long, short, timeout, reset."""
        if self.left is not None:
            if self.left > limit:
                raise SourceFailed(f"{self._name} offered {self.left} bytes, and at most {limit} can be right", LONG)
            await self._hold(self.left)
            if self.left <= self._body.buffered:
                return await self.receive()
        pieces, size = list[bytes](), 0
        with translated(self._name), trio.fail_after(self._total):
            if self.left is not None and self.left > SMALL:
                pieces, self.left = [bytes(each) for each in await self._receive_into([self.left])], 0
                self._ended = True
            while piece := await self.receive():
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise SourceFailed(f"{self._name} sent more than the {limit} bytes that can be right", LONG)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def receive(self) -> bytes:
        """The next piece of the body, b"" at its end."""
        if self.left == 0:
            return b""
        with translated(self._name):
            piece = await self._body.receive(min(self.left or PIECE, PIECE))
        if self.left is not None:
            self.left -= len(piece)
            if not piece:
                raise SourceFailed(f"{self._name} sent a body that was cut short", SHORT)
        self._ended = not piece or self.left == 0
        return piece

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes of a body whose length the head told, in a buffer for each of `sizes`."""
        count = sum(sizes)
        if self.left is None or self.left < count:
            raise SourceFailed(f"{self._name} sent a shorter body than was asked for", SHORT)
        await self._hold(count)
        with translated(self._name):
            filled = await self._receive_into(sizes)
        self.left -= count
        self._ended = self.left == 0
        return filled

    async def _receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        if isinstance(self._body, Connection):
            return await self._body.receive_into(sizes)
        filled = [buffers.lend(size) for size in sizes]
        left = [*filled]
        while left:
            piece = await self._body.receive(sum(map(len, left)))
            if not piece:
                raise SourceFailed(f"{self._name} sent a body that was cut short", SHORT)
            buffers.fill(left, piece)
        return filled

    async def _hold(self, count: int) -> None:
        """Large bodies wait until there is room for them; what was read before is the reader's own by now."""
        self.detach()()
        if count > SMALL:
            await self._share.take(count)
            self._held = count

    def detach(self) -> Callable[[], None]:
        """What was read last stays counted until the function returned is called, however much is read meanwhile."""
        held, self._held = self._held, 0
        return functools.partial(self._share.give, held) if held else lambda: None

    async def declined(self, name: str, what: str) -> NotHere | SourceFailed:
        """What this response to a request for `what` means where it is no success."""
        retry_after = self.headers.get("retry-after", "")
        return failures.declined(name, self.status, retry_after, await self.read(ERROR_BODY), what)

    async def aclose(self) -> int:
        """The bytes that may still come for it over an HTTP/2 connection: 0 where its body was read to the end."""
        self.detach()()
        if isinstance(self._body, _HttpcoreBody):
            await self._body.close(whole=self._ended)
        with suppress(Exception):
            await self._response.aclose()
        if self._ended or self._response.extensions.get("http_version") != b"HTTP/2":
            return 0
        return GIVEN_UP_BYTES if self.left is None else self.left


# -- transports and clients --------------------------------------------------------------------------------------


class OwnTransport(httpx.AsyncBaseTransport):
    """Plain HTTP/1.1 to one origin on this machine by `loopback`.

    The response's extension `connection` has its headers and its body; httpx is not told them."""

    def __init__(self, origin: Origin, settings: HttpSettings) -> None:
        self._pool = ConnectionPool(origin, settings.connect, settings.idle, settings.total)
        self._settings = settings

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        lines = [f"{request.method} {request.extensions['path']} HTTP/1.1".encode()]
        lines += [b"%s: %s" % header for header in request.headers.raw]
        data = b"\r\n".join([*lines, b"", *request.stream])  # type: ignore[misc]  # a ByteStream
        own = await self._pool.request(data, self._settings.idle_seconds)
        return httpx.Response(own.status, stream=_Released(self, own), extensions={"connection": own})

    def release(self, connection: Connection) -> None:
        self._pool.release(connection, self._settings.idle_connections)

    async def aclose(self) -> None:
        self._pool.close()


class _Released(httpx.AsyncByteStream):
    """Gives a connection back when its response is closed."""

    def __init__(self, transport: OwnTransport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    async def aclose(self) -> None:
        self._transport.release(self._connection)


class _NoCookies(httpx.Cookies):
    def extract_cookies(self, response: httpx.Response) -> None:
        """Blocks need no cookies, and a cookie would tell servers who asks."""


class _Client(httpx.AsyncClient):
    """A client, and the requests that were sent over it."""

    cookies = _NoCookies()  # type: ignore[override]  # a property there

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        super().__init__(transport=transport, trust_env=False)
        self.is_own = isinstance(transport, OwnTransport)
        """Then the transport bounds the time for a head itself, and is told the path apart from the URL."""
        self.active = self.given_up = self.given_up_bytes = 0
        """Requests that are under way, those that were given up, and what the server may have sent for these."""

    @property
    def is_used_up(self) -> bool:
        return self.given_up >= GIVEN_UP_STREAMS or self.given_up_bytes >= GIVEN_UP_BYTES


@functools.cache
def tls_context() -> ssl.SSLContext:
    """This system's authorities (SSL_CERT_FILE and SSL_CERT_DIR are heeded), names checked, nothing old."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@functools.lru_cache(maxsize=64)
def _url(origin: Origin) -> httpx.URL:
    """Without a path, for `OwnTransport`: to parse a URL takes httpx 100 us, as all else for a small block."""
    return httpx.URL(scheme=origin.scheme, host=origin.host, port=origin.port)


class Http:
    """Requests to one origin."""

    def __init__(self, origin: Origin, settings: HttpSettings | None = None) -> None:
        self.origin = origin
        self.settings = s = settings or HttpSettings()
        self._share = BodyShare(s.room)
        self._named = replace(origin, base="")
        self._host = origin.authority
        """The Host header for the origin itself."""
        self._clients: dict[tuple[Proxy | None, bool], list[_Client]] = {}
        """By proxy, and whether they are for the origin itself."""
        self._timeout = {"connect": s.connect, "read": s.idle, "write": s.idle, "pool": None}
        self._headers = functools.lru_cache(64)(self._make_headers)  # to make them costs half of a small block

    async def aclose(self) -> None:
        clients, self._clients = [client for some in self._clients.values() for client in some], {}
        for client in clients:
            await client.aclose()
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b"", *, repeatable: bool = True
    ) -> AsyncIterator[Response]:
        """One request for `target`, a path and query below the origin's base. Redirects are followed where the rules
        let. One that is `repeatable` is sent again where a kept connection turns out dead. Raises SourceFailed."""
        origin, path = self._named, self.origin.base + target
        for _ in range(MAX_REDIRECTS + 1):
            client, response = await self._send(origin, method, path, headers, body, repeatable)
            try:
                if response.status not in REDIRECTS or "location" not in response.headers:
                    if response.headers.get("content-encoding", "identity").lower() != "identity":
                        raise SourceFailed(f"{self.origin.text} compressed its answer, unasked", failures.ENCODING)
                    yield response
                    return
                with translated(self.origin.text):
                    origin, path = self._follow(origin, path, method, response.headers["location"])
                    await response.read(ERROR_BODY)
            finally:
                await self._close(client, response)
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
            # A node sends browsers to a host name for each CID. Asked by this name, it answers at the path itself.
            self._host = f"127.0.0.1:{origin.port}"
            self._headers.cache_clear()
            return origin, path
        if method != "GET":
            raise SourceFailed(f"{self.origin.text} redirects {method} to {target.text}: not followed", REDIRECT)
        return target, target_path

    async def _send(
        self, origin: Origin, method: str, path: str, headers: Headers, body: bytes, repeatable: bool
    ) -> tuple[_Client, Response]:
        """The response's head; at the second try where a kept connection turned out dead."""
        if not TARGET.fullmatch(path):
            raise SourceFailed(f"{self.origin.text}: {one_line(path)[:80]!r} can't be asked for", PROTOCOL)
        every = self._headers(origin, method, tuple(headers), len(body))
        with translated(origin.text):
            try:
                return await self._send_once(origin, method, path, every, body)
            except DEAD:
                if not repeatable:
                    raise
            return await self._send_once(origin, method, path, every, body)

    async def _send_once(
        self, origin: Origin, method: str, path: str, headers: httpx.Headers, body: bytes
    ) -> tuple[_Client, Response]:
        client = self._client(proxy_for(origin), origin == self._named)
        extensions = {"timeout": self._timeout, "path": path, "sni_hostname": origin.host}
        limit: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if client.is_own:
            url = _url(origin)
        else:
            host = origin.host if origin == self._named else await public_host(origin)
            url = httpx.URL(scheme=origin.scheme, host=host, port=origin.port, raw_path=path.encode())
            limit = trio.fail_after(2 * self.settings.connect + self.settings.total)
        stream = httpx.ByteStream(body)
        request = httpx.Request(method, url, headers=headers, stream=stream, extensions=extensions)
        client.active += 1
        response: Response | None = None
        try:
            with limit:
                sent = await client.send(request, stream=True)
            response = Response(sent, self.origin.text, self.settings.total, self._share)
            return client, response
        finally:
            if response is None:
                client.given_up += origin.scheme == "https"
                await self._close(client, None)

    def _make_headers(self, origin: Origin, method: str, headers: Headers, length: int) -> httpx.Headers:
        every = [("Host", self._host if origin == self._named else origin.authority), ("User-Agent", USER_AGENT)]
        every += [("Accept-Encoding", "identity"), *headers]
        every += self.settings.headers.of(origin) if origin == self._named else ()
        return httpx.Headers(every + [("Content-Length", str(length))] * (length > 0 or method == "POST"))

    def _client(self, proxy: Proxy | None, named: bool) -> _Client:
        """One that takes another request. Connections to where a redirect leads are not kept: they were made for a
        name, and httpx knows them by the address."""
        clients = self._clients.setdefault((proxy, named), [])
        for client in clients:
            if client.active < STREAMS and not client.is_used_up:
                return client
        s = self.settings
        transport: httpx.AsyncBaseTransport
        if named and OWN_TRANSPORT and proxy is None and self.origin.is_local and self.origin.scheme == "http":
            transport = OwnTransport(self.origin, s)
        else:
            kept = s.idle_connections if named else 0
            limits = httpx.Limits(max_keepalive_connections=kept, keepalive_expiry=s.idle_seconds)
            way = {"proxy": httpx.Proxy(proxy.origin.text, auth=proxy.auth)} if proxy else {"uds": self.origin.unix if named else None}
            transport = httpx.AsyncHTTPTransport(tls_context(), trust_env=False, http2=named, limits=limits, **way)
        clients.append(_Client(transport))
        return clients[-1]

    async def _close(self, client: _Client, response: Response | None) -> None:
        """After each request. A client that is used up is closed with its last one."""
        if response is not None:
            given_up = await response.aclose()
            client.given_up += given_up > 0
            client.given_up_bytes += given_up
        client.active -= 1
        if not client.active and client.is_used_up:
            for clients in self._clients.values():
                clients[:] = [each for each in clients if each is not client]
            with trio.CancelScope(shield=True):
                await client.aclose()
