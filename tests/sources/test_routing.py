"""Providers by delegated routing: good routers and providers, and those that lie, stall or flood."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed, UsageError
from ipfsfuse.sources import routing
from ipfsfuse.sources.base import LeafRange, Subtree
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import HttpSettings
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.routing import MAX_ROUTER_ANSWER, Network, Router, provider_origin
from ipfsfuse.sources.spec import OpenSettings, open_sources
from ipfsfuse.structures import Buffer
from tests.kubo.node import Node
from tests.mounting import Home
from tests.sources import evil
from tests.sources.content import sample, trees
from tests.sources.servers import Ask, Server
from tests.sources.streamed import give_each

FILE = sample(301)
TREE = trees()["basic"]
PROVIDERS = "/routing/v1/providers/"

pytestmark = pytest.mark.logs("is not asked any more", "sent wrong bytes", "has wrong bytes")


def peer(*addresses: str, **more: Any) -> dict[str, Any]:
    return {
        "Schema": "peer",
        "ID": "12D3KooWJBwL7hm4bKnoFVB8BhQsyRaYj5h7SyVnXdi2Dyyr7tMZ",
        "Protocols": ["transport-ipfs-gateway-http"],
        "Addrs": list(addresses),
    } | more


def multiaddr(server: Server) -> str:
    return f"/ip4/127.0.0.1/tcp/{server.port}/http"


def naming(*servers: Server) -> Callable[[Ask], None]:
    """A router that names `servers` for every CID."""
    return listing([peer(multiaddr(server)) for server in servers])


def listing(records: Sequence[object]) -> Callable[[Ask], None]:
    def behave(ask: Ask) -> None:
        assert ask.path.startswith(PROVIDERS)
        ask.send(200, json.dumps({"Providers": records}).encode(), "application/json")

    return behave


def lines(records: Sequence[object]) -> Callable[[Ask], None]:
    def behave(ask: Ask) -> None:
        ask.send_chunked([json.dumps(each).encode() + b"\n" for each in records], "application/x-ndjson")

    return behave


class Net:
    """A `Network` over routers that are running servers."""

    def __init__(self, *routers: Server, allow_private: bool = True) -> None:
        settings = HttpSettings(connect=2.0)
        self.source = Network(
            [Router(Http(parse_origin(each.url), settings)) for each in routers],
            settings,
            allow_private=allow_private,
        )

    async def __aenter__(self) -> Network:
        return self.source

    async def __aexit__(self, *_: object) -> None:
        await self.source.aclose()


@pytest.mark.parametrize("answer", [listing, lines])
def test_a_provider_gives_blocks_ranges_and_directories(
    answer: Callable[[Sequence[object]], Callable[[Ask], None]],
) -> None:
    """The router is asked once: the provider of the root is asked for the rest."""

    async def main() -> None:
        with (
            Server({}, files=(FILE,), trees=(TREE,)) as gateway,
            Server({}, answer([peer(multiaddr(gateway))])) as router,
        ):
            async with Net(router) as source:
                for cid, block in FILE.blocks.items():
                    assert await source.get(cid) == block
                got: dict[int, bytes] = {}

                async def deliver(index: int, blocks: Sequence[Buffer]) -> None:
                    got.update({index + at: bytes(block) for at, block in enumerate(blocks)})

                await give_each(source.stream(LeafRange(FILE.root, len(FILE.data), FILE.leaves)), deliver)
                assert b"".join(got[index] for index in sorted(got)) == FILE.data
                found: dict[Cid, bytes] = {}

                async def take(blocks: Sequence[tuple[Cid, bytes]]) -> None:
                    found.update(blocks)

                await give_each(source.subtree(Subtree(TREE.root, True, 1 << 20)), take)
                assert found
                assert found.items() <= TREE.blocks.items()
                (statistics,) = source.statistics()
                assert (statistics.name, statistics.found) == (f"network: {gateway.url}", True)
            assert len(router.asked) == 1
            assert "transport-ipfs-gateway-http" in router.asked[0].query["filter-protocols"]

    trio.run(main)


def test_a_block_that_the_known_provider_lacks_is_looked_up() -> None:
    other = sample(303)

    async def main() -> None:
        with Server(FILE.blocks) as one, Server(other.blocks) as two:

            def behave(ask: Ask) -> None:
                cid = cids.parse(ask.path.removeprefix(PROVIDERS))
                naming(one if cid in FILE.blocks else two)(ask)

            with Server({}, behave) as router:
                async with Net(router) as source:
                    assert await source.get(FILE.root) == FILE.blocks[FILE.root]
                    assert await source.get(other.root) == other.blocks[other.root]
                    assert await source.get(FILE.leaves[0].cid) == FILE.blocks[FILE.leaves[0].cid]
                assert len(router.asked) == 2

    trio.run(main)


def test_a_provider_that_lies_is_dropped_and_another_gives_the_block() -> None:
    async def main() -> None:
        with (
            Server(FILE.blocks, evil.wrong_bytes) as liar,
            Server(FILE.blocks) as good,
            Server({}, naming(liar, good)) as router,
        ):
            async with Net(router) as source:
                for cid, block in FILE.blocks.items():
                    assert await source.get(cid) == block
                assert [each.name for each in source.statistics()] == [f"network: {good.url}"]
                asked = len(liar.asked)
                source._lookups.clear()
                await source._look_up(FILE.root)  # the router names the liar again
                for cid, block in FILE.blocks.items():
                    assert await source.get(cid) == block
                assert len(liar.asked) == asked

    trio.run(main)


def stall(ask: Ask) -> None:
    ask.stall()


def flood(ask: Ask) -> None:
    """Endless providers, none of which exists."""
    ask.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n")
    line = (
        json.dumps(peer(*[f"/dns4/{'x' * 60}.example/tcp/{port}/ws" for port in range(10)])).encode() + b"\n"
    )
    while not ask.server.stopping.is_set():
        ask.connection.sendall(line * 100)


def one_line(ask: Ask) -> None:
    """An endless line."""
    ask.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n")
    while not ask.server.stopping.is_set():
        ask.connection.sendall(b"[" * 65536)


def a_page(ask: Ask) -> None:
    ask.send(200, b"<html>", "text/html")


def no_json(ask: Ask) -> None:
    ask.send(200, b'{"Providers": [', "application/json")


def deep(ask: Ask) -> None:
    ask.send(200, b"[" * 100_000, "application/json")


def huge(ask: Ask) -> None:
    ask.send(200, b" " * (MAX_ROUTER_ANSWER + 1), "application/json")


def broken(ask: Ask) -> None:
    ask.send(500, b"broken", "text/plain")


BAD = [flood, one_line, a_page, no_json, deep, huge, broken]


@pytest.mark.parametrize("behave", BAD)
def test_a_router_that_misbehaves_fails_soon_and_in_one_line(behave: Callable[[Ask], None]) -> None:
    async def main() -> None:
        with Server({}, behave) as router:
            async with Net(router) as source:
                start = time.monotonic()
                with pytest.raises(SourceFailed, match=router.url) as caught:
                    await source.get(FILE.root)
                assert "\n" not in str(caught.value)
                assert time.monotonic() - start < 10

    trio.run(main)


@pytest.mark.parametrize("behave", [stall, *BAD])
def test_a_good_router_is_enough_although_another_is_bad(behave: Callable[[Ask], None]) -> None:
    async def main() -> None:
        with Server(FILE.blocks) as gateway, Server({}, naming(gateway)) as router, Server({}, behave) as bad:
            async with Net(bad, router) as source:
                start = time.monotonic()
                for cid, block in FILE.blocks.items():
                    assert await source.get(cid) == block
                assert time.monotonic() - start < routing.LOOKUP_SECONDS

    trio.run(main)


def test_a_router_that_floods_with_providers_does_not_hide_a_slow_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The good router answers after the half second that the others have. Its provider stays known."""
    monkeypatch.setattr(routing, "FOUND_PROVIDERS_SECONDS", 2.0)

    async def main() -> None:
        with Server(FILE.blocks) as gateway, Server({}, flood_of_providers()) as bad:

            def slow(ask: Ask) -> None:
                time.sleep(1.2)
                naming(gateway)(ask)

            with Server({}, slow) as router:
                async with Net(bad, router) as source:
                    for cid, block in FILE.blocks.items():
                        assert await source.get(cid) == block
                    assert len(router.asked) == 2
                    absent = cids.make(cids.RAW, b"\x12\x20" + bytes(32))
                    with pytest.raises(NotHere):
                        await source.get(absent)
                    names = [each.name for each in source.statistics()]
                    assert f"network: {gateway.url}" in names
                    assert len(names) <= routing.MAX_PROVIDERS // 2 + 1

    trio.run(main)


