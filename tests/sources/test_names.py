"""Resolving names to paths: by records from servers that lie, stall and replay, and by DNSLink."""

import base64
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ipfsfuse.cache.store.records import MAX_NAME_RECORDS, NameRecords
from ipfsfuse.errors import IpfsFuseError, Malformed, NotFound, Unavailable, UsageError
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings
from ipfsfuse.sources.names import resolver as resolvers
from ipfsfuse.sources.names.record import Name, parse_name
from ipfsfuse.sources.names.resolver import Dns, DnsOverHttps, Resolved, Resolver, SystemDns
from tests.sources.ipns import NameServer, make, name_of

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(3)]
NAMES = [name_of(key) for key in KEYS]
CID = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
OTHER = "QmWfVY9y3xjsixTgbd9AorQxH7VtMpzfx2HaWtsoUYecaX"
EXPECTED = pytest.mark.logs("k51", "example", "_dnslink")


class Ask:
    """Resolves names by servers on loopback. Each call has a new resolver, as after a restart."""

    def __init__(self, folder: Path, *servers: NameServer, dns: Callable[[], Dns] | None = None) -> None:
        self.folder = folder
        self.servers = servers
        self.dns = dns
        self.source_name = ""
        """The name of all sources; "" if each is named by its address."""

    def __call__(self, *names: Name | str, seconds: float = 5.0) -> list[Resolved | IpfsFuseError]:
        """The path, or the error, of each name. They are resolved one after the other."""
        return trio.run(self._ask, names, seconds)

    def path(self, name: Name | str) -> str:
        (found,) = self(name)
        assert isinstance(found, Resolved), found
        return str(found.path)

    def error(self, name: Name | str, seconds: float = 5.0) -> IpfsFuseError:
        (found,) = self(name, seconds=seconds)
        assert isinstance(found, IpfsFuseError)
        return found

    async def _ask(self, names: Sequence[Name | str], seconds: float) -> list[Resolved | IpfsFuseError]:
        sources = [
            Gateway(Http(parse_origin(each.url), HttpSettings()), self.source_name or each.url)
            for each in self.servers
        ]
        store = NameRecords(self.folder)
        dns = self.dns() if self.dns else None
        resolver = Resolver(sources, store, dns, seconds=seconds)
        found: list[Resolved | IpfsFuseError] = []
        for name in names:
            parsed = parse_name(name) if isinstance(name, str) else name
            assert parsed is not None
            try:
                found.append(await resolver.resolve(parsed))
            except IpfsFuseError as exc:
                found.append(exc)
        for source in sources:
            await source.aclose()
        if dns is not None:
            await dns.aclose()
        store.close()
        return found


@pytest.fixture
def servers() -> Iterator[list[NameServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(NameServer().serving()) for _ in range(2)]


@pytest.fixture
def ask(tmp_path: Path, servers: list[NameServer]) -> Ask:
    return Ask(tmp_path, *servers)


def test_a_name_is_resolved_through_names_to_a_path(ask: Ask, servers: list[NameServer]) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipns/{NAMES[1]}/a b")
    servers[1].records[str(NAMES[1])] = make(KEYS[1], f"/ipfs/{CID}/ü")
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}/ü/a b"


def test_of_two_records_the_one_with_the_higher_sequence_is_used(ask: Ask, servers: list[NameServer]) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{OTHER}", 7)
    servers[1].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}", 8)
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"


def test_two_sources_of_one_name_are_both_asked(ask: Ask, servers: list[NameServer], tmp_path: Path) -> None:
    """Two sources may have the same name, as routers do. The answer of one is not the answer of both."""
    ask.source_name = "https://router.example"
    for lacks, has in (servers, reversed(servers)):
        lacks.records.clear()
        has.records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}", 8)
        (tmp_path / "names" / str(NAMES[0])).unlink(missing_ok=True)
        assert ask.path(NAMES[0]) == f"/ipfs/{CID}"


@EXPECTED
def test_an_older_record_replayed_after_a_restart_is_not_used(ask: Ask, servers: list[NameServer]) -> None:
    old, new = make(KEYS[0], f"/ipfs/{OTHER}", 7), make(KEYS[0], f"/ipfs/{CID}", 8)
    servers[0].records[str(NAMES[0])] = new
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"
    servers[0].records[str(NAMES[0])] = servers[1].records[str(NAMES[0])] = old
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"
    servers[0].records.clear()
    servers[1].records.clear()
    # no source has a record: the one that was kept is still valid
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"


@EXPECTED
def test_an_older_record_is_not_used_when_the_newer_one_has_expired(
    ask: Ask, servers: list[NameServer]
) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}", 8, valid=1.5)
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{OTHER}", 7)
    trio.run(trio.sleep, 1.5)
    assert "the newest record (sequence 8) has expired" in str(ask.error(NAMES[0]))


@EXPECTED
def test_an_expired_record_is_not_used(ask: Ask, servers: list[NameServer]) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}", 8, valid=-1)
    error = ask.error(NAMES[0])
    assert isinstance(error, Unavailable)
    assert "expired" in str(error)


