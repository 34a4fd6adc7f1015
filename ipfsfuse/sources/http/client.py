"""The one HTTP client: `httpx.AsyncClient` on trio, with our rules about redirects, addresses, sizes and times.

No other module imports httpx, and here everything that a request may raise becomes SourceFailed.

Concurrency: any number of tasks. Cancelling a request closes its connection, or gives up its HTTP/2 stream. How many
requests run at a time is for the callers to say.
"""

import contextlib
import functools
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from time import time
from typing import Final, Protocol

import httpx
import trio
from httptools import HttpParserError

import ipfsfuse
from ipfsfuse.errors import NotHere, SourceFailed, UsageError
from ipfsfuse.fileio import buffers
from ipfsfuse.sources.addresses import special_purpose
from ipfsfuse.sources.http.connection import Connection, ConnectionPool
from ipfsfuse.sources.in_flight import InFlight, InFlightShare
from ipfsfuse.sources.origin import Origin, Proxy, proxy_for, redirected
from ipfsfuse.sources.secrets import BoundHeaders, Headers

USER_AGENT: Final = f"ipfsfuse/{ipfsfuse.__version__}"
REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS: Final = 5
OWN_TRANSPORT = True
"""Whether plain HTTP to this machine goes by `connection` instead of httpcore: False to test and measure that."""
TARGET: Final = re.compile(r"[!-~]+")
"""What may stand in a request line (RFC 9112, 3.2): no space, no control character."""
ERROR_BODY: Final = 64 * 1024
SMALL: Final = 64 * 1024
"""Bodies of so many bytes are not counted among those that are on their way."""
BYTES_IN_FLIGHT: Final = 64 << 20
END_SECONDS: Final = 1.0
"""For the end of a body all of whose bytes have come."""
STREAMS: Final = 32
"""Requests at a time over one client, so over one HTTP/2 connection, whose server takes about 100: stalled ones must
not stop the others."""
ABANDONED_STREAMS: Final = 32
ABANDONED_BYTES: Final = 8 << 20
"""httpcore neither resets an HTTP/2 stream that is given up nor acknowledges what still comes for it: a connection
with so much of that takes no more requests."""

for _name in ("httpx", "httpcore", "h2", "hpack"):  # they log every request and every header
    logging.getLogger(_name).setLevel(logging.WARNING)

TIMEOUT, CONNECT, RESET, TLS, HOST, PROTOCOL, SHORT, LONG = "timeout", "connect", "reset", "tls", "host", "protocol", "short", "long"
STATUS, BUSY, REFUSED, PAGE, ENCODING, REDIRECT = "status", "busy", "refused", "page", "encoding", "redirect"
"""Kinds of failures; docs/SOURCES.md says what each means."""

ABSENT: Final = frozenset((404, 410, 412, 451, 504))
"""Not found, gone, not cached (only-if-cached), withheld, and nobody had it in time: no word about other sources."""
NOT_SUPPORTED: Final = frozenset((400, 405, 406, 415, 416, 501))
"""The server does not answer such a request at all."""


# -- failures ----------------------------------------------------------------------------------------------------


