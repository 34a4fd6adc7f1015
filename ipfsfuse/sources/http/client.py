"""The one HTTP client: `httpx.AsyncClient` on trio, with our rules about redirects, addresses, sizes, times.

No other module imports httpx, and here whatever a request may raise becomes SourceFailed.

Concurrency: any number of tasks; how many requests run at a time is for the callers to say. A request that is
cancelled closes its connection.
"""

import functools
import io
import logging
import math
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

if "httpx" not in sys.modules:  # its command line needs rich and click, which take 30 ms: it does without
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # Python's way to say that there is none

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
"""Whether plain HTTP to this machine goes by `loopback`, not by httpcore: False to test and measure that."""
USER_AGENT: Final = f"ipfsfuse/{ipfsfuse.__version__}"
REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS: Final = 5
TARGET: Final = re.compile(r"[!-~]+")  # no space, no control character: RFC 9112, 3.2
ERROR_BODY: Final = 64 * 1024
PIECE: Final = 256 * 1024
UNCOUNTED: Final = 64 * 1024
"""Bodies of so many bytes are not counted among those that are on their way."""
MAX_THREADS: Final = 16
SHORTEST_SILENCE, SILENCE = 1.0, 3.0
"""Seconds, at least and at most, after which a request over a kept connection is sent again over a new
one."""
END_SECONDS: Final = 1.0  # for the end of a body all of whose bytes have come

for _name in ("httpx", "httpcore", "h2", "hpack"):  # they log every request and every header
    logging.getLogger(_name).setLevel(logging.WARNING)

DEAD: Final = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, EOFError, ConnectionError)
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
    (Malformed, failures.CAR, "it sent a broken CAR: {0}"),
)
"""Types, kind of failure, what to say: the first row that fits the exception, or one that it came from."""


def source_failed(name: str, exc: Exception) -> SourceFailed:
    """What a request to the server called `name` raised, as that server's failure."""
    kind, message = _explain(exc)
    return SourceFailed(f"{name}: {one_line(message)}", kind)


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


# -- responses -----------------------------------------------------------------------------------------------


class _HttpcoreBody:
    """The body of a response that came by httpcore, read as that of a `Connection` is."""

    def __init__(self, response: httpx.Response) -> None:
        self.headers = dict(response.headers)
        self.pieces = response.aiter_raw()
        self._rest = b""

    async def receive(self, most: int) -> bytes:
        piece = self._rest or await anext(self.pieces, b"")
        self._rest = piece[most:]
        return piece[:most]

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        filled = list(map(buffers.lend, sizes))
        left = [*filled]
        while left:
            piece = await self.receive(sum(map(len, left)))
            if not piece:
                raise SourceFailed("the body was cut short", SHORT)
            buffers.advance(left, sum(map(io.BytesIO(piece).readinto, left)))
        return filled