def flood_of_providers() -> Callable[[Ask], None]:
    """A router that names new servers in each answer. None of them exists."""
    answers = iter(range(1, 200))

    def behave(ask: Ask) -> None:
        answer = next(answers)
        lines([peer(f"/ip4/127.2.{answer}.{number}/tcp/9/http") for number in range(1, 200)])(ask)

    return behave


def test_a_router_that_stalls_is_given_up_after_the_time_for_a_lookup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "LOOKUP_SECONDS", 0.3)

    async def main() -> None:
        with Server({}, stall) as router:
            async with Net(router) as source:
                with pytest.raises(SourceFailed, match=r"no router answered within 0\.3 s: http://127"):
                    await source.get(FILE.root)

    trio.run(main)


def test_records_that_make_no_sense_are_skipped() -> None:
    nonsense: list[object] = [
        *(
            None,
            7,
            "x",
            [],
            {},
            {"Schema": "peer"},
            {"Schema": "bitswap", "Addrs": ["/ip4/1.2.3.4/tcp/1/http"]},
        ),
        *(peer(Addrs=7), peer(Addrs=[7, None, {}]), peer(Protocols={"a": 1}), peer("x" * 10_000)),
        *(peer("/ip4/127.0.0.1/tcp/999999/http"), peer("/ip4/127.0.0.1/tcp/x/http"), peer("//////")),
        peer("/ip4/127.0.0.1/tcp/4001/http", Protocols=["transport-bitswap"]),
    ]

    async def main() -> None:
        with (
            Server(FILE.blocks) as gateway,
            Server({}, lines([*nonsense, peer(multiaddr(gateway))])) as router,
        ):
            async with Net(router) as source:
                assert await source.get(FILE.root) == FILE.blocks[FILE.root]
                assert len(source.statistics()) == 1

    trio.run(main)