class translated:  # noqa: N801  # used as contextlib's own, which cost four times as much
    """Turns whatever a request to the server called `name` raises into SourceFailed: that source's failure, no more."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, Exception) and not isinstance(exc, SourceFailed | NotHere):
            kind, message = _explain(exc)
            raise SourceFailed(f"{self._name}: {_one_line(message)}", kind) from exc


def _explain(exc: Exception) -> tuple[str, str]:
    """The kind of failure, and what to say of it behind the server's name."""
    causes = list(_causes(exc))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TLS, f"its certificate is not trusted: {cause.verify_message}"
        if isinstance(cause, socket.gaierror):
            return HOST, f"no such host: {cause.strerror}"
        if isinstance(cause, ssl.SSLError):
            return TLS, f"TLS failed: {cause.reason or cause}"
        if isinstance(cause, ConnectionRefusedError | FileNotFoundError):
            return CONNECT, "it takes no connections: is it running there?"
    if isinstance(exc, httpx.ConnectTimeout | trio.TooSlowError) and not isinstance(exc, httpx.ReadTimeout):
        return TIMEOUT, "it did not answer in time"
    if isinstance(exc, httpx.TimeoutException):
        return TIMEOUT, "it sent nothing for too long"
    if isinstance(exc, httpx.ProxyError):
        return CONNECT, f"the proxy for it refused the way there: {exc}"
    if isinstance(exc, httpx.RemoteProtocolError) and "closed connection without sending complete" in str(exc):
        return SHORT, "its body was cut short"
    if isinstance(exc, EOFError | httpx.RemoteProtocolError) and (not exc.args or "disconnected" in str(exc)):
        return RESET, "it broke the connection off"
    if isinstance(exc, httpx.ProtocolError | HttpParserError):
        return PROTOCOL, f"it does not speak HTTP as it should: {exc}"
    if isinstance(exc, httpx.NetworkError | ConnectionError | trio.BrokenResourceError | trio.ClosedResourceError):
        return (CONNECT if isinstance(exc, httpx.ConnectError) else RESET), "it broke the connection off"
    if isinstance(exc, OSError):
        return CONNECT, f"{exc.strerror or exc}"
    return "failed", f"{type(exc).__name__}: {exc}"


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """`exc` and what it came from. httpcore clears __cause__ on the way, and keeps __context__."""
    seen: BaseException | None = exc
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):  # several addresses were tried
            for each in seen.exceptions:
                yield from _causes(each)
        seen = seen.__cause__ or seen.__context__


def _one_line(text: str) -> str:
    """`text` for a log or a terminal: what a server sent may hold line ends and escape codes."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def refusal(name: str, response: "Response", text: str) -> SourceFailed:
    """What a response that is neither a block nor "not here" means for its server; `text` is its body."""
    said = f"status {response.status}" + (f": {_one_line(text.splitlines()[0])[:120]}" if text else "")
    if response.status in (401, 403):
        return SourceFailed(f"{name} refused us ({said}): look at the Authorization line in the file given with --header-file", REFUSED)
    if response.status in (429, 503):
        return SourceFailed(f"{name} is busy ({said})", BUSY, retry_after(response.headers.get("retry-after", "")))
    return SourceFailed(f"{name} failed ({said})", STATUS)


def retry_after(value: str) -> float | None:
    """Seconds from a Retry-After header, a number of them or a date (RFC 9110, 10.2.3); None for what is neither."""
    if value.isascii() and value.isdigit():
        return float(value[:10])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, OverflowError, TypeError):
        return None


# -- settings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HttpSettings:
    headers: BoundHeaders = field(default_factory=BoundHeaders, repr=False)
    """Sent to the origin that each is bound to, never to where it redirects."""
    connect: float = 10.0
    """Seconds for a connection, TLS included."""
    idle: float = 40.0
    """Seconds without a byte: longer than the 30 s after which a node gives up a block with 504."""
    total: float = 60.0
    """Seconds for a head, and for a body that is read whole: bytes that drip are no answer."""
    in_flight: InFlight = field(default_factory=lambda: InFlight(BYTES_IN_FLIGHT), repr=False, compare=False)
    """For bodies that are being read, small ones aside: one for all that are made with these settings or a copy."""
    idle_connections: int = 32
    idle_seconds: float = 60.0


# -- responses ---------------------------------------------------------------------------------------------------


class Body(Protocol):
    """A body to be read once, by one task."""

    @property
    def buffered(self) -> int:
        """Bytes that can be received without waiting for the network."""
        ...

    async def receive(self, most: int) -> bytes:
        """The next piece, of at most `most` bytes; b"" at its end."""
        ...

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes, in a buffer for each of `sizes`."""
        ...