def test_an_expired_record_of_a_higher_sequence_does_not_hide_a_valid_one(
    ask: Ask, servers: list[NameServer], tmp_path: Path
) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{OTHER}", 9, valid=-1)
    servers[1].records[str(NAMES[0])] = valid = make(KEYS[0], f"/ipfs/{CID}", 8)
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"
    assert (tmp_path / "names" / str(NAMES[0])).read_bytes() == valid


@EXPECTED
def test_a_source_that_lies_can_only_withhold(ask: Ask, servers: list[NameServer]) -> None:
    lie = make(KEYS[1], f"/ipfs/{OTHER}", 99)
    servers[0].records[str(NAMES[0])] = lie
    error = ask.error(NAMES[0])
    assert isinstance(error, Unavailable)
    assert "signature is wrong" in str(error)
    servers[1].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}")
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"


@EXPECTED
@pytest.mark.parametrize("how", ["flood", "page", "garbage"])
def test_an_answer_that_is_not_a_record_is_refused(ask: Ask, servers: list[NameServer], how: str) -> None:
    data = make(KEYS[0], f"/ipfs/{CID}")
    servers[0].records[str(NAMES[0])] = {"flood": bytes(1 << 24), "page": data, "garbage": b"\xff" * 99}[how]
    servers[0].content_type = "text/html" if how == "page" else servers[0].content_type
    assert isinstance(ask.error(NAMES[0]), Unavailable)


@EXPECTED
def test_a_source_that_stalls_delays_a_name_only_by_the_time_for_newer_records(
    ask: Ask, servers: list[NameServer]
) -> None:
    servers[0].stalled = True
    servers[1].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}")

    async def timed() -> float:
        began = trio.current_time()
        await ask._ask([NAMES[0]], 30.0)
        return trio.current_time() - began

    assert trio.run(timed) < resolvers.NEWER_RECORD_SECONDS + 5
    assert "no answer in time" in str(ask.error(NAMES[1], seconds=0.3))


@EXPECTED
def test_names_that_lead_to_each_other_are_malformed(ask: Ask, servers: list[NameServer]) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipns/{NAMES[1]}/x")
    servers[0].records[str(NAMES[1])] = make(KEYS[1], f"/ipns/{NAMES[0]}/x")
    assert isinstance(ask.error(NAMES[0]), Malformed)


@EXPECTED
@pytest.mark.parametrize(
    "value", ["", "/ipfs/", "/ipfs/x", f"/ipfs/{CID}/../x", f"/ipfs/{CID}/\0", f"/ipfs/{CID}/" + "x" * 256,
              "/ipns/", "/ipns/localhost", "/etc/passwd", f"/ipfs/{CID}" + "/x" * 3000, CID],
)  # fmt: skip
def test_a_value_that_is_not_a_path_is_malformed(ask: Ask, servers: list[NameServer], value: str) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], value)
    assert isinstance(ask.error(NAMES[0]), Malformed)


def test_the_time_to_live_bounds_how_long_a_name_is_kept(tmp_path: Path, servers: list[NameServer]) -> None:
    async def asked_after(seconds: float, ttl: float) -> int:
        source = Gateway(Http(parse_origin(servers[0].url), HttpSettings()), "server")
        servers[0].asked.clear()
        servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}", ttl=ttl)
        resolver = Resolver([source], NameRecords(tmp_path), None)
        async with trio.open_nursery() as nursery:  # many calls for one name cause one request
            for _ in range(20):
                nursery.start_soon(resolver.resolve, NAMES[0])
        await trio.sleep(seconds)
        found = await resolver.resolve(NAMES[0])
        assert found.until - trio.current_time() <= max(ttl, resolvers.MIN_KEPT_SECONDS)
        await source.aclose()
        return servers[0].asked[str(NAMES[0])]

    assert trio.run(asked_after, 1.1, 60) == 1
    assert trio.run(asked_after, 1.1, 0) == 2


def test_the_store_keeps_a_bounded_number_of_records(tmp_path: Path) -> None:
    store = NameRecords(tmp_path)
    for number in range(MAX_NAME_RECORDS + 3):
        assert store._folder.fd >= 0
        store.put(f"k{number}", b"x") if number in (0, MAX_NAME_RECORDS + 2) else _touch(tmp_path, number)
    assert len(store.names()) == MAX_NAME_RECORDS
    assert store.get(f"k{MAX_NAME_RECORDS + 2}") == b"x"
    store.close()


def _touch(folder: Path, number: int) -> None:
    (folder / "names" / f"k{number}").write_bytes(b"x")


@EXPECTED
def test_a_damaged_record_on_the_disk_is_not_used(
    ask: Ask, servers: list[NameServer], tmp_path: Path
) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{CID}")
    ask.path(NAMES[0])
    (tmp_path / "names" / str(NAMES[0])).write_bytes(b"damaged")
    assert ask.path(NAMES[0]) == f"/ipfs/{CID}"
    assert len((tmp_path / "names" / str(NAMES[0])).read_bytes()) > 100


