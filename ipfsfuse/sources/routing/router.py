"""A router: who provides a CID, and the IPNS record of a name, by the delegated routing HTTP API
(https://specs.ipfs.tech/routing/http-routing-v1/).

Nothing that a router says is trusted: it names servers, whose blocks are verified, and records are verified
by who asked for them. A list is read as far as it is useful, and no further.
"""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import SourceFailed, UsageError
from ipfsfuse.sources.http.addresses import special_purpose
from ipfsfuse.sources.http.client import ERROR_BODY, Http
from ipfsfuse.sources.http.failures import LONG, PROTOCOL, refused
from ipfsfuse.sources.http.gateway import ask_for_record
from ipfsfuse.sources.http.origin import Origin, is_address, parse_origin
from ipfsfuse.sources.http.settings import HttpSettings

API: Final = "/routing/v1"
TRANSPORT: Final = "transport-ipfs-gateway-http"
LINES, ONE = "application/x-ndjson", "application/json"
MAX_ANSWER: Final = 1 << 20
"""Bytes of an answer that are read."""
MAX_RECORD: Final = 32 * 1024
"""Bytes of one line of an answer."""
MAX_RECORDS: Final = 500
MAX_ADDRESSES: Final = 20
"""Addresses of one record that are looked at."""


def open_routers(urls: Sequence[str], settings: HttpSettings) -> Sequence["Router"]:
    """The routers at `urls`, each once; an URL may end in the API's own path. Raises UsageError."""
    try:
        origins = dict.fromkeys(parse_origin(url.rstrip("/").removesuffix(API)) for url in urls)
    except UsageError as exc:
        raise UsageError(f"--router {exc}") from exc
    return [Router(Http(origin, settings)) for origin in origins]


class Router:
    def __init__(self, http: Http) -> None:
        self.http = http
        self.name = http.origin.text

    async def ipns_record(self, name: str) -> bytes:
        """The newest record it has of `name`, unverified. Raises NotHere, SourceFailed."""
        return await ask_for_record(self.http, self.name, f"{API}/ipns/{name}")

    async def aclose(self) -> None:
        await self.http.aclose()

    async def providers(self, cid: Cid) -> AsyncGenerator[Sequence[str], None]:
        """The addresses of each provider of `cid` that speaks HTTP, as multiaddrs, as they come. Raises
        SourceFailed; a router that knows nobody has no items."""
        target = f"{API}/providers/{cids.text(cid)}?filter-protocols={TRANSPORT},unknown"
        async with self.http.ask("GET", target, [("Accept", f"{LINES}, {ONE}")]) as response:
            if response.status == 404:
                return
            if response.status != 200:
                retry = response.headers.get("retry-after", "")
                raise refused(self.name, response.status, retry, await response.read(ERROR_BODY))
            if response.content_type == LINES:
                pieces, size, count = b"", 0, 0
                while piece := await response.receive():
                    size += len(piece)
                    *lines, pieces = (pieces + piece).split(b"\n")
                    for line in lines:
                        if line.strip():
                            count += 1
                            yield self._addresses(self._parsed(line))
                    if size > MAX_ANSWER or len(pieces) > MAX_RECORD or count > MAX_RECORDS:
                        raise SourceFailed(f"{self.name} sent a list of providers without end", LONG)
                if pieces.strip():
                    yield self._addresses(self._parsed(pieces))
            elif response.content_type == ONE:
                said = self._parsed(await response.read(MAX_ANSWER))
                records = said.get("Providers") if isinstance(said, dict) else None
                for record in records[:MAX_RECORDS] if isinstance(records, list) else ():
                    yield self._addresses(record)
            else:
                raise SourceFailed(f"{self.name} sent no list of providers", PROTOCOL)

    def _parsed(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise SourceFailed(f"{self.name} sent a list of providers that is not JSON", PROTOCOL) from exc

    def _addresses(self, record: Any) -> Sequence[str]:
        """None of a record of another kind, or of a peer that does not speak HTTP. A Kubo node that passes
        on what other routers say drops the protocols; then the addresses tell."""
        if not isinstance(record, dict) or record.get("Schema") != "peer":
            return ()
        protocols, addresses = record.get("Protocols"), record.get("Addrs")
        if (protocols and (not isinstance(protocols, list) or TRANSPORT not in protocols)) or not isinstance(
            addresses, list
        ):
            return ()
        return [each for each in addresses[:MAX_ADDRESSES] if isinstance(each, str) and len(each) <= 500]


def provider_origin(multiaddr: str, *, allow_private: bool) -> Origin | None:
    """The server at a provider's multiaddr, such as /dns4/HOST/tcp/443/https or /ip4/HOST/tcp/443/tls/http;
    None for an address that is not HTTP, or that is private. A host name is checked again when it is
    resolved, at each connection."""
    parts = multiaddr.split("/")
    if (
        len(parts) < 6
        or parts[0]
        or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6")
        or parts[3] != "tcp"
    ):
        return None
    protocols = parts[5:]
    if protocols[:1] == ["http"]:
        scheme = "http"
    elif protocols[:1] == ["https"] or (protocols[:1] == ["tls"] and "http" in protocols):
        scheme = "https"
    else:
        return None
    host = parts[2]
    if (
        protocols[1:2] == ["sni"] and len(protocols) > 2
    ):  # the name in the certificate: it is resolved instead
        host = protocols[2]
    try:
        origin = parse_origin(f"{scheme}://{f'[{host}]' if ':' in host else host}:{int(parts[4])}")
        private = origin.is_local or (is_address(origin.host) and special_purpose(origin.host) != "")
    except (UsageError, ValueError):
        return None
    if f".{origin.host.rstrip('.').lower()}".endswith(".localhost"):
        private = True
    return origin if allow_private or not private else None
