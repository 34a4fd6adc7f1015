"""Providers on the open network, found by delegated routing
(https://specs.ipfs.tech/routing/http-routing-v1/).

A `Router` names the providers of a CID, and returns the IPNS record of a name. The source `network` asks the
gateways that routers name as providers; they form a pool of their own. A provider that was found for one
block is also asked for the next blocks. Routers are asked again for a block that no known provider gives.

Routers are not trusted: the pool verifies each block and tracks each provider's health, and the resolver
verifies each record.

Concurrency: any number of tasks. Calls that want providers of the same CID share one lookup.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, Final

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed, Unavailable, UsageError, WrongBlock
from ipfsfuse.sources.base import LeafRange, Source, SourceRequest, Subtree
from ipfsfuse.sources.http.addresses import special_purpose
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.failures import LONG, PROTOCOL, TIMEOUT
from ipfsfuse.sources.http.gateway import Gateway, ask_for_record
from ipfsfuse.sources.http.origin import Origin, is_address, parse_origin
from ipfsfuse.sources.http.settings import BoundHeaders, HttpSettings
from ipfsfuse.sources.pool.health import Statistics
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.streams import BlockBatch, Delivery, Send, all_of

log = logging.getLogger(__name__)

# -- routers -------------------------------------------------------------------------------------------------

API: Final = "/routing/v1"
TRANSPORT: Final = "transport-ipfs-gateway-http"
LINES, ONE = "application/x-ndjson", "application/json"
MAX_ROUTER_ANSWER: Final = 1 << 20
"""Bytes that are read of an answer."""
MAX_ANSWER_LINE: Final = 32 * 1024
"""Bytes of one line of an answer."""
MAX_ANSWER_RECORDS: Final = 500
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
    """A delegated router. A list of providers is read only as far as it is used."""

    def __init__(self, http: Http) -> None:
        self.http = http
        self.name = http.origin.text

    async def ipns_record(self, name: str) -> bytes:
        """The newest record that the router has of `name`, unverified. Raises NotHere, SourceFailed."""
        return await ask_for_record(self.http, self.name, f"{API}/ipns/{name}")

    async def aclose(self) -> None:
        await self.http.aclose()

    async def providers(self, cid: Cid) -> AsyncGenerator[Sequence[str], None]:
        """Yields the addresses (multiaddrs) of each provider of `cid` that speaks HTTP; nothing if the router
        knows none. Raises SourceFailed."""
        target = f"{API}/providers/{cids.text(cid)}?filter-protocols={TRANSPORT},unknown"
        async with self.http.ask("GET", target, [("Accept", f"{LINES}, {ONE}")]) as response:
            if response.status == 404:
                return
            if response.status != 200:
                raise await response.refused(self.name)
            if response.content_type == LINES:
                pieces, size, count = b"", 0, 0
                while piece := await response.receive():
                    size += len(piece)
                    *lines, pieces = (pieces + piece).split(b"\n")
                    for line in lines:
                        if line.strip():
                            count += 1
                            yield self._addresses(self._parsed(line))
                    if (
                        size > MAX_ROUTER_ANSWER
                        or len(pieces) > MAX_ANSWER_LINE
                        or count > MAX_ANSWER_RECORDS
                    ):
                        raise SourceFailed(f"{self.name} sent a list of providers without end", LONG)
                if pieces.strip():
                    yield self._addresses(self._parsed(pieces))
            elif response.content_type == ONE:
                said = self._parsed(await response.read(MAX_ROUTER_ANSWER))
                records = said.get("Providers") if isinstance(said, dict) else None
                for record in records[:MAX_ANSWER_RECORDS] if isinstance(records, list) else ():
                    yield self._addresses(record)
            else:
                raise SourceFailed(f"{self.name} sent no list of providers", PROTOCOL)

    def _parsed(self, text: bytes) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise SourceFailed(f"{self.name} sent a list of providers that is not JSON", PROTOCOL) from exc

    def _addresses(self, record: Any) -> Sequence[str]:
        """The addresses in a record; none for a record of another kind, or a peer that does not speak HTTP. A
        Kubo node that passes on records drops their protocols. Then the addresses say whether it is HTTP."""
        if not isinstance(record, dict) or record.get("Schema") != "peer":
            return ()
        protocols, addresses = record.get("Protocols"), record.get("Addrs")
        if (protocols and (not isinstance(protocols, list) or TRANSPORT not in protocols)) or not isinstance(
            addresses, list
        ):
            return ()
        return [each for each in addresses[:MAX_ADDRESSES] if isinstance(each, str) and len(each) <= 500]


def provider_origin(multiaddr: str, *, allow_private: bool) -> Origin | None:
    """The server at a provider's multiaddr, such as /dns4/HOST/tcp/443/https or /ip4/HOST/tcp/443/tls/http.
    None if the address is not HTTP, or is private. A host name is checked again at each connection, when it
    is resolved."""
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
    if protocols[1:2] == ["sni"] and len(protocols) > 2:  # the certificate's name is resolved instead
        host = protocols[2]
    try:
        origin = parse_origin(f"{scheme}://{f'[{host}]' if ':' in host else host}:{int(parts[4])}")
        private = origin.is_local or (is_address(origin.host) and special_purpose(origin.host) != "")
    except (UsageError, ValueError):
        return None
    if f".{origin.host.rstrip('.').lower()}".endswith(".localhost"):
        private = True
    return origin if allow_private or not private else None


# -- providers -----------------------------------------------------------------------------------------------

MAX_PROVIDERS: Final = 16
"""Providers that are kept. Each router may have an equal part of them. If a router names more, its least
useful provider is removed, so a router that floods displaces only its own providers."""
MAX_NEW: Final = 8
"""Providers that one router may name in one lookup."""
MAX_LOOKUPS: Final = 8
"""Lookups at a time."""
LOOKUP_SECONDS: Final = 10.0
OTHER_ROUTERS_SECONDS: Final = 0.5
"""How long the other routers may take after one has named a provider. If no provider gives the block within
`KNOWN_PROVIDERS_SECONDS`, the routers are asked again, and each has `LOOKUP_SECONDS`."""
FOUND_SECONDS, NONE_SECONDS = 60.0, 10.0
"""How long the result of a lookup is used: with providers, and without."""
MAX_LOOKUPS_KEPT: Final = 1000
"""Results of lookups, and providers that sent wrong bytes, that are remembered."""
KNOWN_PROVIDERS_SECONDS: Final = 1.0
"""Seconds that the known providers have to send a block before routers are asked for it."""
FOUND_PROVIDERS_SECONDS: Final = 10.0
"""Seconds that providers have after a lookup. Then `network` fails, so that other sources can be asked."""
DISTRUSTED_SECONDS: Final = 3600.0
"""How long a provider that sent wrong bytes is not added again."""
IDLE_PROVIDER_SECONDS: Final = 600.0
"""A provider that was not used for so long is removed."""


class _Lookup:
    def __init__(self, patient: bool) -> None:
        self.patient = patient
        """Whether every router gets `LOOKUP_SECONDS`."""
        self.done = trio.Event()
        self.until = float("inf")
        self.complete = False
        """Whether every router has answered or failed, or has had its time."""
        self.failure: SourceFailed | None = None


class _Provider:
    def __init__(self, source: Gateway, router: Router) -> None:
        self.source = source
        self.router = router
        """The router that named it first."""
        self.used = trio.current_time()
        self.blocks = 0


class Network(Source):
    """The source `network`. `allow_private`: whether providers at loopback and private addresses may be
    asked."""

    name = "network"
    local = False

    def __init__(
        self, routers: Sequence[Router], settings: HttpSettings, *, allow_private: bool = False
    ) -> None:
        self._routers = routers
        self._settings = replace(settings, headers=BoundHeaders(), public_only=not allow_private)
        self._allow_private = allow_private
        # offline: a provider that lacks a block is not asked for it again
        self._pool = SourcePool([], offline=True, share=MAX_PROVIDERS)
        self._providers: dict[Origin, _Provider] = {}
        self._distrusted: OrderedDict[Origin, float] = OrderedDict()
        self._lookups: OrderedDict[bytes, _Lookup] = OrderedDict()
        self._looking = trio.CapacityLimiter(MAX_LOOKUPS)
        self._closing: list[Gateway] = []

    # -- as a source -------------------------------------------------------------------------------------

    async def get(self, cid: Cid) -> bytes:
        block = await self._from_providers(cid, KNOWN_PROVIDERS_SECONDS) if self._providers else None
        if block is None:
            block = await self._from_named(cid, await self._look_up(cid))
        if block is None:
            said = "".join(f"; {each.name}: {each.why}" for each in self._pool.statistics() if each.why)
            raise NotHere(f"no provider on the network has {cids.text(cid)}{said}")
        return block

    async def _from_named(self, cid: Cid, lookup: _Lookup) -> bytes | None:
        """The block, from the providers that `lookup` found. If it did not wait for all routers, they are
        asked again meanwhile, and then their providers. Raises BlockTooLarge."""
        block: bytes | None = None
        scope, asked = trio.CancelScope(), SourceRequest()

        async def ask_providers() -> None:
            nonlocal block
            found = await self._from_providers(cid, FOUND_PROVIDERS_SECONDS)
            if found is not None:
                block = found
                scope.cancel()

        async def ask_routers_again() -> None:
            nonlocal lookup
            with asked.patience(KNOWN_PROVIDERS_SECONDS):
                await trio.sleep_forever()
            with suppress(SourceFailed):
                lookup = await self._look_up(cid, patient=True)
            await ask_providers()

        with scope, asked.current():
            await all_of([ask_providers] if lookup.complete else [ask_providers, ask_routers_again])
        if block is None:
            lookup.until = min(lookup.until, trio.current_time() + NONE_SECONDS)
        return block

    async def _from_providers(self, cid: Cid, seconds: float) -> bytes | None:
        """The block, if a provider sends it within `seconds`. Raises BlockTooLarge."""
        request = SourceRequest()
        with request.current(), request.patience(seconds):
            try:
                fetched = await self._pool.get(cid)
            except (Unavailable, WrongBlock):
                return None
            finally:
                self._remove_distrusted()
            self._note_used(fetched.source, 1)
            return bytes(fetched.block)
        return None

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        if not self._providers:
            await self._look_up(wanted.file)
        try:
            async with self._pool.stream(wanted, singly=False) as stream:
                async for index, blocks, source, release in stream:
                    self._note_used(source, len(blocks))
                    await send.send(Delivery(index, blocks, release))
        finally:
            self._remove_distrusted()

    async def send_subtree(self, subtree: Subtree, send: Send[BlockBatch]) -> None:
        if not self._providers:
            await self._look_up(subtree.root)
        try:
            async with self._pool.subtree(subtree, _Everything()) as stream:
                async for blocks in stream:
                    for fetched in blocks.values():
                        self._note_used(fetched.source, 1)
                    await send.send([(cid, fetched.block) for cid, fetched in blocks.items()])
        finally:
            self._remove_distrusted()

    async def aclose(self) -> None:
        await self._pool.aclose()
        for source in self._closing:
            await source.aclose()
        for router in self._routers:
            await router.aclose()

    def statistics(self) -> Sequence[Statistics]:
        """The providers' statistics, for `status`."""
        return [replace(each, found=True) for each in self._pool.statistics()]

    # -- providers ---------------------------------------------------------------------------------------

    def _note_used(self, source: Source, count: int) -> None:
        for provider in self._providers.values():
            if provider.source is source:
                provider.used = trio.current_time()
                provider.blocks += count

    def _add(self, addresses: Sequence[str], router: Router) -> bool:
        """Adds a provider at the first of its addresses that can be used. Returns whether it is a provider
        now."""
        origins = (provider_origin(each, allow_private=self._allow_private) for each in addresses)
        origin = next(filter(None, origins), None)
        if origin is None:
            return False
        if origin in self._providers or self._distrusted.get(origin, 0.0) > trio.current_time():
            return origin in self._providers
        of_router = [each for each, provider in self._providers.items() if provider.router is router]
        if len(of_router) >= max(1, MAX_PROVIDERS // len(self._routers)):
            self._remove(min(of_router, key=self._usefulness))
        elif len(self._providers) >= MAX_PROVIDERS:
            self._remove(min(self._providers, key=self._usefulness))
        source = Gateway(Http(origin, self._settings), f"network: {origin.text}")
        self._providers[origin] = _Provider(source, router)
        self._pool.add(source)
        log.info("%s is a provider", origin.text)
        return True

    def _usefulness(self, origin: Origin) -> tuple[bool, float]:
        provider = self._providers[origin]
        return provider.blocks > 0, provider.used

    def _remove(self, origin: Origin) -> None:
        source = self._providers.pop(origin).source
        self._pool.remove(source)
        self._closing.append(source)  # requests may still run: `_tidy` or `aclose` closes it

    def _remove_distrusted(self) -> None:
        """Removes providers that sent wrong bytes."""
        distrusted = self._pool.sources_with_wrong_blocks()
        for origin in [origin for origin, each in self._providers.items() if each.source in distrusted]:
            log.warning("the provider %s sent wrong bytes, and is not asked any more", origin.text)
            self._distrusted[origin] = trio.current_time() + DISTRUSTED_SECONDS
            if len(self._distrusted) > MAX_LOOKUPS_KEPT:
                self._distrusted.popitem(last=False)
            self._remove(origin)
            for lookup in self._lookups.values():  # it may have found no other provider
                lookup.until = min(lookup.until, trio.current_time() + NONE_SECONDS)

    async def _tidy(self) -> None:
        """Removes providers that were not used for long, and closes the removed ones."""
        now = trio.current_time()
        for origin in [
            each for each, used in self._providers.items() if used.used < now - IDLE_PROVIDER_SECONDS
        ]:
            self._remove(origin)
        closing, self._closing = self._closing, []
        for source in closing:
            await source.aclose()

    # -- lookups -----------------------------------------------------------------------------------------

    async def _look_up(self, cid: Cid, patient: bool = False) -> _Lookup:
        """Asks the routers for providers of `cid`, unless a recent result is known. With `patient`, a result
        that came before all routers had answered is not used. Raises SourceFailed if no router answered."""
        key = cids.multihash(cid)
        lookup = self._lookups.get(key)
        if (
            lookup is None
            or lookup.until <= trio.current_time()
            or (patient and not lookup.patient and not lookup.complete)
        ):
            lookup = self._lookups[key] = _Lookup(patient)
            self._lookups.move_to_end(key)
            while len(self._lookups) > MAX_LOOKUPS_KEPT:
                self._lookups.popitem(last=False)[1].done.set()
            try:
                async with self._looking:
                    await self._tidy()
                    found = await self._ask_routers(cid, lookup)
                    lookup.until = trio.current_time() + (FOUND_SECONDS if found else NONE_SECONDS)
            finally:
                if lookup.until == float("inf"):  # cancelled: those that wait for it ask again
                    lookup.until = -float("inf")
                lookup.done.set()
        else:
            await lookup.done.wait()
            if lookup.until == -float("inf"):
                return await self._look_up(cid, patient)
        if lookup.failure is not None:
            raise SourceFailed(str(lookup.failure), lookup.failure.kind)
        return lookup

    async def _ask_routers(self, cid: Cid, lookup: _Lookup) -> bool:
        """Returns whether a provider was named. Sets `lookup.failure` if no router answered."""
        named, failures, answered = 0, list[SourceFailed](), 0
        asked = SourceRequest()

        async def ask(router: Router, scope: trio.CancelScope) -> None:
            nonlocal named, answered
            of_router = 0
            try:
                async with aclosing(router.providers(cid)) as found:
                    async for addresses in found:
                        of_router += self._add(addresses, router)
                        if of_router and not lookup.patient:
                            asked.shorten(scope, OTHER_ROUTERS_SECONDS)
                        if of_router >= MAX_NEW:
                            break
                answered += 1
            except SourceFailed as exc:
                log.info("%s", exc)
                failures.append(exc)
            finally:
                named += of_router

        with asked.current(), asked.patience(LOOKUP_SECONDS) as scope:
            async with trio.open_nursery() as nursery:
                for router in self._routers:
                    nursery.start_soon(ask, router, scope)
        lookup.complete = lookup.patient or not named or not scope.cancelled_caught
        if not named and not answered:
            names = ", ".join(router.name for router in self._routers)
            late = SourceFailed(f"no router answered within {LOOKUP_SECONDS:g} s: {names}", TIMEOUT)
            lookup.failure = failures[0] if failures else late
        return named > 0


class _Everything:
    """Wants all blocks of a subtree (`base.Wanted`)."""

    def wants(self, _cid: Cid) -> bool:
        return True

    def came(self, _cid: Cid, _block: bytes) -> None:
        pass
