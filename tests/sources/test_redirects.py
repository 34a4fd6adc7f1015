"""Redirects: none to a private address is followed, whatever a name resolves to, with or without a proxy. And
redirects of a local node to names below localhost."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.http import client
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Rpc
from ipfsfuse.sources.http.origin import parse_origin, proxy_for
from ipfsfuse.sources.http.settings import BoundHeaders
from tests.kubo.node import Node
from tests.sources.content import raw_blocks, sample
from tests.sources.proxies import Proxy
from tests.sources.servers import Ask, Behaviour, Server, answer_well
from tests.sources.test_kubo_settings import check_all_blocks

BLOCKS = raw_blocks(11, 3, size=3000)
CID, BLOCK = next(iter(BLOCKS.items()))
HASTY = HttpSettings(connect=2.0, idle=1.0, total=2.0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    proxy_for.cache_clear()
    yield
    proxy_for.cache_clear()


def redirect_to(location: str) -> Behaviour:
    return lambda ask: ask.send(302, b"", Location=location.format(path=ask.path))


def failure(url: str, settings: HttpSettings = HASTY) -> SourceFailed:
    """The failure of a read of a block from `url`."""

    async def main() -> SourceFailed:
        source = Gateway(Http(parse_origin(url), settings), url)
        try:
            with pytest.raises(SourceFailed) as caught:
                await source.get(CID)
            return caught.value
        finally:
            await source.aclose()

    return trio.run(main)


class Resolver(trio.abc.HostnameResolver):
    """Answers each name with the answers of the test, in order. The last one is repeated."""

    def __init__(self, answers: dict[str, list[list[str]]]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        self.asked.append(name)
        answers = self.answers.get(name)
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise AssertionError


PRIVATE = ["http://127.0.0.1:1/", "http://169.254.169.254/latest", "http://[::1]:1/", "http://[fec0::1]/", "http://192.0.0.8/",
           "http://[64:ff9b::a00:1]/", "http://[::ffff:10.0.0.1]/", "http://0x7f.1/", "http://2130706433/", "http://localhost./",
           "http://[2002:7f00:1::]/", "http://[fe80::1%25eth0]/"]  # fmt: skip


@pytest.mark.parametrize("location", PRIVATE)
@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "proxied"])
def test_redirects_to_private_addresses_are_not_followed(
    location: str, proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(BLOCKS, redirect_to(location)) as server, Proxy({"gateway.test": server.port}) as proxy:
        if proxied:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        failed = failure("http://gateway.test" if proxied else server.url)
        assert (failed.kind, "\n" in str(failed)) == ("redirect", False)
        assert len(server.asked) == 1
        assert len(proxy.heads) == int(proxied)


@pytest.mark.parametrize(
    "location",
    ["http://[::1/x", "http://a:99999/", "http://a:b/", "http://%00/", "http://a..b/", "http://u:p@a.test/"],
)
def test_a_redirect_to_a_malformed_address_is_reported_as_such(location: str) -> None:
    with Server(BLOCKS, redirect_to(location)) as server:
        failed = failure(server.url)
        assert failed.kind == "redirect"
        assert "redirects to what is not an address" in str(failed)


@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "proxied"])
def test_a_redirect_to_a_name_with_one_private_address_is_not_followed(
    proxied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Server(BLOCKS, redirect_to("http://mixed.test{path}")) as server,
        Proxy({"gateway.test": server.port}) as proxy,
    ):
        if proxied:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")

        async def main() -> None:
            resolver = Resolver({"mixed.test": [["93.184.216.34", "10.0.0.1"]]})
            trio.socket.set_custom_hostname_resolver(resolver)
            source = Gateway(Http(parse_origin("http://gateway.test" if proxied else server.url), HASTY), "x")
            with pytest.raises(SourceFailed, match=r"10\.0\.0\.1 is for private use") as caught:
                await source.get(CID)
            assert caught.value.kind == "redirect"
            assert resolver.asked == ["mixed.test"]
            await source.aclose()

        trio.run(main)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver gives a public address first and a private one then. It is asked only once."""
    connected: list[str] = []

    async def open_tcp_stream(host: str, port: int, **_options: object) -> trio.SocketStream:
        connected.append(host)
        raise OSError("not today")

    with Server(BLOCKS, redirect_to("http://rebinding.test{path}")) as server:

        async def main() -> None:
            resolver = Resolver({"rebinding.test": [["93.184.216.34"], ["127.0.0.1"]]})
            trio.socket.set_custom_hostname_resolver(resolver)
            http = Http(parse_origin(server.url), HASTY)
            source = Gateway(http, "x")
            with monkeypatch.context() as patched:
                first = trio.open_tcp_stream

                async def routed(host: str, port: int, **options: object) -> trio.SocketStream:
                    if port == server.port:
                        return await first(host, port)
                    return await open_tcp_stream(host, port, **options)

                patched.setattr(trio, "open_tcp_stream", routed)
                with pytest.raises(SourceFailed):
                    await source.get(CID)
            assert connected == ["93.184.216.34"]
            assert resolver.asked == ["rebinding.test"]
            await source.aclose()

        trio.run(main)


