"""Settings that all HTTP requests of a mount share. Apart from the client: parsing arguments needs no
httpx."""

import functools
import ssl
from dataclasses import dataclass, field

import trio

from ipfsfuse.errors import QuotaReached
from ipfsfuse.sources.http.secrets import BoundHeaders

BYTES_IN_FLIGHT = 64 << 20


class BodyBudget:
    """Bytes of response bodies that may be in memory at a time, over all sources together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.freed = trio.Event()


class BodyShare:
    """One source's part of a `BodyBudget`, first come, first served.

    A source always gets GUARANTEED bytes, so that another one whose bodies stall takes no room from it. A
    body that is larger than the whole budget is let through alone."""

    GUARANTEED = 4 << 20
    """Bytes: two of the largest blocks."""

    def __init__(self, budget: BodyBudget) -> None:
        self.used = 0
        self._budget = budget
        self._turn = trio.Lock()

    async def take(self, size: int) -> None:
        async with self._turn:
            while (
                self.used
                and self.used + size > self.GUARANTEED
                and self._budget.used + size > self._budget.limit
            ):
                await self._budget.freed.wait()
            self.used += size
            self._budget.used += size

    def give(self, size: int) -> None:
        budget = self._budget
        self.used -= size
        budget.used -= size
        budget.freed.set()
        budget.freed = trio.Event()


class RateLimit:
    """Bounds bytes a second: whoever received some waits until they fit. Concurrency: any number of tasks."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._paid_until = float("-inf")

    async def spend(self, count: int) -> None:
        now = trio.current_time()
        self._paid_until = max(self._paid_until, now) + count / self._per_second
        if self._paid_until - now > GRACE_SECONDS:
            await trio.sleep_until(self._paid_until)


class FetchQuota:
    """Bounds the bytes of all bodies together. One that is on its way when the bound is reached is not read
    on; no request is made from then on. Concurrency: any number of tasks."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.fetched = 0
        self.reached = trio.Event()

    def check(self) -> None:
        """Raises QuotaReached."""
        if self.reached.is_set():
            raise QuotaReached(
                f"this mount has fetched {self.fetched} bytes: more than --max-fetch {self.bound} allows",
                "quota",
            )

    def spend(self, count: int) -> None:
        """Raises QuotaReached."""
        self.fetched += count
        if self.fetched > self.bound:
            self.reached.set()
        self.check()


GRACE_SECONDS = 0.01
"""Waits that are shorter are saved up."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    headers: BoundHeaders = field(default_factory=BoundHeaders, repr=False)
    """Sent to the origin that each is bound to, never to where it redirects."""
    connect: float = 10.0
    """Seconds for a connection, and as many for TLS."""
    idle: float = 40.0
    """Seconds without a byte: longer than the 30 s after which a node gives up a block with 504."""
    total: float = 60.0
    """Seconds for a head, and for a body that is read whole: a server that drips has failed."""
    budget: BodyBudget = field(default_factory=lambda: BodyBudget(BYTES_IN_FLIGHT), repr=False, compare=False)
    """For large bodies: one for all requests with these settings or a copy of them."""
    public_only: bool = False
    """Whether only servers at public addresses are asked: for servers that strangers name."""
    rate: RateLimit | None = None
    """For all bodies of all sources together."""
    quota: FetchQuota | None = None
    """As `rate`."""
    idle_connections: int = 32
    idle_seconds: float = 60.0


@functools.cache
def tls_context() -> ssl.SSLContext:
    """TLS 1.2 and later with this system's authorities (SSL_CERT_FILE and SSL_CERT_DIR count); names
    checked."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
