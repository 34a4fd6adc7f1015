"""DNSLink: the path in a TXT record of `_dnslink.<domain>` (https://dnslink.dev).

Its trust is that of DNS: unlike an IPNS record it is not signed, so who answers for a domain says where it
leads.

Concurrency: any number of tasks; cancelling a call ends its request.
"""

import base64
from collections.abc import Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

from ipfsfuse.errors import IpfsFuseError, NotFound, Unavailable, UsageError
from ipfsfuse.extras import optional
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings

with optional("names"):
    import dns.asyncresolver
    import dns.exception
    import dns.message
    import dns.name
    import dns.rcode
    import dns.rdatatype
    import dns.resolver
    from dns.rdtypes.txtbase import TXTBase

PREFIX: Final = "dnslink="
MAX_ANSWER: Final = 65535
"""Bytes of a DNS message."""
SYSTEM: Final = "system"
"""The text that names this system's resolver."""


class Dns(Protocol):
    """Asks DNS for TXT records."""

    async def texts(self, domain: str) -> tuple[Sequence[str], float]:
        """The TXT records of `domain`, and their TTL in seconds. Raises NotFound where the answer is that
        there are none, Unavailable where there is no answer."""
        ...

    async def aclose(self) -> None:
        """Lets go of connections."""
        ...


async def lookup(asked: Dns, domain: str) -> tuple[str, float]:
    """The path that `domain` links to, and for how many seconds that holds. Raises NotFound, Unavailable."""
    texts, seconds = await asked.texts(f"_dnslink.{domain}")
    links = sorted(text.removeprefix(PREFIX) for text in texts if text.startswith(PREFIX))
    for path in links:
        if path.startswith(("/ipfs/", "/ipns/")):
            return path, seconds
    raise NotFound(f"{domain} has no DNSLink to /ipfs or /ipns")


class SystemDns:
    """The resolver of this system (`/etc/resolv.conf`)."""

    def __init__(self, configuration: str = "/etc/resolv.conf", port: int = 53) -> None:
        """Raises UsageError where `configuration` names no resolver."""
        try:
            self._resolver = dns.asyncresolver.Resolver(configuration)
            self._resolver.port = port
        except dns.exception.DNSException as exc:
            raise UsageError(f"{configuration} names no DNS resolver ({exc}): give one by --dns URL") from exc

    async def texts(self, domain: str) -> tuple[Sequence[str], float]:
        try:
            answer = await self._resolver.resolve(dns.name.from_text(domain), dns.rdatatype.TXT)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer) as exc:
            raise NotFound(f"{domain} has no TXT record") from exc
        except (dns.exception.DNSException, OSError) as exc:
            raise Unavailable(f"{domain} can't be looked up: {exc}") from exc
        rrset = answer.rrset
        if rrset is None:
            raise NotFound(f"{domain} has no TXT record")
        return [_text(each) for each in rrset if isinstance(each, TXTBase)], float(rrset.ttl)

    async def aclose(self) -> None:
        """Each question has a socket of its own: nothing is kept."""


class DnsOverHttps:
    """A resolver that is asked by HTTPS (RFC 8484)."""

    def __init__(self, url: str, settings: HttpSettings) -> None:
        """Raises UsageError for a URL that can't be used."""
        path = urlsplit(url).path.rstrip("/")
        origin = parse_origin(url)
        if origin.scheme != "https" and not origin.is_local:
            raise UsageError(f"--dns {url}: DNS is asked over https:// only, or on this machine")
        self._http, self._path = Http(origin, settings), "" if path else "/dns-query"
        self._url = url

    async def texts(self, domain: str) -> tuple[Sequence[str], float]:
        query = dns.message.make_query(dns.name.from_text(domain), dns.rdatatype.TXT, id=0)
        asked = base64.urlsafe_b64encode(query.to_wire()).decode().rstrip("=")
        target, headers = f"{self._path}?dns={asked}", [("Accept", "application/dns-message")]
        try:
            async with self._http.ask("GET", target, headers) as response:
                if response.status != 200:
                    raise Unavailable(f"{domain} can't be looked up: {self._url}: status {response.status}")
                data = await response.read(MAX_ANSWER)
        except IpfsFuseError as exc:
            raise exc if isinstance(exc, Unavailable) else Unavailable(f"{domain}: {exc}") from exc
        return self._answer(domain, query, data)

    def _answer(self, domain: str, query: dns.message.Message, data: bytes) -> tuple[Sequence[str], float]:
        try:
            message = dns.message.from_wire(data)
            if not query.is_response(message):
                raise Unavailable(f"{domain}: {self._url} answered another question")
            if message.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                said = dns.rcode.to_text(message.rcode())
                raise Unavailable(f"{domain} can't be looked up: {self._url} says {said}")
            if not isinstance(message, dns.message.QueryMessage):
                raise Unavailable(f"{domain}: {self._url} did not answer a question")
            chain = message.resolve_chaining()
        except dns.exception.DNSException as exc:
            raise Unavailable(f"{domain}: {self._url} sent what is not DNS: {exc}") from exc
        if chain.answer is None:
            raise NotFound(f"{domain} has no TXT record")
        return [_text(each) for each in chain.answer if isinstance(each, TXTBase)], float(chain.minimum_ttl)

    async def aclose(self) -> None:
        await self._http.aclose()


def _text(record: TXTBase) -> str:
    """A TXT record's strings are one text: each alone has at most 255 bytes."""
    return b"".join(record.strings).decode(errors="replace")


def open_dns(text: str, settings: HttpSettings) -> Dns:
    """The resolver that `text` asks for: `system`, or the URL of a DNS-over-HTTPS server. Raises
    UsageError."""
    return SystemDns() if text == SYSTEM else DnsOverHttps(text, settings)