def test_a_command_is_not_redirected_to_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        Server(BLOCKS, redirect_to("http://other.test{path}")) as server,
        Proxy({"node.test": server.port, "other.test": server.port}) as proxy,
    ):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")

        async def main() -> None:
            http = Http(parse_origin("http://node.test"), HASTY)
            with pytest.raises(SourceFailed, match=r"redirects POST to .*: refused"):
                await Rpc(http, "node").call("files/rm", [("arg", "/x")])
            await http.aclose()

        trio.run(main)
        assert len(server.asked) == 1


def subdomains(ask: Ask) -> None:
    """Answers like Kubo when it is addressed as localhost."""
    if ask.headers["host"].startswith("localhost:"):
        port = ask.headers["host"].partition(":")[2]
        ask.send(301, b"", Location=f"http://{ask.path.rpartition('/')[2]}.ipfs.localhost:{port}/?format=raw")
    else:
        answer_well(ask)


@pytest.mark.parametrize("own", [True, False], ids=["own", "httpx"])
def test_a_redirect_to_a_name_below_localhost_goes_to_the_same_server_with_its_headers(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "OWN_TRANSPORT", own)
    with Server(BLOCKS, subdomains) as server:

        async def main() -> None:
            origin = parse_origin(f"http://localhost:{server.port}")
            settings = HttpSettings(headers=BoundHeaders({origin: [("X-Key", "secret")]}))
            source = Gateway(Http(origin, settings), "x", local=True)
            for cid, block in BLOCKS.items():
                assert await source.get(cid) == block
            await source.aclose()

        trio.run(main)
        assert len(server.asked) == 1 + len(BLOCKS), "only the first request is redirected"
        assert {ask.headers["x-key"] for ask in server.asked} == {"secret"}


def test_a_redirect_of_a_remote_gateway_to_a_localhost_name_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        Server(BLOCKS, redirect_to("http://x.localhost{path}")) as server,
        Proxy({"gateway.test": server.port}) as proxy,
    ):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")

        async def main() -> None:
            trio.socket.set_custom_hostname_resolver(Resolver({"x.localhost": [["127.0.0.1"]]}))
            source = Gateway(Http(parse_origin("http://gateway.test"), HASTY), "x")
            with pytest.raises(SourceFailed, match="is for loopback"):
                await source.get(CID)
            await source.aclose()

        trio.run(main)


@pytest.mark.parametrize(
    "get", [lambda port: f"http://localhost:{port}", lambda port: f"http://127.0.0.1:{port}"]
)
def test_a_kubo_node_can_be_read_by_the_name_localhost(kubo_node: Node, get: Callable[[str], str]) -> None:
    file = sample(61)
    kubo_node.cmd("dag", "import", "--pin-roots=false", stdin=file.car())

    async def main() -> None:
        url = get(kubo_node.gateway_url.rpartition(":")[2])
        source = Gateway(Http(parse_origin(url)), url, local=True)
        await check_all_blocks(source, file)
        await source.aclose()

    trio.run(main)
