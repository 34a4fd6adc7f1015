"""The HTTP client: HTTP/2, kept connections that died, repeated requests, and large blocks."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import BlockTooLarge, SourceFailed
from ipfsfuse.sources.http import client
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo, Rpc
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.settings import RateLimit
from tests.kubo.node import Node
from tests.sources.authority import Authority
from tests.sources.content import raw_blocks
from tests.sources.http2 import MAX_STREAMS, Http2Server
from tests.sources.servers import RAW, Ask, Behaviour, Server, answer_well

BLOCKS = raw_blocks(91, 40, size=5000) | raw_blocks(92, 4, size=1 << 20)
STALLED = [*raw_blocks(93, 2 * MAX_STREAMS)]


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "OWN_TRANSPORT", request.param == "own")


both_transports = pytest.mark.parametrize("transport", ["own", "httpx"], indirect=True)


def with_http2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Callable[[Gateway, Http2Server], Awaitable[None]]
) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    client.tls_context.cache_clear()
    with Http2Server(BLOCKS, authority.server_context("IP:127.0.0.1")) as server:

        async def opened() -> None:
            gateway = Gateway(Http(parse_origin(server.url)), server.url)
            try:
                with trio.fail_after(60):
                    await main(gateway, server)
            finally:
                await gateway.aclose()

        trio.run(opened)
    client.tls_context.cache_clear()


async def check_all_blocks(gateway: Gateway) -> None:
    got: dict[Cid, bytes] = {}

    async def get(cid: Cid) -> None:
        got[cid] = await gateway.get(cid)

    async with trio.open_nursery() as nursery:
        for cid in BLOCKS:
            nursery.start_soon(get, cid)
    assert got == BLOCKS


def test_blocks_come_by_http2_where_it_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(gateway: Gateway, server: Http2Server) -> None:
        await check_all_blocks(gateway)
        await check_all_blocks(gateway)
        kept = HttpSettings().idle_connections
        assert server.connections <= 2 * len(BLOCKS) - kept, "kept connections are used again"
        assert sum(server.asked) == 2 * len(BLOCKS)

    with_http2(tmp_path, monkeypatch, main)


def test_stalled_streams_do_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """httpcore can't share an HTTP/2 connection: three stalled streams hold up a fourth. So it shares
    none."""

    async def main(gateway: Gateway, server: Http2Server) -> None:
        async with trio.open_nursery() as nursery:
            for cid in STALLED:
                nursery.start_soon(gateway.get, cid)
            with trio.move_on_after(30):
                while sum(server.asked) < len(STALLED):  # noqa: ASYNC110  # in another thread
                    await trio.sleep(0.05)
            with trio.fail_after(10):
                await check_all_blocks(gateway)
            nursery.cancel_scope.cancel()

    with_http2(tmp_path, monkeypatch, main)


def test_streams_that_are_given_up_do_not_use_up_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpcore does not tell the server that a stream was given up, so the client closes its connection."""

    async def main(gateway: Gateway, server: Http2Server) -> None:
        large = [cid for cid, block in BLOCKS.items() if len(block) == 1 << 20]
        http = gateway._http
        for turn in range(60):  # together their bodies are larger than a connection's window
            async with http.ask("GET", f"/ipfs/{cids.text(large[turn % 4])}?format=raw") as response:
                assert response.status == 200
        for cid in STALLED[: 2 * MAX_STREAMS]:
            with trio.move_on_after(0.01):
                await gateway.get(cid)
        with trio.fail_after(10):
            await check_all_blocks(gateway)

    with_http2(tmp_path, monkeypatch, main)


@both_transports
@pytest.mark.parametrize("command", ["block/get", "files/cp"])
@pytest.mark.usefixtures("transport")
def test_only_a_safe_request_is_sent_again_if_a_kept_connection_is_dead(command: str) -> None:
    """The server receives a second request over a connection, and closes the connection without an answer."""
    seen: list[int] = []

    def closes(ask: Ask) -> None:
        seen.append(id(ask.connection))
        if seen.count(id(ask.connection)) == 2:
            ask.hang_up()
        else:
            ask.send(200, b"well", "text/plain")

    async def main() -> None:
        with Server({}, closes) as server:
            rpc = Rpc(Http(parse_origin(server.url)), "node")
            assert await rpc.call(command) == b"well"
            if command == "block/get":
                assert await rpc.call(command) == b"well"
                assert len(server.asked) == 3
            else:
                with pytest.raises(SourceFailed) as caught:
                    await rpc.call(command)
                assert caught.value.kind == "reset"
                assert len(server.asked) == 2
            await rpc.http.aclose()

    trio.run(main)


