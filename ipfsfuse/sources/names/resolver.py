"""Resolves names to paths below a CID: asks every source for IPNS records, asks DNS for domains, and follows
names that lead to other names.

Records are verified here, so a malicious source can only withhold a newer record. The record with the highest
sequence that was ever seen counts; `RecordStore` keeps it across restarts.

Concurrency: any number of tasks. Concurrent calls for one name share one request to the sources.
"""

import base64
import contextlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit

import trio

from ipfsfuse.dag import path as paths
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.errors import (
    IpfsFuseError,
    Malformed,
    NotFound,
    StoreFailed,
    Unavailable,
    UsageError,
    WrongRecord,
)
from ipfsfuse.extras import optional
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import SourceRequest
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings
from ipfsfuse.sources.names import record as records
from ipfsfuse.sources.names.record import NANOSECONDS, DomainName, KeyName, Name, Record

with optional("names"):
    import dns.asyncresolver
    import dns.exception
    import dns.message
    import dns.name
    import dns.rcode
    import dns.rdatatype
    import dns.resolver
    from dns.rdtypes.txtbase import TXTBase

log = logging.getLogger(__name__)

MAX_NAME_CHAIN: Final = 32
"""The longest chain of names that is followed, as in Kubo."""
MAX_ASKED: Final = 256
"""Names that are resolved at a time: each needs a connection to every source."""
MAX_RESOLVED_NAMES: Final = 1000
"""Names of which the value or failure is kept in memory."""
MIN_KEPT_SECONDS: Final = 1.0
"""A value is kept at least so long, because one access asks for it more than once."""
FAILURE_SECONDS: Final = 5.0
"""A failure is kept so long, the same as that of a block."""
STALE_SECONDS: Final = 60.0
"""How long a stored record that has not expired is used before the sources are asked again, if none of them
answers with one as new."""
NEWER_RECORD_SECONDS: Final = 1.0
"""How long the other sources may take to send a newer record after one has sent a valid record."""
MAX_NAME_PATH: Final = 3500
"""Bytes of a path that a name may lead to. The path, with the mountpoint before it, is the target of a
symlink, and Linux allows 4,095 bytes for that."""


# -- DNSLink: the path in a TXT record of `_dnslink.<domain>` (https://dnslink.dev) --------------------------

# A DNSLink is as trustworthy as DNS. Unlike an IPNS record it is not signed, so the DNS server decides where
# a domain leads.

DNSLINK_PREFIX: Final = "dnslink="
MAX_DNS_MESSAGE: Final = 65535
"""Bytes of a DNS message."""
SYSTEM_RESOLVER: Final = "system"
"""The text that names this system's resolver."""


class Dns(Protocol):
    """Asks DNS for TXT records."""

    async def texts(self, domain: str) -> tuple[Sequence[str], float]:
        """The TXT records of `domain`, and their TTL in seconds. Raises NotFound if DNS answers that there
        are none, Unavailable if there is no answer."""
        ...

    async def aclose(self) -> None:
        """Closes connections."""
        ...


async def lookup(asked: Dns, domain: str) -> tuple[str, float]:
    """The path that `domain` links to, and its TTL in seconds. Raises NotFound, Unavailable."""
    texts, seconds = await asked.texts(f"_dnslink.{domain}")
    links = sorted(text.removeprefix(DNSLINK_PREFIX) for text in texts if text.startswith(DNSLINK_PREFIX))
    for path in links:
        if path.startswith(("/ipfs/", "/ipns/")):
            return path, seconds
    raise NotFound(f"{domain} has no DNSLink to /ipfs or /ipns")