# -- DNSLink -------------------------------------------------------------------------------------------------

ZONE: dict[str, list[str]] = {
    "_dnslink.plain.example.": [f'TXT "dnslink=/ipfs/{CID}/a"', 'TXT "v=spf1"'],
    "_dnslink.long.example.": [f'TXT "dnslink=/ipfs/" "{CID}"'],
    "_dnslink.alias.example.": ["CNAME _dnslink.plain.example."],
    "_dnslink.other.example.": ['TXT "something else"'],
    "_dnslink.bad.example.": ['TXT "dnslink=/ipfs/../x"'],
    "_dnslink.key.example.": [f'TXT "dnslink=/ipns/{NAMES[0]}/b"'],
    "_dnslink.none.example.": ["A 127.0.0.1"],
}


def answer(query: bytes) -> bytes:
    asked = dns.message.from_wire(query)
    reply = dns.message.make_response(asked)
    name = asked.question[0].name.to_text().lower()
    if name == "_dnslink.broken.example.":
        reply.set_rcode(dns.rcode.SERVFAIL)
    elif name not in ZONE:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    while name in ZONE:
        entries = [entry.split(" ", 1) for entry in ZONE[name]]
        for kind in ("CNAME", "TXT"):
            texts = [text for each, text in entries if each == kind]
            if texts:
                reply.answer.append(dns.rrset.from_text_list(name, 30, "IN", kind, texts))
        name = next((text for kind, text in entries if kind == "CNAME"), "")
    return reply.to_wire()


class DnsServer(NameServer):
    """Answers DNS over HTTPS requests, by plain HTTP."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = parse_qs(urlsplit(request.path).query)["dns"][0]
        data = answer(base64.urlsafe_b64decode(asked + "=" * (-len(asked) % 4)))
        if b"liar" in data:
            data = answer(dns.message.make_query("_dnslink.plain.example.", "TXT").to_wire())
        if b"garbage" in data:
            data = b"\xff" * 100
        request.send_response(200)
        request.send_header("Content-Type", "application/dns-message")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


@contextmanager
def over_https() -> Iterator[Callable[[], Dns]]:
    with DnsServer().serving() as server:
        yield lambda: DnsOverHttps(f"{server.url}/dns-query", HttpSettings())


@contextmanager
def by_system(folder: Path) -> Iterator[Callable[[], Dns]]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, socket = self.request
            socket.sendto(answer(data), self.client_address)

    with socketserver.ThreadingUDPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        yield lambda: SystemDns(str(folder / "resolv.conf"), server.server_address[1])
        server.shutdown()


@pytest.fixture(params=["https", "system"])
def dns_ask(request: pytest.FixtureRequest, tmp_path: Path, servers: list[NameServer]) -> Iterator[Ask]:
    way: Any = over_https() if request.param == "https" else by_system(tmp_path)
    with way as made:
        yield Ask(tmp_path, servers[0], dns=made)


@EXPECTED
def test_a_domain_leads_where_its_dnslink_says(dns_ask: Ask, servers: list[NameServer]) -> None:
    servers[0].records[str(NAMES[0])] = make(KEYS[0], f"/ipfs/{OTHER}")
    assert dns_ask.path("plain.example") == f"/ipfs/{CID}/a"
    assert dns_ask.path("LONG.example.") == f"/ipfs/{CID}"
    assert dns_ask.path("alias.example") == f"/ipfs/{CID}/a"
    assert dns_ask.path("key.example") == f"/ipfs/{OTHER}/b"
    (found,) = dns_ask("plain.example")
    assert isinstance(found, Resolved)
    too_long_for_dns = ".".join(["a" * 61] * 4)  # with `_dnslink.` before it
    for absent in ("nowhere.example", "other.example", "none.example", too_long_for_dns):
        assert isinstance(dns_ask.error(absent), NotFound)
    assert isinstance(dns_ask.error("broken.example"), Unavailable)
    assert isinstance(dns_ask.error("bad.example"), Malformed)


@EXPECTED
def test_an_answer_to_another_question_does_not_prove_absence(tmp_path: Path) -> None:
    with over_https() as made:
        asked = Ask(tmp_path, dns=made)
        assert isinstance(asked.error("liar.example"), Unavailable)
        assert isinstance(asked.error("garbage.example"), Unavailable)
    assert isinstance(asked.error("plain.example"), Unavailable)  # the server has ended


def test_dns_is_asked_over_https_or_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="https"):
        DnsOverHttps("http://dns.example/dns-query", HttpSettings())
    (tmp_path / "resolv.conf").write_text("")
    with pytest.raises(UsageError, match="--dns URL"):
        SystemDns(str(tmp_path / "resolv.conf"))


@EXPECTED
def test_a_domain_is_unavailable_without_dns(ask: Ask) -> None:
    assert isinstance(ask.error("plain.example"), Unavailable)
