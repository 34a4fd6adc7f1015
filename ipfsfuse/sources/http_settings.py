"""What all requests of a mount have in common. Apart from the client: parsing arguments needs no httpx."""

import functools
import ssl
from dataclasses import dataclass, field

from ipfsfuse.sources.body_budget import BodyBudget
from ipfsfuse.sources.secrets import BoundHeaders

BYTES_IN_FLIGHT = 64 << 20


@dataclass(frozen=True, slots=True)
class HttpSettings:
    headers: BoundHeaders = field(default_factory=BoundHeaders, repr=False)
    """Sent to the origin that each is bound to, never to where it redirects."""
    connect: float = 10.0
    """Seconds for a connection, and as many for TLS."""
    idle: float = 40.0
    """Seconds without a byte: longer than the 30 s after which a node gives up a block with 504."""
    total: float = 60.0
    """Seconds for a head, and for a body that is read whole: bytes that drip are no answer."""
    room: BodyBudget = field(default_factory=lambda: BodyBudget(BYTES_IN_FLIGHT), repr=False, compare=False)
    """For large bodies that are being read: one for all requests with these settings or a copy of them."""
    idle_connections: int = 32
    idle_seconds: float = 60.0


@functools.cache
def tls_context() -> ssl.SSLContext:
    """This system's authorities (SSL_CERT_FILE and SSL_CERT_DIR are heeded), names checked, TLS from 1.2."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