class _HttpcoreBody:
    """The body of a response that came by httpcore."""

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

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        filled = [buffers.lend(size) for size in sizes]
        left = [*filled]
        while left:
            piece = await self.receive(sum(map(len, left)))
            if not piece:
                raise SourceFailed("the body was cut short", SHORT)
            buffers.fill(left, piece)
        return filled

    async def close(self, *, whole: bool) -> None:
        """Ends the generators of httpx and httpcore, of which trio warns otherwise: a cancelled wait ends all of them.
        Behind a body that is `whole` its end is read, so that the connection can be used again."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + END_SECONDS if whole else 0.0), suppress(Exception):
            async for _ in self._pieces:
                pass


class Response:
    """A response's head, and its body to be read once."""

    def __init__(self, response: httpx.Response, name: str, settings: HttpSettings, share: InFlightShare) -> None:
        self.status = response.status_code
        own: Connection | None = response.extensions.get("connection")
        self.headers: dict[str, str] = dict(response.headers) if own is None else own.headers
        self.http2 = response.extensions.get("http_version") == b"HTTP/2"
        self._httpcore = _HttpcoreBody(response) if own is None else None
        self._body: Body = self._httpcore or own  # type: ignore[assignment]  # one of them is there
        self._response, self._name, self._settings, self._share = response, name, settings, share
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
                raise SourceFailed(f"{self._name} offered {self.left} bytes where at most {limit} can be right", LONG)
            await self._hold(self.left)
        if self.left is not None and self.left <= self._body.buffered:
            return await self.receive()
        pieces, size = list[bytes](), 0
        with translated(self._name), trio.fail_after(self._settings.total):
            if self.left is not None and self.left > SMALL:
                pieces, self.left = [bytes(each) for each in await self._body.receive_into([self.left])], 0
            while self.left != 0 and (piece := await self.receive()):
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise SourceFailed(f"{self._name} sent more than {limit} bytes where no more can be right", LONG)
        self._ended = True
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def receive(self) -> bytes:
        """The next piece of the body, b"" at its end."""
        if self.left == 0:
            return b""
        with translated(self._name):
            piece = await self._body.receive(4 * SMALL if self.left is None else min(self.left, 4 * SMALL))
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
            filled = await self._body.receive_into(sizes)
        self.left -= count
        self._ended = self.left == 0
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

    def check_identity(self) -> None:
        """Refuses compression: it was not asked for, and a small body could grow without end."""
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise SourceFailed(f"{self._name} compressed its answer ({_one_line(encoding)}), which was not asked for", ENCODING)

    async def declined(self, name: str, what: str) -> NotHere | SourceFailed:
        """What this response to a request for `what` means where it is no success."""
        with translated(name):
            text = (await self.read(ERROR_BODY)).decode(errors="replace").strip()
            if self.status in ABSENT:
                return NotHere(f"{name} does not have {what} (status {self.status})")
            return refusal(name, self, text)

    async def aclose(self) -> int:
        """The bytes that may still come for it over an HTTP/2 connection: 0 where the body was read to its end."""
        self.detach()()
        if self._httpcore is not None:
            await self._httpcore.close(whole=self._ended)
        with suppress(Exception):
            await self._response.aclose()
        return 0 if self._ended or not self.http2 else ABANDONED_BYTES if self.left is None else self.left


# -- clients -----------------------------------------------------------------------------------------------------


class OwnTransport(httpx.AsyncBaseTransport):
    """Plain HTTP/1.1 to one origin on this machine by `connection`.

    The response's extension `connection` has its headers and its body; httpx is not told them."""

    def __init__(self, origin: Origin, s: HttpSettings) -> None:
        self._pool = ConnectionPool(origin, s.connect, s.idle, s.total, s.idle_connections, s.idle_seconds)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        lines = [f"{request.method} {request.extensions['path']} HTTP/1.1".encode()]
        lines += [b"%s: %s" % header for header in request.headers.raw]
        data = b"\r\n".join([*lines, b"", request.extensions["content"]])
        connection = await self._pool.request(data, request.extensions["trace"])
        return httpx.Response(connection.status, stream=_Released(self._pool, connection), extensions={"connection": connection})

    async def aclose(self) -> None:
        self._pool.close()


class _Released(httpx.AsyncByteStream):
    """Gives a connection back when its response is closed."""

    def __init__(self, pool: ConnectionPool, connection: Connection) -> None:
        self._pool, self._connection = pool, connection

    async def aclose(self) -> None:
        self._pool.release(self._connection)


class _NoCookies(httpx.Cookies):
    def extract_cookies(self, response: httpx.Response) -> None:
        """Blocks need no cookies, and a cookie would tell servers who asks."""


class _AsyncClient(httpx.AsyncClient):
    cookies = _NoCookies()  # type: ignore[override]  # a property there