class SystemDns:
    """The resolver of this system (`/etc/resolv.conf`)."""

    def __init__(self, configuration: str = "/etc/resolv.conf", port: int = 53) -> None:
        """Raises UsageError if `configuration` names no resolver."""
        try:
            self._resolver = dns.asyncresolver.Resolver(configuration)
            self._resolver.port = port
        except dns.exception.DNSException as exc:
            raise UsageError(f"{configuration} names no DNS resolver ({exc}): give one by --dns URL") from exc

    async def texts(self, domain: str) -> tuple[Sequence[str], float]:
        try:
            answer = await self._resolver.resolve(_dns_name(domain), dns.rdatatype.TXT)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer) as exc:
            raise NotFound(f"{domain} has no TXT record") from exc
        except (dns.exception.DNSException, OSError) as exc:
            raise Unavailable(f"{domain} can't be looked up: {exc}") from exc
        rrset = answer.rrset
        if rrset is None:
            raise NotFound(f"{domain} has no TXT record")
        return [_text(each) for each in rrset if isinstance(each, TXTBase)], float(rrset.ttl)

    async def aclose(self) -> None:
        """Does nothing: each query has a socket of its own."""


class DnsOverHttps:
    """A DNS-over-HTTPS server (RFC 8484)."""

    def __init__(self, url: str, settings: HttpSettings) -> None:
        """Raises UsageError for a URL that can't be used."""
        path = urlsplit(url).path.rstrip("/")
        origin = parse_origin(url)
        if origin.scheme != "https" and not origin.is_local:
            raise UsageError(f"--dns {url}: DNS is asked over https:// only, or on this machine")
        self._http, self._path = Http(origin, settings), "" if path else "/dns-query"
        self._url = url

    async def texts(self, domain: str) -> tuple[Sequence[str], float]:
        query = dns.message.make_query(_dns_name(domain), dns.rdatatype.TXT, id=0)
        asked = base64.urlsafe_b64encode(query.to_wire()).decode().rstrip("=")
        target, headers = f"{self._path}?dns={asked}", [("Accept", "application/dns-message")]
        try:
            async with self._http.ask("GET", target, headers) as response:
                if response.status != 200:
                    raise Unavailable(f"{domain} can't be looked up: {self._url}: status {response.status}")
                data = await response.read(MAX_DNS_MESSAGE)
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


def _dns_name(domain: str) -> dns.name.Name:
    """Raises NotFound for a name that DNS can't have: with `_dnslink.` it may be too long."""
    try:
        return dns.name.from_text(domain)
    except dns.exception.DNSException as exc:
        raise NotFound(f"{domain} can't be in DNS: {exc}") from exc


def _text(record: TXTBase) -> str:
    """Joins the strings of a TXT record, each of which has at most 255 bytes."""
    return b"".join(record.strings).decode(errors="replace")


def open_dns(text: str, settings: HttpSettings) -> Dns:
    """The resolver that `text` names: `system`, or the URL of a DNS-over-HTTPS server. Raises UsageError."""
    return SystemDns() if text == SYSTEM_RESOLVER else DnsOverHttps(text, settings)


# -- names ---------------------------------------------------------------------------------------------------


class RecordSource(Protocol):
    """A source that may have IPNS records."""

    @property
    def name(self) -> str: ...

    async def ipns_record(self, name: str) -> bytes:
        """The newest record that the source has of `name` (`k51...`), unverified. Raises NotHere,
        SourceFailed."""
        ...


class RecordStore(Protocol):
    """Keeps the newest record of each name. Both calls may block; they run in a worker thread."""

    def get(self, name: str) -> bytes | None: ...

    def put(self, name: str, data: bytes) -> None:
        """Raises StoreFailed."""
        ...


@dataclass(frozen=True, slots=True)
class Resolved:
    """The path that a name leads to now."""

    path: IpfsPath
    until: float
    """When the name must be resolved again, on trio's clock."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The value of one record or DNSLink, or why there is none."""

    value: IpfsPath | tuple[Name, tuple[bytes, ...]] | IpfsFuseError
    until: float