def test_many_lookups_of_a_block_cause_one_request_and_absence_is_remembered() -> None:
    async def main() -> None:
        with Server({}, listing([])) as router:
            async with Net(router) as source:

                async def lacking() -> None:
                    with pytest.raises(NotHere, match="no provider on the network has"):
                        await source.get(FILE.root)

                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(lacking)
                await lacking()
                assert len(router.asked) == 1

    trio.run(main)


def test_the_numbers_of_providers_and_lookups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand named providers, few are kept. Old lookups are forgotten."""
    monkeypatch.setattr(routing, "MAX_LOOKUPS_KEPT", 10)
    many = [peer(f"/dns4/p{number}.example/tcp/443/https") for number in range(1000)]

    async def main() -> None:
        with Server({}, listing(many)) as router:
            async with Net(router) as source:
                for leaf in FILE.leaves[:3]:
                    await source._look_up(leaf.cid)
                    assert len(source._providers) <= routing.MAX_PROVIDERS
                assert len(source.statistics()) == len(source._providers)
        with Server({}, listing([])) as router:
            async with Net(router) as source:
                for number in range(30):
                    await source._look_up(cids.make(cids.RAW, b"\x12\x20" + bytes([number]) * 32))
                assert len(source._lookups) == 10

    trio.run(main)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("/dns4/gw.example/tcp/443/https", "https://gw.example"),
        ("/dns/gw.example/tcp/8443/tls/http", "https://gw.example:8443"),
        ("/dns6/gw.example/tcp/80/http", "http://gw.example"),
        ("/ip4/1.2.3.4/tcp/443/tls/sni/gw.example/http", "https://gw.example"),
        ("/ip6/2606:4700::1/tcp/443/https", "https://[2606:4700::1]"),
        *[
            (text, None)
            for text in (
                *("", "/", "/ip4/1.2.3.4/tcp/4001", "/ip4/1.2.3.4/udp/4001/quic-v1", "/unix/run/x/http"),
                *("/ip4/1.2.3.4/tcp/4001/ws", "/dns4/../tcp/80/http", "/dns4/a b/tcp/80/http"),
                *(
                    "/ip4/127.0.0.1/tcp/80/http",
                    "/ip4/10.1.2.3/tcp/80/http",
                    "/ip4/169.254.169.254/tcp/80/http",
                ),
                *("/ip6/::1/tcp/80/http", "/ip6/::ffff:10.0.0.1/tcp/80/http", "/ip6/fe80::1/tcp/80/http"),
                *("/dns4/localhost/tcp/80/http", "/dns4/a.localhost/tcp/80/http", "/ip4/0.0.0.0/tcp/80/http"),
                *("/ip4/192.168.1.1/tcp/443/tls/http", "/ip4/1.2.3.4/tcp/443/tls/sni/127.0.0.1/http"),
            )
        ],
    ],
)
def test_only_public_http_addresses_of_providers_are_used(text: str, origin: str | None) -> None:
    found = provider_origin(text, allow_private=False)
    assert (found and found.text) == origin


def test_a_provider_at_a_private_address_is_never_contacted() -> None:
    """A name that leads to such an address is not contacted either."""
    addresses = "/ip4/127.0.0.1/tcp/{0}/http", "/dns4/localhost/tcp/{0}/http"

    async def main() -> None:
        with Server(FILE.blocks) as gateway:
            records = [peer(each.format(gateway.port)) for each in addresses]
            with Server({}, listing(records)) as router:
                async with Net(router, allow_private=False) as source:
                    with pytest.raises(NotHere):
                        await source.get(FILE.root)
                    assert not source.statistics()
            assert not gateway.asked

    trio.run(main)


def test_a_name_is_checked_when_it_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider controls the resolver's answer too, so the answer is checked."""

    async def resolve(*_: object, **__: object) -> list[Any]:
        return [(2, 1, 6, "", ("127.0.0.1", gateway.port))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(routing, "FOUND_PROVIDERS_SECONDS", 1.0)
    with Server(FILE.blocks) as gateway:
        record = peer(f"/dns4/provider.example/tcp/{gateway.port}/http")

        async def main() -> None:
            with Server({}, listing([record])) as router:
                async with Net(router, allow_private=False) as source:
                    with pytest.raises(NotHere, match=r"127\.0\.0\.1 is for loopback"):
                        await source.get(FILE.root)

        trio.run(main)
        assert not gateway.asked


def test_the_network_is_one_of_the_sources_of_a_pool(tmp_path: Any) -> None:
    async def main() -> None:
        with Server(FILE.blocks) as gateway, Server({}, naming(gateway)) as router:
            settings = OpenSettings(
                tmp_path / "library", tmp_path / "indexes", routers=[router.url + "/routing/v1/"],
                allow_private_providers=True,
            )  # fmt: skip
            async with open_sources(["network"], settings) as sources:
                pool = SourcePool(sources)
                for cid, block in FILE.blocks.items():
                    assert (await pool.get(cid)).block == block
                assert [each.name for each in pool.statistics()] == ["network", f"network: {gateway.url}"]
            with pytest.raises(UsageError, match="name a router"):
                async with open_sources(["network"], OpenSettings(tmp_path / "l", tmp_path / "i")):
                    pass
            async with open_sources(
                ["network"], OpenSettings(tmp_path / "l", tmp_path / "i", offline=True)
            ) as none:
                assert not none

    trio.run(main)


@pytest.mark.fuse
@pytest.mark.kubo
def test_a_file_is_read_with_one_real_node_as_router_and_another_as_provider(
    kubo_node: Node, tmp_path: Any
) -> None:
    """The node asks another router, and passes its answer on."""
    user = Home(tmp_path / "home")
    content = bytes(range(256)) * 4096
    cid = kubo_node.cmd("add", "-Q", "--pin=false", "--raw-leaves", "--cid-version=1", stdin=content)
    with ExitStack() as stack:
        port = parse_origin(kubo_node.gateway_url).port
        behave = listing([peer(f"/ip4/127.0.0.1/tcp/{port}/http")])
        upstream = stack.enter_context(Server({}, behave))
        routing = {"Type": "auto", "DelegatedRouters": [upstream.url]}
        router = stack.enter_context(
            Node(settings={"Gateway": {"ExposeRoutingAPI": True}, "Routing": routing})
        )
        options = ["--from", "network", "--router", router.gateway_url, "--allow-private-providers"]
        with user.mounted(*options) as mount:
            assert (mount.path / cid).read_bytes() == content
            named = {each["name"]: each["found"] for each in mount.status()["sources"]}
            assert named == {"network": False, f"network: {kubo_node.gateway_url}": True}
        assert upstream.asked