class Response:
    """A response's head, and its body to be read once, by one task."""

    def __init__(self, response: httpx.Response, name: str, share: BodyShare, settings: HttpSettings) -> None:
        """A response of one of our transports, from the server called `name`."""
        self._body: Connection | _HttpcoreBody = response.extensions["body"]
        self.release: Callable[[bool], Awaitable[None]] = response.extensions["release"]
        """To be called at last, with whether the body has `ended`: the connection is kept or closed."""
        self.status = response.status_code
        self.headers: dict[str, str] = self._body.headers
        """By names in lower case."""
        self.content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._name, self._total, self._share = name, settings.total, share
        self._rate, self._quota = settings.rate, settings.quota
        self._counted = self._rate is not None or self._quota is not None
        length = self.headers.get("content-length", "")
        known = length.isdecimal() and "transfer-encoding" not in self.headers
        self.left = int(length[:18]) if known else None
        """Bytes of the body still to come; None where only its end tells."""
        if self.status in (204, 304):
            self.left = 0
        self.ended = self.left == 0

    async def read(self, limit: int) -> bytes:
        """The whole body, of at most `limit` bytes. Raises SourceFailed: long, short, timeout, reset. A large
        one waits until there is room for it, and has its time from then on."""
        size = self.left
        if size is not None and size > limit:
            raise SourceFailed(f"{self._name} offered {size} bytes: {limit} are the most", LONG)
        if size is not None and size > UNCOUNTED:
            await self._share.take(size)
            try:
                with trio.fail_after(self._total):
                    (content,) = await self._body.receive_into([size])
            finally:
                self._share.give(size)
            self.left, self.ended = 0, True
            if self._counted:
                await self._spend(size)
            return bytes(content)
        pieces, count = list[bytes](), 0
        with trio.fail_after(self._total):
            while piece := await self.receive():
                pieces.append(piece)
                count += len(piece)
                if count > limit:
                    raise SourceFailed(f"{self._name} sent more than {limit} bytes", LONG)
        return b"".join(pieces)

    async def receive(self) -> bytes:
        """The next piece of the body, b"" at its end."""
        if self.left == 0:
            return b""
        piece = await self._body.receive(min(self.left or PIECE, PIECE))
        if self.left is not None:
            self.left -= len(piece)
            if not piece:
                raise SourceFailed(f"{self._name} sent a body that was cut short", SHORT)
        self.ended = not piece or self.left == 0
        if self._counted:
            await self._spend(len(piece))
        return piece

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes of a body whose length the head states, in a buffer for each of `sizes`."""
        count = sum(sizes)
        if self.left is None or self.left < count:
            raise SourceFailed(f"{self._name} sent a shorter body than was asked for", SHORT)
        filled = await self._body.receive_into(sizes)
        self.left -= count
        self.ended = self.left == 0
        if self._counted:
            await self._spend(count)
        return filled

    async def _spend(self, count: int) -> None:
        if self._quota is not None:
            self._quota.spend(count)
        if self._rate is not None:
            await self._rate.spend(count)

    async def declined(self, name: str, what: str) -> NotHere | SourceFailed:
        """What this response to a request for `what` means where it is no success."""
        retry_after = self.headers.get("retry-after", "")
        return failures.declined(name, self.status, retry_after, await self.read(ERROR_BODY), what)


# -- transports ----------------------------------------------------------------------------------------------

# Both put into the extensions of a response its `body`, and `release`, which is to be called at last.


class OwnTransport(httpx.AsyncBaseTransport):
    """Plain HTTP/1.1 to one origin on this machine, by `transport.Connection`. httpx does not see the
    headers of a response: its body has them."""

    def __init__(self, origin: Origin, settings: HttpSettings) -> None:
        self._origin, self._settings = origin, settings
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self.kept: list[Connection] | None = []
        """Connections that can be used again; None once it is closed."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        lines = [f"{request.method} {request.extensions['path']} HTTP/1.1".encode()]
        lines += map(b"%s: %s".__mod__, request.headers.raw)
        data = b"\r\n".join([*lines, b"", *request.stream])  # type: ignore[misc]  # a ByteStream
        while self.kept:
            connection = self.kept.pop()
            idle = trio.current_time() - connection.idle_since
            if idle < self._settings.idle_seconds and connection.is_fresh():
                break
            connection.close()
        else:
            origin = self._origin
            with trio.fail_after(self._settings.connect):
                if origin.unix is None:
                    stream = await trio.open_tcp_stream(origin.host, origin.port)
                else:
                    stream = await trio.open_unix_socket(origin.unix)
            connection = Connection(stream, self._settings.idle, self._threads)
        try:
            await connection.request(data, trio.current_time() + self._settings.total)
        except BaseException:
            connection.close()
            raise
        extensions = {"body": connection, "release": partial(self._release, connection)}
        return httpx.Response(connection.status, extensions=extensions)

    async def _release(self, connection: Connection, whole: bool) -> None:
        kept, most = self.kept, self._settings.idle_connections
        if whole and connection.keep_alive and kept is not None and len(kept) < most:
            connection.idle_since = trio.current_time()
            kept.append(connection)
        else:
            connection.close()

    async def drop_kept(self) -> None:
        while self.kept:
            self.kept.pop().close()

    async def aclose(self) -> None:
        await self.drop_kept()
        self.kept = None


