"""Ways to a gateway: trusted and untrusted TLS, HTTP proxies, and redirects to another host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.http.client import Http, HttpSettings, tls_context
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin, proxy_for
from ipfsfuse.sources.http.settings import BoundHeaders
from tests.sources.authority import Authority
from tests.sources.content import raw_blocks
from tests.sources.proxies import Proxy
from tests.sources.servers import Ask, Server

BLOCKS = raw_blocks(7, 2, size=200_000)
CID, BLOCK = next(iter(BLOCKS.items()))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxies except those of the test. What is cached of the environment is forgotten."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    proxy_for.cache_clear()
    tls_context.cache_clear()


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.certificate))
    return made


def get(url: str, headers: tuple[tuple[str, str], ...] = ()) -> bytes:
    async def main() -> bytes:
        origin = parse_origin(url)
        source = Gateway(Http(origin, HttpSettings(headers=BoundHeaders({origin: headers}))), url)
        try:
            first = await source.get(CID)
            assert await source.get(CID) == first  # over the kept connection
            return first
        finally:
            await source.aclose()

    return trio.run(main)


def test_a_certificate_of_a_trusted_authority_is_accepted(authority: Authority) -> None:
    with Server(BLOCKS, tls=authority.server_context("IP:127.0.0.1")) as server:
        assert get(server.url) == BLOCK


@pytest.mark.parametrize(
    ("name", "days", "why"),
    [("DNS:other.test", 2, "mismatch|not valid for"), ("IP:127.0.0.1", -1, "expired")],
)
def test_a_certificate_of_another_host_or_an_expired_one_is_refused(
    authority: Authority, name: str, days: int, why: str
) -> None:
    with Server(BLOCKS, tls=authority.server_context(name, days)) as server:
        with pytest.raises(SourceFailed, match=why) as caught:
            get(server.url)
        assert caught.value.kind == "tls"
        assert not server.asked


def test_plain_requests_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(BLOCKS) as server, Proxy({"gateway.test": server.port}) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:p%40ss@127.0.0.1:{proxy.port}")
        assert get("http://gateway.test") == BLOCK
        assert proxy.heads[0].startswith("GET http://gateway.test/ipfs/")
        assert "Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in proxy.heads[0]


def test_tls_goes_through_a_proxys_tunnel_to_the_named_host(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        Server(BLOCKS, tls=authority.server_context("DNS:gateway.test")) as server,
        Proxy({"gateway.test": server.port, "other.test": server.port}) as proxy,
    ):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        assert get("https://gateway.test", (("Authorization", "Bearer secret"),)) == BLOCK
        assert server.asked[0].headers["authorization"] == "Bearer secret"
        assert proxy.heads[0].startswith("CONNECT gateway.test:443 ")
        assert "secret" not in "".join(proxy.heads)
        with pytest.raises(SourceFailed, match="not valid for"):
            get("https://other.test")
        with pytest.raises(SourceFailed, match="the proxy for it refused the way") as caught:
            get("https://third.test")
        assert caught.value.kind == "connect"


def test_this_machine_and_hosts_in_no_proxy_are_reached_without_the_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Server(BLOCKS) as server, Proxy({}) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert get(server.url) == BLOCK
        monkeypatch.setenv("no_proxy", "gateway.invalid")
        _forget()
        with pytest.raises(SourceFailed) as caught:
            get("http://gateway.invalid")
        assert caught.value.kind in ("host", "connect")
        assert proxy.heads == []


def test_a_redirect_to_another_host_is_followed_without_our_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(ask: Ask) -> None:
        ask.send(302, Location=f"http://other.test{ask.path}?format=raw")

    with (
        Server(BLOCKS, elsewhere) as first,
        Server(BLOCKS) as other,
        Proxy({"gateway.test": first.port, "other.test": other.port}) as proxy,
    ):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert get("http://gateway.test", (("Authorization", "Bearer secret"),)) == BLOCK
        assert first.asked[0].headers["authorization"] == "Bearer secret"
        assert other.asked
        assert all("authorization" not in ask.headers for ask in other.asked)
