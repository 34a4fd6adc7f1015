"""The one HTTP layer: requests to one origin over kept-alive connections, with every limit in one place.

Not httpx: measured against the same server, 16 callers, blocks of 8 KiB, it made 1,000 requests a second on trio and
1,400 over urllib3 in threads, urllib3 alone 3,900, and h11 on trio sockets (`wire`) 8,100.

Concurrency: any number of tasks. Cancelling a request closes its connection. How many requests run at a time is the
chain's to say; this layer only keeps the idle connections few.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from urllib.parse import quote, urljoin

import trio

import ipfsfuse
from ipfsfuse.errors import SourceFailed, UsageError
from ipfsfuse.sources.body_budget import BodyBudget, BodyShare
from ipfsfuse.sources.web.answer import ERROR_BODY, Answer
from ipfsfuse.sources.web.connect import connect
from ipfsfuse.sources.web.failures import REDIRECT, TIMEOUT, translated
from ipfsfuse.sources.web.heads import Head, Request
from ipfsfuse.sources.web.origin import Origin, parse_origin, proxy_for
from ipfsfuse.sources.web.wire import Threads, Wire

USER_AGENT = f"ipfsfuse/{ipfsfuse.__version__}"
REDIRECTS = frozenset((301, 302, 303, 307, 308))
MAX_REDIRECTS = 5
MADE = 64
BYTES_IN_FLIGHT = 64 << 20
URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=-._~"

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class HttpSettings:
    headers: Headers = field(default=(), repr=False)
    """Sent to the origin itself, never to where it redirects."""
    connect: float = 10.0
    """Seconds for a connection, TLS included."""
    idle: float = 40.0
    """Seconds without a byte: longer than the 30 s after which a node gives up a block with 504."""
    total: float = 60.0
    """Seconds for a body that is read whole: bytes that drip are no answer."""
    room: BodyBudget = field(default_factory=lambda: BodyBudget(BYTES_IN_FLIGHT), repr=False, compare=False)
    """For bodies that are being read, small ones aside: one for all that are made with these settings or a copy."""
    idle_connections: int = 32
    idle_seconds: float = 60.0


class Http:
    """Requests to one origin."""

    def __init__(self, origin: Origin, settings: HttpSettings | None = None) -> None:
        self.origin = origin
        self.settings = settings or HttpSettings()
        self._named = replace(origin, base="")
        self._idle: dict[Origin, list[tuple[float, Wire]]] = {}
        self._threads = Threads()
        self._room = BodyShare(self.settings.room)
        self._closed = False
        self._made: dict[tuple[Origin, str, tuple[tuple[str, str], ...], int], Request] = {}

    async def aclose(self) -> None:
        self._closed = True
        for wires in self._idle.values():
            for _since, wire in wires:
                wire.close()
        self._idle.clear()
        await trio.lowlevel.checkpoint()

    @asynccontextmanager
    async def ask(self, method: str, target: str, headers: Headers = (), body: bytes = b"") -> AsyncIterator[Answer]:
        """One request for `target`, a path and query below the origin's base, redirects followed where the rules let.

        Raises SourceFailed."""
        origin, path = self._named, self.origin.base + target
        for _ in range(MAX_REDIRECTS + 1):
            wire, head = await self._send(origin, method, path, headers, body)
            answer = Answer(wire, head, self.origin.text, self.settings.idle, self.settings.total, self._room)
            try:
                if answer.status not in REDIRECTS or "location" not in answer.headers:
                    answer.check_plain()
                    yield answer
                    return
                following = self._follow(origin, path, answer.headers["location"])
                await answer.whole(ERROR_BODY)
            finally:
                answer.release()
                self._give_back(origin, wire, answer.reusable)
            origin, path = following
        raise SourceFailed(f"{self.origin.text} redirects in a circle", REDIRECT)

    def _follow(self, origin: Origin, path: str, location: str) -> tuple[Origin, str]:
        url = quote(urljoin(f"{origin.scheme}://{origin.authority}{path}", location), safe=URL_CHARACTERS)
        bare, _, query = url.partition("#")[0].partition("?")
        try:
            target = parse_origin(bare)
        except UsageError as exc:
            raise SourceFailed(f"{self.origin.text} redirects to what is no address: {exc}", REDIRECT) from exc
        if target.scheme != origin.scheme:
            raise SourceFailed(f"{self.origin.text} redirects to {target.scheme}://{target.authority}; if that is right, name it", REDIRECT)
        path = (target.base or "/") + (f"?{query}" if query else "")
        target = replace(target, base="", unix=origin.unix if target.authority == origin.authority else None)
        return target, path

    async def _send(self, origin: Origin, method: str, path: str, headers: Headers, body: bytes) -> tuple[Wire, Head]:
        """The connection and the answer's head. A kept connection that turns out closed is replaced, once."""
        request, target = self._request(origin, method, path, headers, len(body))
        while True:
            wire, kept = await self._take(origin)
            try:
                with translated(origin.text), trio.fail_after(self.settings.idle) as scope:
                    wire.watch(scope, self.settings.idle, float("inf"))
                    return wire, await wire.ask(request, target, body)
            except SourceFailed as exc:
                wire.close()
                if not kept or exc.kind == TIMEOUT:
                    raise
            except BaseException:
                wire.close()
                raise

    def _request(self, origin: Origin, method: str, path: str, headers: Headers, length: int) -> tuple[Request, str]:
        """The request and its target. Requests that differ in nothing else are made once."""
        proxy = proxy_for(origin) if origin.scheme == "http" else None
        key = (origin, method, tuple(headers), length)
        request = self._made.get(key)
        if request is None:
            every = [("Host", origin.authority), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity"), *headers]
            if origin == self._named:
                every += self.settings.headers
            if length or method == "POST":
                every.append(("Content-Length", str(length)))
            if proxy is not None and proxy.authorization:
                every.append(("Proxy-Authorization", proxy.authorization))
            with translated(self.origin.text):
                request = self._made[key] = Request(method, every)
            if len(self._made) > MADE:  # each range is made once
                del self._made[next(iter(self._made))]
        return request, path if proxy is None else f"http://{origin.authority}{path}"

    async def _take(self, key: Origin) -> tuple[Wire, bool]:
        """A connection, and whether it was kept from before."""
        wires = self._idle.get(key, [])
        while wires:
            since, wire = wires.pop()
            if trio.current_time() - since < self.settings.idle_seconds and wire.is_fresh():
                return wire, True
            wire.close()
        elsewhere = key.authority != self._named.authority
        return await connect(key, self._threads, self.settings.connect, public_only=elsewhere), False

    def _give_back(self, origin: Origin, wire: Wire, usable: bool) -> None:
        wires = self._idle.setdefault(origin, [])
        if usable and not self._closed and len(wires) < self.settings.idle_connections:
            wires.append((trio.current_time(), wire))
        else:
            wire.close()