class HttpcoreTransport(httpx.AsyncBaseTransport):
    """Any server, by httpcore, of one request at a time and connection: HTTP/2 can't be shared there. Three
    streams that stall hold up a fourth, one that is given up is not reset, one cancelled at its start breaks
    all."""

    def __init__(self, origin: Origin, settings: HttpSettings) -> None:
        """`origin` is the one whose connections are kept."""
        self._named, self._settings = origin, settings
        connect, idle = settings.connect, settings.idle
        self._timeout = {"connect": connect, "read": idle, "write": idle, "pool": None}
        self.kept: list[httpx.AsyncHTTPTransport] | None = []
        """Those with a connection that can be used again; None once it is closed."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        origin: Origin = request.extensions["origin"]
        named, opening, settings = origin == self._named, list[Any](), self._settings
        host = origin.host if named and not settings.public_only else await public_host(origin)

        async def trace(event: str, info: dict[str, Any]) -> None:
            """Keeps the connection while TLS begins: httpcore does not close it where that is cancelled."""
            if event.endswith("connect_tcp.complete"):
                opening.append(info["return_value"])
            elif event.endswith("start_tls.complete"):
                opening.clear()

        path = request.extensions["path"].encode()
        far = httpx.Request(
            request.method,
            httpx.URL(scheme=origin.scheme, host=host, port=origin.port, raw_path=path),
            headers=request.headers,
            stream=request.stream,
            extensions={"timeout": self._timeout, "sni_hostname": origin.host, "trace": trace},
        )
        transport = self.kept.pop() if named and self.kept else self._open(origin)
        try:
            with trio.fail_after(2 * settings.connect + settings.total):
                response = await transport.handle_async_request(far)
        except BaseException:
            with trio.CancelScope(shield=True):
                for stream in opening:
                    await stream.aclose()
                await transport.aclose()
            raise
        body = _HttpcoreBody(response)

        async def release(whole: bool) -> None:
            """Ends the generators of httpx and httpcore, of which trio would warn: a cancelled wait ends all.
            Behind a body that is `whole` its end is read, so that the connection can be used again."""
            deadline = trio.current_time() + END_SECONDS if whole else 0.0
            with trio.CancelScope(shield=True):
                with trio.CancelScope(deadline=deadline), suppress(Exception):
                    async for _ in body.pieces:
                        pass
                with suppress(Exception):
                    await response.aclose()
                most = settings.idle_connections
                if whole and named and self.kept is not None and len(self.kept) < most:
                    self.kept.append(transport)
                else:
                    await transport.aclose()

        response.extensions |= {"body": body, "release": release}
        return response

    def _open(self, origin: Origin) -> httpx.AsyncHTTPTransport:
        proxy, unix = proxy_for(origin), self._named.unix if origin == self._named else None
        via = httpx.Proxy(proxy.origin.text, auth=proxy.auth) if proxy else None
        limits = httpx.Limits(keepalive_expiry=self._settings.idle_seconds)
        return httpx.AsyncHTTPTransport(
            tls_context(), trust_env=False, http2=True, limits=limits, proxy=via, uds=unix
        )

    async def drop_kept(self) -> None:
        while self.kept:
            await self.kept.pop().aclose()

    async def aclose(self) -> None:
        await self.drop_kept()
        self.kept = None


# -- the client ----------------------------------------------------------------------------------------------


class _NoCookies(httpx.Cookies):
    def extract_cookies(self, response: httpx.Response) -> None:
        """Blocks need no cookies, and a cookie would tell servers who asks."""


class _Client(httpx.AsyncClient):
    cookies = _NoCookies()  # type: ignore[override]  # a property there


@functools.lru_cache(maxsize=64)
def _url(origin: Origin) -> httpx.URL:
    """Without a path, which is an extension for our transports: to parse a URL takes 100 us, as all else for
    a small block."""
    return httpx.URL(scheme=origin.scheme, host=origin.host, port=origin.port)


class Http:
    """Requests to one origin."""

    def __init__(self, origin: Origin, settings: HttpSettings | None = None) -> None:
        self.origin = origin
        self.settings = s = settings or HttpSettings()
        self.share = BodyShare(s.budget)
        """For bodies that are not `read` whole: who receives one takes room for it, and gives it back."""
        self._answered = -math.inf
        """When the last head came."""
        self._named = replace(origin, base="")
        self._host = origin.authority
        """The Host header for the origin itself."""
        own = OWN_TRANSPORT and origin.is_local and origin.scheme == "http" and not s.public_only
        self._far = HttpcoreTransport(replace(origin, base=""), s)
        self._near = OwnTransport(origin, s) if own else self._far
        """For the origin itself: `_far` is for where it redirects."""
        self._near_client = _Client(transport=self._near, trust_env=False)
        self._far_client = _Client(transport=self._far, trust_env=False)
        self._headers = functools.lru_cache(64)(self._make_headers)  # costs as much as half of a small block

    async def aclose(self) -> None:
        """Who still asks gets a connection that is not kept."""
        await self._near.aclose()
        await self._far.aclose()
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b"", *, repeatable: bool = True
    ) -> AsyncIterator[Response]:
        """One request for `target`, a path and query below the origin's base. Redirects are followed as the
        rules let. A `repeatable` one is sent again where a kept connection is dead. Raises SourceFailed."""
        if self.settings.quota is not None:
            self.settings.quota.check()
        origin, path = self._named, self.origin.base + target
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._send(origin, method, path, headers, body, repeatable)
                try:
                    if response.status not in REDIRECTS or "location" not in response.headers:
                        if response.headers.get("content-encoding", "identity").lower() != "identity":
                            raise SourceFailed(f"{self.origin.text} compressed its answer", failures.ENCODING)
                        yield response
                        return
                    origin, path = self._follow(origin, path, method, response.headers["location"])
                    await response.read(ERROR_BODY)
                finally:
                    await response.release(response.ended)
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
            # A node sends browsers to a name for each CID. Asked by this other name, it answers at the path.
            self._host = f"127.0.0.1:{origin.port}"
            self._headers.cache_clear()
            return origin, path
        if method != "GET":
            raise SourceFailed(f"{self.origin.text} redirects {method} to {target.text}: refused", REDIRECT)
        return target, target_path

    async def _send(
        self, origin: Origin, method: str, path: str, headers: Headers, body: bytes, repeatable: bool
    ) -> Response:
        """The response's head. If a kept connection turns out to be dead, it is asked for again."""
        if not TARGET.fullmatch(path):
            raise SourceFailed(f"{self.origin.text}: {one_line(path)[:80]!r} can't be asked for", PROTOCOL)
        every = self._headers(origin, method, tuple(headers), len(body))
        client = self._near_client if origin == self._named else self._far_client
        extensions = {"origin": origin, "path": path}
        stream = httpx.ByteStream(body)
        request = httpx.Request(method, _url(origin), headers=every, stream=stream, extensions=extensions)
        began, patience = trio.current_time(), math.inf
        if repeatable and self._near.kept and origin == self._named:
            # A kept one may be dead in silence: after the machine has slept or has changed its network.
            current = current_request.get()
            left = min(current.deadline, current.wanted_until) - began
            patience = max(SHORTEST_SILENCE, min(SILENCE, left / 3))
        sent: httpx.Response | None = None
        try:
            with trio.move_on_after(patience) as silence:
                sent = await client.send(request, stream=True)
            if silence.cancelled_caught and self._answered < began:
                await self._near.drop_kept()  # else it is this answer alone that does not come
        except DEAD:
            if not repeatable:
                raise
        if sent is None:
            sent = await client.send(request, stream=True)
        self._answered = trio.current_time()
        return Response(sent, self.origin.text, self.share, self.settings)

    def _make_headers(self, origin: Origin, method: str, headers: Headers, length: int) -> httpx.Headers:
        host = self._host if origin == self._named else origin.authority
        every = [("Host", host), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity"), *headers]
        every += self.settings.headers.of(origin) if origin == self._named else ()
        return httpx.Headers(every + [("Content-Length", str(length))] * (length > 0 or method == "POST"))