@functools.cache
def tls_context() -> ssl.SSLContext:
    """This system's trusted authorities (SSL_CERT_FILE and SSL_CERT_DIR are heeded), names checked, no old protocols."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@functools.lru_cache(maxsize=64)
def _url(origin: Origin) -> httpx.URL:
    """Without a path, for `OwnTransport`: httpx takes 100 us to parse a URL, as long as all else for a small block."""
    return httpx.URL(scheme=origin.scheme, host=origin.host, port=origin.port)


class _Client:
    """An `httpx.AsyncClient` that is open for some requests, and then closed."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self.client = _AsyncClient(transport=transport, trust_env=False)
        self.own = isinstance(transport, OwnTransport)
        """Bounds the time for a head itself."""
        self.active = 0
        self.given_up = 0
        """HTTP/2 streams that the server may still be sending."""
        self.leaked = 0
        """Bytes that may have come for them."""

    @property
    def is_usable(self) -> bool:
        return self.given_up < ABANDONED_STREAMS and self.leaked < ABANDONED_BYTES


class Http:
    """Requests to one origin."""

    def __init__(self, origin: Origin, settings: HttpSettings | None = None) -> None:
        self.origin = origin
        self.settings = settings or HttpSettings()
        self._share = InFlightShare(self.settings.in_flight)
        self._named = replace(origin, base="")
        self._headers = self.settings.headers.of(origin)
        self._host = origin.authority
        """The Host header for the origin itself."""
        self._clients: dict[tuple[Proxy | None, bool], list[_Client]] = {}
        """By proxy, and whether they are for the origin itself."""
        self._made_headers = functools.lru_cache(64)(self._request_headers)  # making them costs half of a small block
        s = self.settings
        self._timeout = {"connect": s.connect, "read": s.idle, "write": s.idle, "pool": None}

    async def aclose(self) -> None:
        clients = [client for some in self._clients.values() for client in some]
        self._clients.clear()
        for each in clients:
            await each.client.aclose()
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b"", *, repeatable: bool = True
    ) -> AsyncIterator[Response]:
        """One request for `target`, a path and query below the origin's base; redirects are followed where the rules let.

        One that is `repeatable` is sent again where a kept connection turns out dead. Raises SourceFailed."""
        origin, path = self._named, self.origin.base + target
        for _ in range(MAX_REDIRECTS + 1):
            client, response = await self._send(origin, method, path, headers, body, repeatable)
            try:
                if response.status not in REDIRECTS or "location" not in response.headers:
                    response.check_identity()
                    yield response
                    return
                with translated(self.origin.text):
                    following = self._follow(origin, path, response.headers["location"])
                    await response.read(ERROR_BODY)
            finally:
                await self._release(client, response)
            origin, path = following
            if method != "GET" and origin != self._named:
                raise SourceFailed(f"{self.origin.text} redirects {method} to {origin.text}; if that is right, name it", REDIRECT)
        raise SourceFailed(f"{self.origin.text} redirects in a circle", REDIRECT)

    def _follow(self, origin: Origin, path: str, location: str) -> tuple[Origin, str]:
        try:
            target, target_path = redirected(origin, path, location)
        except UsageError as exc:
            raise SourceFailed(f"{self.origin.text} {_one_line(str(exc))}", REDIRECT) from exc
        if origin == self._named and target.authority == origin.authority:
            return origin, target_path
        if origin == self._named and origin.is_local and target.host.endswith(".localhost") and target.port == origin.port:
            # A node sends browsers to a host name for each CID; asked by this name it answers at the path itself.
            self._made_headers.cache_clear()
            self._host = f"127.0.0.1:{origin.port}"
            return origin, path
        return target, target_path

    async def _send(
        self, origin: Origin, method: str, path: str, headers: Headers, body: bytes, repeatable: bool
    ) -> tuple[_Client, Response]:
        """The response's head. Where a kept connection turns out dead, once more over another one."""
        for left in range(self.settings.idle_connections, -1, -1):
            fresh = False

            async def connecting(event: str = "connect_tcp.started", _info: object = None) -> None:
                nonlocal fresh
                fresh = fresh or event.endswith(("connect_tcp.started", "connect_unix_socket.started"))

            try:
                with translated(origin.text):
                    return await self._send_once(origin, method, path, headers, body, connecting)
            except SourceFailed as exc:
                if fresh or not left or not repeatable or exc.kind not in (RESET, PROTOCOL):
                    raise
        raise AssertionError

    async def _send_once(
        self, origin: Origin, method: str, path: str, headers: Headers, body: bytes, connecting: Callable[..., Awaitable[None]]
    ) -> tuple[_Client, Response]:
        if not TARGET.fullmatch(path):
            raise SourceFailed(f"{self.origin.text}: {_one_line(path)[:80]!r} can't be asked for", PROTOCOL)
        named = origin == self._named
        client = self._client(proxy_for(origin), named)
        host = origin.host if named else await self._public_address(origin)
        extensions = {"timeout": self._timeout, "trace": connecting, "path": path, "content": body, "sni_hostname": origin.host}
        url = _url(origin) if client.own else httpx.URL(scheme=origin.scheme, host=host, port=origin.port, raw_path=path.encode())
        every = self._made_headers(origin, method, tuple(headers), len(body))
        request = httpx.Request(method, url, headers=every, stream=httpx.ByteStream(body), extensions=extensions)
        client.active += 1
        sent: httpx.Response | None = None
        try:
            with contextlib.nullcontext() if client.own else trio.fail_after(2 * self.settings.connect + self.settings.total):
                sent = await client.client.send(request, stream=True, follow_redirects=False)
            return client, Response(sent, self.origin.text, self.settings, self._share)
        except BaseException:
            if sent is not None:
                await sent.aclose()
            client.given_up += origin.scheme == "https"
            await self._done(client)
            raise

    def _request_headers(self, origin: Origin, method: str, headers: tuple[tuple[str, str], ...], length: int) -> httpx.Headers:
        named = origin == self._named
        every = [("Host", self._host if named else origin.authority), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity"), *headers]
        if named:
            every += self._headers
        if length or method == "POST":
            every.append(("Content-Length", str(length)))
        return httpx.Headers(every)

    async def _public_address(self, origin: Origin) -> str:
        """The address to connect to where a redirect leads to `origin`: checked, so that a second answer of the resolver
        can't lead elsewhere. For a proxy, which resolves it again, its name. Raises SourceFailed."""
        proxied = proxy_for(origin) is not None
        try:
            found = await trio.socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
        except socket.gaierror:
            if not proxied:
                raise
            return origin.host
        addresses = [str(address[4][0]) for address in found]
        for address in addresses:
            purpose = special_purpose(address)
            if purpose:
                raise SourceFailed(f"{self.origin.text} redirects to {origin.text}, an address for {purpose}: not followed", REDIRECT)
        return origin.host if proxied else addresses[0]

    def _client(self, proxy: Proxy | None, named: bool) -> _Client:
        clients = self._clients.setdefault((proxy, named), [])
        for each in clients:
            if each.active < STREAMS and each.is_usable:
                return each
        clients.append(_Client(self._transport(proxy, named)))
        return clients[-1]

    def _transport(self, proxy: Proxy | None, named: bool) -> httpx.AsyncBaseTransport:
        """Connections to where a redirect leads are not kept: they were made for one name, and are known by the address."""
        s = self.settings
        if named and OWN_TRANSPORT and proxy is None and self.origin.is_local and self.origin.scheme == "http":
            return OwnTransport(self.origin, s)
        kept = s.idle_connections if named else 0
        return httpx.AsyncHTTPTransport(
            tls_context(),
            trust_env=False,
            http2=named,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=kept, keepalive_expiry=s.idle_seconds),
            proxy=httpx.Proxy(proxy.origin.text, auth=proxy.auth) if proxy else None,
            uds=self.origin.unix if named else None,
        )

    async def _release(self, client: _Client, response: Response) -> None:
        leaked = await response.aclose()
        client.given_up += leaked > 0
        client.leaked += leaked
        await self._done(client)

    async def _done(self, client: _Client) -> None:
        client.active -= 1
        if client.active or client.is_usable:
            return
        for clients in self._clients.values():
            if client in clients:
                clients.remove(client)
        with trio.CancelScope(shield=True):
            await client.client.aclose()