@both_transports
@pytest.mark.usefixtures("transport")
def test_kept_connections_that_died_silently_cost_one_short_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a change of the network: nothing comes over the old connections."""
    monkeypatch.setattr(client, "SHORTEST_SILENCE", 0.3)
    monkeypatch.setattr(client, "SILENCE", 0.3)
    dead: set[int] = set()
    seen: list[int] = []
    waited_for: list[int] = []

    def behave(ask: Ask) -> None:
        if id(ask.connection) in dead:
            waited_for.append(id(ask.connection))
            ask.stall()
        else:
            seen.append(id(ask.connection))
            answer_well(ask)

    async def main() -> None:
        cid, block = next(iter(BLOCKS.items()))
        with Server(BLOCKS, behave) as server:
            gateway = Gateway(Http(parse_origin(server.url)), server.url)

            async def ask() -> None:
                assert await gateway.get(cid) == block

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(ask)
            dead.update(seen)
            assert len(dead) == 5
            for _ in range(6):
                await ask()
            assert len(waited_for) == 1, "the other dead connections are closed without a request"
            await gateway.aclose()

    trio.run(main)


@both_transports
@pytest.mark.usefixtures("transport")
def test_idle_connections_that_the_server_closed_are_not_used() -> None:
    async def main() -> None:
        cid, block = next(iter(BLOCKS.items()))
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server(BLOCKS, lambda ask: (answer_well(ask), ask.hang_up())[0]))
            gateway = Gateway(Http(parse_origin(server.url)), server.url)
            for _ in range(20):
                assert await gateway.get(cid) == block
                await trio.sleep(0.01)
            assert len(server.asked) == 20
            await gateway.aclose()

    trio.run(main)


@both_transports
@pytest.mark.usefixtures("transport")
def test_a_cancelled_request_leaves_the_client_usable() -> None:
    stalled = STALLED[0]

    def behave(ask: Ask) -> None:
        if ask.cid == stalled:
            ask.stall()
        else:
            answer_well(ask)

    async def main() -> None:
        with Server(BLOCKS, behave) as server:
            gateway = Gateway(Http(parse_origin(server.url)), server.url)
            for _ in range(50):
                with trio.move_on_after(0.01):
                    await gateway.get(stalled)
            await check_all_blocks(gateway)
            await gateway.aclose()

    trio.run(main)


@both_transports
@pytest.mark.usefixtures("transport")
def test_a_client_that_was_closed_still_answers_requests() -> None:
    """The client of a node is closed when another request finds that the node has gone."""

    async def main() -> None:
        cid, block = next(iter(BLOCKS.items()))
        with Server(BLOCKS) as server:
            gateway = Gateway(Http(parse_origin(server.url)), server.url)
            assert await gateway.get(cid) == block
            await gateway.aclose()
            assert await gateway.get(cid) == block
            await gateway.aclose()

    trio.run(main)


@both_transports
@pytest.mark.usefixtures("transport")
def test_a_block_that_is_too_large_is_named_with_its_size() -> None:
    big = raw_blocks(94, 1, size=3 << 20)
    (cid,) = big

    async def main() -> None:
        with Server(big) as server:
            gateway = Gateway(Http(parse_origin(server.url)), server.url)
            with pytest.raises(
                BlockTooLarge,
                match="as a block of 3,145,728 bytes: blocks of over 2,097,152 bytes are not read",
            ):
                await gateway.get(cid)
            await gateway.aclose()

    trio.run(main)


@pytest.mark.parametrize("by", ["gateway", "rpc"])
def test_a_block_of_a_real_node_that_is_too_large_is_refused(
    kubo_node: Node, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    data = bytes(range(256)) * (3 << 12)
    name = kubo_node.cmd("block", "put", "--allow-big-block", "--cid-codec=raw", stdin=data)

    async def main() -> None:
        source = Kubo("kubo", HttpSettings(), parse_origin(kubo_node.api_url))
        source._asked_for_gateway = by == "rpc"
        with pytest.raises(BlockTooLarge, match="3,145,728 bytes" if by == "gateway" else "a larger block"):
            await source.get(cids.parse(name))
        await source.aclose()

    trio.run(main)


def test_the_client_does_not_import_the_command_line_of_httpx() -> None:
    """Its imports, rich, click and pygments, would add 30 ms to each start."""
    code = "import sys, ipfsfuse.sources.http.client; print({'rich', 'click', 'pygments'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@both_transports
@pytest.mark.usefixtures("transport")
def test_a_long_body_does_not_make_its_connection_stale() -> None:
    """A connection is idle from the end of its last response."""
    blocks = raw_blocks(95, 2, size=1 << 20)

    def sends_slowly(ask: Ask) -> None:
        assert ask.block is not None
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(ask.block)}\r\n\r\n".encode()
        for at in range(0, len(ask.block), 1 << 18):
            ask.connection.sendall(head + ask.block[at : at + (1 << 18)])
            head = b""
            time.sleep(0.3)

    async def main() -> None:
        with Server(blocks, sends_slowly) as server:
            gateway = Gateway(Http(parse_origin(server.url), HttpSettings(idle_seconds=0.5)), server.url)
            for cid, block in blocks.items():
                assert await gateway.get(cid) == block
            first, second = server.asked
            assert first.connection is second.connection
            await trio.sleep(1.5)
            await gateway.get(cid)
            assert server.asked[2].connection is not first.connection, "it was idle for too long"
            await gateway.aclose()

    trio.run(main)


def in_chunks(ask: Ask) -> None:
    assert ask.block is not None
    ask.send_chunked([ask.block[at : at + 50_000] for at in range(0, len(ask.block), 50_000)], RAW)


@both_transports
@pytest.mark.parametrize(
    ("size", "behave"), [(1 << 20, answer_well), (50_000, answer_well), (1 << 20, in_chunks)]
)
@pytest.mark.usefixtures("transport")
def test_a_block_that_waits_for_the_rate_limit_is_not_late(size: int, behave: Behaviour) -> None:
    """The time limit for a body counts only the server's time. Bytes that came wait as long as the rate limit
    says, and take no room from other bodies meanwhile."""
    blocks = raw_blocks(94, 1, size=size)
    settings = HttpSettings(total=0.5, rate=RateLimit(size))
    used: list[int] = []

    async def main() -> None:
        with Server(blocks, behave) as server:
            http = Http(parse_origin(server.url), settings)
            gateway = Gateway(http, server.url)

            async def look() -> None:
                await trio.sleep(0.4)
                used.append(http.share.used)

            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(look)
                    assert await gateway.get(*blocks) == blocks[next(iter(blocks))]
            finally:
                await gateway.aclose()

    trio.run(main)
    assert used == [0]