class Resolver:
    def __init__(
        self, sources: Sequence[RecordSource], store: RecordStore, dns: Dns | None, *, seconds: float = 30.0
    ) -> None:
        """`seconds`: how long the sources may take for one record. Without `dns`, domains are not
        resolved."""
        self._sources, self._store, self._dns, self._seconds = sources, store, dns, seconds
        self._steps: OrderedDict[Name, _Step] = OrderedDict()
        self._locks: dict[Name, trio.Lock] = {}
        self._asking = trio.CapacityLimiter(MAX_ASKED)

    def resolved_names(self) -> Sequence[str]:
        """The names that were resolved recently, in their usual spelling."""
        return sorted(
            str(name) for name, step in self._steps.items() if not isinstance(step.value, Exception)
        )

    async def resolve_text(self, text: str) -> Resolved:
        """Parses and resolves a name. Raises NotFound if `text` is not a name, and what `resolve` raises."""
        name = records.parse_name(text)
        if name is None:
            raise NotFound(f"{text[:200]!r} is not a name")
        return await self.resolve(name)

    async def resolve(self, name: Name) -> Resolved:
        """The path that `name` leads to. Raises NotFound if it is proved that there is none, Unavailable if
        it can't be found now, Malformed for a value that can't be used."""
        names: tuple[bytes, ...] = ()
        until = math.inf
        asked = name
        for _ in range(MAX_NAME_CHAIN):
            step = await self._step(asked)
            until = min(until, step.until)
            if isinstance(step.value, IpfsFuseError):
                raise step.value.with_traceback(None)
            if isinstance(step.value, IpfsPath):
                found = IpfsPath(step.value.root, step.value.names + names)
                if len(bytes(found)) > MAX_NAME_PATH:
                    raise Malformed(f"{name} leads to a path of over {MAX_NAME_PATH:,} bytes")
                return Resolved(found, until)
            asked, more = step.value
            names = more + names
        raise Malformed(
            f"{name} leads to {MAX_NAME_CHAIN} other names, one after the other: no more are followed"
        )

    async def _step(self, name: Name) -> _Step:
        async with self._one_at_a_time(name):
            kept = self._steps.get(name)
            if kept is not None and kept.until > trio.current_time():
                self._steps.move_to_end(name)
                return kept
            try:
                async with self._asking:
                    if isinstance(name, DomainName):
                        value, seconds = await self._of_domain(name)
                    else:
                        record, seconds = await self.newest(name)
                        value = record.value
                step = _Step(_parse_value(name, value), trio.current_time() + max(seconds, MIN_KEPT_SECONDS))
            except IpfsFuseError as exc:
                log.info("%s", exc)
                step = _Step(exc.with_traceback(None), trio.current_time() + FAILURE_SECONDS)
            self._steps[name] = step
            self._steps.move_to_end(name)
            if len(self._steps) > MAX_RESOLVED_NAMES:
                self._steps.popitem(last=False)
            return step

    @contextlib.asynccontextmanager
    async def _one_at_a_time(self, name: Name) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked() and self._locks.get(name) is lock:
                del self._locks[name]

    # -- DNSLink ---------------------------------------------------------------------------------------------

    async def _of_domain(self, name: DomainName) -> tuple[str, float]:
        if self._dns is None:
            raise Unavailable(f"{name}: this mount is offline, and DNS is not asked")
        asked = SourceRequest()
        with asked.current(), asked.patience(self._seconds):
            return await lookup(self._dns, name.domain)
        raise Unavailable(f"{name}: DNS did not answer within {self._seconds:g} s")

    # -- IPNS ------------------------------------------------------------------------------------------------

    async def newest(self, name: KeyName) -> tuple[Record, float]:
        """The newest record that has not expired, of those that the sources have now and the one that was
        stored before; and for how many seconds it can be used. Raises Unavailable."""
        stored = await self._stored(name)
        best, answered, said = stored, False, list[str]()
        for source, answer in await self._answers(name):
            if not isinstance(answer, Record):
                said.append(str(answer) if source in str(answer) else f"{source}: {answer}")
            elif answer.validity <= time.time_ns():
                said.append(f"{source}: its record (sequence {answer.sequence}) has expired")
            elif best is not None and answer.sequence < best.sequence:
                said.append(
                    f"{source}: its record is older (sequence {answer.sequence}) than one that was seen "
                    f"({best.sequence})"
                )
            else:
                answered = True
                best = answer if best is None or answer.rank > best.rank else best
        why = "; ".join(said) or "no source can be asked for IPNS records"
        if best is None:
            raise Unavailable(f"{name} can't be resolved: {why}")
        if best is not stored:
            await self._keep(name, best)
        left = (best.validity - time.time_ns()) / NANOSECONDS
        if left <= 0:
            raise Unavailable(f"{name}: the newest record (sequence {best.sequence}) has expired; {why}")
        if not answered:
            log.warning("%s: the record of sequence %d is still used: %s", name, best.sequence, why)
        return best, min(left, best.ttl / NANOSECONDS if answered else STALE_SECONDS)

    async def _answers(self, name: KeyName) -> Sequence[tuple[str, Record | IpfsFuseError]]:
        """(Source, its verified record or why there is none), in the order of arrival. After the first valid
        record, the other sources have `NEWER_RECORD_SECONDS`."""
        answers: dict[int, Record | IpfsFuseError] = {}
        asked = SourceRequest()

        async def ask(number: int) -> None:
            answers[number] = await self._answer(self._sources[number], name)
            if isinstance(answers[number], Record):
                asked.shorten(scope, NEWER_RECORD_SECONDS)

        with asked.current(), asked.patience(self._seconds) as scope:
            async with trio.open_nursery() as nursery:
                for number in range(len(self._sources)):
                    nursery.start_soon(ask, number)
        for number in range(len(self._sources)):
            answers.setdefault(number, Unavailable("no answer in time"))
        return [(self._sources[number].name, answer) for number, answer in answers.items()]

    async def _answer(self, source: RecordSource, name: KeyName) -> Record | IpfsFuseError:
        try:
            data = await source.ipns_record(str(name))
            # verifying an RSA signature takes 0.1 ms, with the largest key allowed 1 ms
            return records.verify(name, data)
        except IpfsFuseError as exc:
            return exc
        except Exception as exc:  # a fault in one source must not prevent asking the others
            log.exception("%s: asking for the record of %s failed", source.name, name)
            return Unavailable(f"it failed unexpectedly ({type(exc).__name__})")

    async def _stored(self, name: KeyName) -> Record | None:
        data = await threads.run_sync(self._store.get, str(name))
        if data is None:
            return None
        try:
            return records.verify(name, data)
        except WrongRecord as exc:
            log.warning("the stored record of a name is damaged, and is not used: %s", exc)
            return None

    async def _keep(self, name: KeyName, record: Record) -> None:
        try:
            await threads.run_sync(self._store.put, str(name), record.data)
        except StoreFailed as exc:
            log.warning("%s; after a restart an older record might be believed", exc)


def _parse_value(name: Name, value: str) -> IpfsPath | tuple[Name, tuple[bytes, ...]]:
    """The path, or the next name and the path below it, in the value of a record or DNSLink. Raises
    Malformed."""
    try:
        if value.startswith("/ipns/"):
            first, _, rest = value.removeprefix("/ipns/").partition("/")
            next_name = records.parse_name(first)
            if next_name is None:
                raise Malformed(f"{name} leads to {value[:200]!r}, which is not a name")
            return next_name, paths.names(rest)
        if value.startswith("/ipfs/"):
            return paths.parse(value)
    except Malformed:
        raise
    except IpfsFuseError as exc:
        raise Malformed(f"{name} leads to a path that can't be used: {exc}") from exc
    raise Malformed(f"{name} leads to {value[:200]!r}: only /ipfs/ and /ipns/ are followed")
