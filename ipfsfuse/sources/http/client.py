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
"""Whether plain HTTP to this machine goes by `OwnTransport`; False to test and measure httpcore there."""
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

    keep_alive = True  # httpcore itself drops a connection that the server does not keep

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
        self.body: Connection | _HttpcoreBody = response.extensions["body"]
        self.release: Callable[[bool], Awaitable[None]] = response.extensions["release"]
        """To be called at last, with whether the connection can be used again."""
        self.status = response.status_code
        self.headers: dict[str, str] = self.body.headers
        """By names in lower case."""
        self.content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        self._name, self._total, self._share = name, settings.total, share
        self._rate, self._quota = settings.rate, settings.quota
        self._counted = self._rate is not None or self._quota is not None
        length = self.headers.get("content-length", "")
        known = length.isdecimal() and "transfer-encoding" not in self.headers
        self.left = 0 if self.status in (204, 304) else int(length[:18]) if known else None
        """Bytes of the body still to come; None where only its end tells."""
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
                    (content,) = await self.body.receive_into([size])
            finally:
                self._share.give(size)
            self.left, self.ended = 0, True
            # a wait for our own rate limit: it needs no room, and is not the server's time
            if self._counted:
                await self._spend(size)
            return bytes(content)
        found = bytearray()
        with trio.fail_after(self._total):
            while piece := await self.receive():
                found += piece
                if len(found) > limit:
                    raise SourceFailed(f"{self._name} sent more than {limit} bytes", LONG)
        return bytes(found)

    async def receive(self) -> bytes:
        """The next piece of the body, b"" at its end."""
        if self.left == 0:
            return b""
        piece = await self.body.receive(PIECE)
        if self.left is not None:
            self.left -= len(piece)
        self.ended = not piece or self.left == 0
        if self._counted:
            await self._spend(len(piece))
        return piece

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes of a body whose length the head states, in a buffer for each of `sizes`."""
        count = sum(sizes)
        if self.left is None or self.left < count:
            raise SourceFailed(f"{self._name} sent a shorter body than was asked for", SHORT)
        filled = await self.body.receive_into(sizes)
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


class _Transport(httpx.AsyncBaseTransport):
    """Keeps connections to the server `named`, each for one request at a time. The extensions of a response
    have its `body`, and `release`, which is to be called at last."""

    def __init__(self, named: Origin, settings: HttpSettings) -> None:
        self._named, self._settings = named, settings
        self.kept: list[Any] | None = []
        """Connections that can be used again; None once this is closed."""

    async def release(self, connection: Any, usable: bool) -> None:
        if usable and self.kept is not None and len(self.kept) < self._settings.idle_connections:
            self.kept.append(connection)
        else:
            await connection.aclose()

    async def drop_kept(self) -> None:
        while self.kept:
            await self.kept.pop().aclose()

    async def aclose(self) -> None:
        await self.drop_kept()
        self.kept = None


class HttpcoreTransport(_Transport):
    """Any server, by httpcore, of one request at a time and connection: HTTP/2 can't be shared there. Three
    streams that stall hold up a fourth, one that is given up is not reset, one cancelled at its start breaks
    all."""

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
        request.url = httpx.URL(scheme=origin.scheme, host=host, port=origin.port, raw_path=path)
        timeout = {"connect": settings.connect, "read": settings.idle, "write": settings.idle, "pool": None}
        request.extensions |= {"timeout": timeout, "sni_hostname": origin.host, "trace": trace}
        if named and self.kept:
            transport = self.kept.pop()
        else:
            proxy = proxy_for(origin)
            transport = httpx.AsyncHTTPTransport(
                tls_context(),
                trust_env=False,
                http2=True,
                limits=httpx.Limits(keepalive_expiry=settings.idle_seconds),
                proxy=httpx.Proxy(proxy.origin.text, auth=proxy.auth) if proxy else None,
                uds=origin.unix,
            )
        try:
            with trio.fail_after(2 * settings.connect + settings.total):
                response: httpx.Response = await transport.handle_async_request(request)
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
                await self.release(transport, whole and named)

        response.extensions |= {"body": body, "release": release}
        return response


class OwnTransport(_Transport):
    """Plain HTTP/1.1 to one server on this machine, by `transport.Connection`. `far` asks the servers to
    which this one redirects. httpx does not see the headers of a response: its body has them."""

    def __init__(self, named: Origin, settings: HttpSettings, far: HttpcoreTransport) -> None:
        super().__init__(named, settings)
        self._far = far
        self._threads = trio.CapacityLimiter(MAX_THREADS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        named, settings = self._named, self._settings
        if request.extensions["origin"] != named:
            return await self._far.handle_async_request(request)
        lines = [f"{request.method} {request.extensions['path']} HTTP/1.1".encode()]
        lines += map(b"%s: %s".__mod__, request.headers.raw)
        assert isinstance(request.stream, httpx.SyncByteStream)
        data = b"\r\n".join([*lines, b"", b"".join(request.stream)])
        while self.kept:
            connection = self.kept.pop()
            if trio.current_time() - connection.began < settings.idle_seconds and connection.is_fresh():
                break
            await connection.aclose()
        else:
            with trio.fail_after(settings.connect):
                if named.unix is None:
                    stream = await trio.open_tcp_stream(named.host, named.port)
                else:
                    stream = await trio.open_unix_socket(named.unix)
            connection = Connection(stream, settings.idle, self._threads)
        try:
            await connection.request(data, trio.current_time() + settings.total)
        except BaseException:
            await connection.aclose()
            raise
        extensions = {"body": connection, "release": partial(self.release, connection)}
        return httpx.Response(connection.status, extensions=extensions)

    async def aclose(self) -> None:
        await super().aclose()
        await self._far.aclose()


# -- the client ----------------------------------------------------------------------------------------------


class _NoCookies(httpx.Cookies):
    def extract_cookies(self, response: httpx.Response) -> None:
        """Blocks need no cookies, and a cookie would tell servers who asks."""


class _Client(httpx.AsyncClient):
    cookies = _NoCookies()  # type: ignore[override]  # a property there


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
        self._url = httpx.URL(scheme=origin.scheme, host=origin.host)
        """For httpx. Our transports are told origin and path beside it: to parse a URL takes 100 us, as long
        as all else for a small block."""
        far = HttpcoreTransport(self._named, s)
        own = OWN_TRANSPORT and origin.is_local and origin.scheme == "http" and not s.public_only
        self._transport = OwnTransport(self._named, s, far) if own else far
        self._client = _Client(transport=self._transport, trust_env=False)
        self._headers = functools.lru_cache(64)(self._make_headers)  # costs as much as half of a small block

    async def aclose(self) -> None:
        """Who still asks gets a connection that is not kept."""
        await self._transport.aclose()
        await trio.lowlevel.checkpoint()

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
        """One request for `target`, a path and query below the origin's base; with `file`, the file of a
        form. Redirects are followed as the rules let. A `repeatable` one is sent again where a kept
        connection is dead. Raises SourceFailed."""
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
                    await response.read(ERROR_BODY)
                finally:
                    await response.release(response.ended and response.body.keep_alive)
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
        self, origin: Origin, method: str, path: str, headers: Headers, file: bytes | None, repeatable: bool
    ) -> Response:
        """The response's head. If a kept connection turns out to be dead, it is asked for again."""
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
        if repeatable and self._transport.kept and origin == self._named:
            # A kept one may be dead in silence: after the machine has slept or has changed its network.
            current = current_request.get()
            left = min(current.deadline, current.wanted_until) - began
            patience = max(SHORTEST_SILENCE, min(SILENCE, left / 3))
        sent: httpx.Response | None = None
        try:
            with trio.move_on_after(patience) as silence:
                sent = await self._client.send(request, stream=True)
            if silence.cancelled_caught and self._answered < began:
                await self._transport.drop_kept()  # else it is this answer alone that does not come
        except DEAD:
            if not repeatable:
                raise
        if sent is None:
            sent = await self._client.send(request, stream=True)
        self._answered = trio.current_time()
        return Response(sent, self.origin.text, self.share, self.settings)

    def _make_headers(self, origin: Origin, headers: Headers) -> httpx.Headers:
        host = self._host if origin == self._named else origin.authority
        every = [("Host", host), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity"), *headers]
        return httpx.Headers(every + [*self.settings.headers.of(origin)] * (origin == self._named))
