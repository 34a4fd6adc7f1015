"""Gateways that misbehave: the error that each causes. No wrong byte gets through."""

import random
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import trio

from ipfsfuse.errors import NotHere, SourceFailed, WrongBlock
from ipfsfuse.sources.base import Source
from ipfsfuse.sources.http import client
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.structures import Buffer
from tests.sources import evil
from tests.sources.content import encode_car, raw_blocks, sample
from tests.sources.listening import Listening
from tests.sources.servers import Ask, Behaviour, Server, answer_well, self_signed
from tests.sources.streamed import give_each

HASTY = HttpSettings(connect=2.0, idle=0.3, total=0.6)
BLOCKS = raw_blocks(7, 3, size=3000)
CID, BLOCK = next(iter(BLOCKS.items()))


@pytest.fixture(autouse=True, params=["own", "httpx"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here run with our own transport and with httpx's."""
    monkeypatch.setattr(client, "OWN_TRANSPORT", request.param == "own")


def gateway(server: Server, settings: HttpSettings = HASTY, *, local: bool = False) -> Gateway:
    return Gateway(Http(parse_origin(server.url), settings), server.url, local=local)


KINDS: dict[Behaviour, str] = {
    evil.short_body: "short", evil.announced_too_long: "long", evil.endless_body: "long", evil.drips: "timeout", evil.no_head: "timeout",
    evil.half_a_head: "timeout", evil.endless_head: "protocol", evil.reset_in_the_middle: "reset", evil.html_page: "page",
    evil.gzip_bomb: "encoding", evil.redirect_loop: "redirect", evil.not_http: "protocol", evil.server_error: "status",
}  # fmt: skip


CLOSING = (evil.short_body, evil.not_http)
"""These also close the connection, and httpcore reads on until that."""


@pytest.mark.parametrize(("behave", "kind"), KINDS.items(), ids=[behave.__name__ for behave in KINDS])
def test_each_failure_has_its_kind(behave: Behaviour, kind: str) -> None:
    settings = HASTY if kind == "timeout" else HttpSettings()  # a busy machine may be 0.3 s late

    async def main() -> None:
        with Server(BLOCKS, behave) as server:
            source = gateway(server, settings)
            with pytest.raises(SourceFailed) as caught:
                await source.get(CID)
            assert caught.value.kind == kind or (behave in CLOSING and caught.value.kind == "reset")
            assert "\n" not in str(caught.value)
            await source.aclose()

    trio.run(main)


@pytest.mark.parametrize("behave", [evil.wrong_bytes, evil.another_block])
@pytest.mark.logs("has wrong bytes for")
def test_wrong_bytes_from_the_only_source_are_an_error_of_that_block(behave: Behaviour) -> None:
    async def main() -> None:
        with Server(BLOCKS, behave) as server:
            pool = SourcePool([gateway(server)])
            # the only source is not quarantined: it is asked again, and only that block fails
            for _ in range(2):
                with pytest.raises(WrongBlock):
                    await pool.get(CID)
            assert pool.statistics()[0].wrong == 2
            assert pool.statistics()[0].state == "good"
            await pool.aclose()

    trio.run(main)


def test_bytes_behind_a_body_never_become_another_block() -> None:
    """httpcore takes them for the next answer. Then the next request fails, and gives no wrong bytes."""

    async def main() -> None:
        with Server(BLOCKS, evil.long_body) as server:
            source = gateway(server)
            for cid, block in BLOCKS.items():
                try:
                    assert await source.get(cid) == block
                except SourceFailed:
                    assert not client.OWN_TRANSPORT
            await source.aclose()

    trio.run(main)


def test_a_certificate_that_no_authority_signed_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        with Server(BLOCKS, tls=self_signed(tmp_path)) as server:
            source = gateway(server)
            with pytest.raises(SourceFailed, match="certificate is not trusted") as caught:
                await source.get(CID)
            assert caught.value.kind == "tls"
            await source.aclose()
            assert not server.asked

    trio.run(main)


class Greeting(Listening):
    """Sends text to each client at once, as a server of SSH does."""

    def _serve(self, connection: socket.socket, _number: int, /) -> None:
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
            self.stopping.wait(20)


def test_tls_to_a_port_without_tls_fails() -> None:
    async def main() -> None:
        with Greeting() as server:
            source = Gateway(Http(parse_origin(f"https://127.0.0.1:{server.port}")), "x")
            with pytest.raises(SourceFailed, match="TLS failed") as caught:
                await source.get(CID)
            assert caught.value.kind == "tls"
            await source.aclose()

    trio.run(main)


STATUSES = [
    (404, NotHere),
    (410, NotHere),
    (412, NotHere),
    (504, NotHere),
    (429, SourceFailed),
    (502, SourceFailed),
    (403, SourceFailed),
]


@pytest.mark.parametrize(("status", "error"), STATUSES)
def test_each_status_has_its_error(status: int, error: type[Exception]) -> None:
    async def main() -> None:
        with Server(
            BLOCKS, lambda ask: ask.send(status, b"said so", "text/plain", Retry_After="7")
        ) as server:
            source = gateway(server)
            with pytest.raises(error) as caught:
                await source.get(CID)
            if status == 429:
                assert isinstance(caught.value, SourceFailed)
                assert caught.value.retry_after == 7
            if status == 403:
                assert "--header" in str(caught.value)
            await source.aclose()
            assert len({id(ask.connection) for ask in server.asked}) == 1

    trio.run(main)


@pytest.mark.parametrize("send", ["whole", "chunked"])
def test_a_long_not_found_page_means_not_here(send: str) -> None:
    """Before this was mended, it counted as a failure of the source, which was then not asked for a while."""
    page = b"<p>not found</p>" * 10_000

    def behave(ask: Ask) -> None:
        if send == "whole":
            ask.send(404, page, "text/html")
        else:
            head = b"HTTP/1.1 404 Whatever\r\nTransfer-Encoding: chunked\r\n\r\n"
            ask.connection.sendall(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page))

    async def main() -> None:
        with Server(BLOCKS, behave) as server:
            source = gateway(server)
            for _ in range(2):
                with pytest.raises(NotHere, match="404"):
                    await source.get(CID)
            await source.aclose()

    trio.run(main)


def redirects_to(location: Callable[[Ask], str]) -> Behaviour:
    return lambda ask: (
        ask.send(301, b"", Location=location(ask)) if "moved" not in ask.target else answer_well(ask)
    )


def test_redirects_within_the_origin_are_followed() -> None:
    async def main() -> None:
        with Server(BLOCKS, redirects_to(lambda ask: ask.target + "&moved=1")) as server:
            source = gateway(server, HttpSettings())  # the server answers: no short time limit is needed
            assert await source.get(CID) == BLOCK
            await source.aclose()

    trio.run(main)


def test_a_redirect_with_a_long_page_is_followed() -> None:
    async def main() -> None:
        moved: Behaviour = lambda ask: (  # noqa: E731
            answer_well(ask)
            if "moved" in ask.target
            else ask.send(301, bytes(200_000), "text/html", Location=ask.target + "&moved=1")
        )
        with Server(BLOCKS, moved) as server:
            source = gateway(server, HttpSettings())  # the server answers: no short time limit is needed
            assert await source.get(CID) == BLOCK
            await source.aclose()

    trio.run(main)


def test_redirects_to_another_scheme_or_a_private_address_are_not_followed() -> None:
    async def main() -> None:
        with Server(BLOCKS) as inner:
            here = f"127.0.0.1:{inner.port}"
            for location in (
                f"http://localhost:{inner.port}/ipfs/x?moved=1",
                f"http://{here}/",
                f"https://{here}/",
                "ftp://x/",
            ):
                with Server(BLOCKS, redirects_to(partial(str.format, location))) as server:
                    source = gateway(server)
                    with pytest.raises(SourceFailed) as caught:
                        await source.get(CID)
                    assert caught.value.kind == "redirect", location
                    await source.aclose()
            assert not inner.asked

    trio.run(main)


def car_with(change: Callable[[list[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]]) -> Behaviour:
    file = sample(1)

    def behave(ask: Ask) -> None:
        if ask.query.get("format") == "car":
            ask.send_chunked([encode_car(file.root, change(list(file.blocks.items())))])  # type: ignore[arg-type]  # a Cid is bytes
        else:
            answer_well(ask)

    return behave


SURPLUS = list(raw_blocks(55, 5).items())
CARS = {
    "reordered": car_with(lambda blocks: blocks[::-1]),
    "surplus": car_with(lambda blocks: [*SURPLUS, *blocks, *SURPLUS]),
    "twice": car_with(lambda blocks: [*blocks, *blocks]),
    "cut-at-a-block": car_with(lambda blocks: blocks[:4]),
    "empty": car_with(lambda blocks: []),
    "wrong-bytes": car_with(lambda blocks: [(cid, b"x" + block[1:]) for cid, block in blocks]),
    "rubbish": lambda ask: (
        ask.send_chunked([b"\xff" * 1000]) if ask.query.get("format") == "car" else answer_well(ask)
    ),
    "cut-inside": lambda ask: (
        ask.send_chunked([sample(1).car()[:200_000]], end=False)
        if ask.query.get("format") == "car"
        else answer_well(ask)
    ),
}


@pytest.mark.logs("has wrong bytes for")
@pytest.mark.parametrize("behave", CARS.values(), ids=CARS)
def test_a_range_is_right_whatever_car_comes(behave: Behaviour) -> None:
    file = sample(1)

    async def main() -> None:
        with Server(file.blocks, behave) as server:
            pool = SourcePool([gateway(server)])
            got: dict[int, Buffer] = {}

            async def deliver(index: int, blocks: Sequence[Buffer], _source: Source) -> None:
                assert got.keys().isdisjoint(range(index, index + len(blocks)))
                got.update(enumerate(blocks, index))

            await give_each(pool.stream(file.run), deliver)
            assert got == file.expected
            await pool.aclose()

    trio.run(main)


ALL_BAD: Sequence[Behaviour] = (evil.wrong_bytes, evil.another_block, *KINDS)


@pytest.mark.slow
@pytest.mark.logs("sent wrong bytes for .* and is not asked for 10 minutes", "has wrong bytes for")
def test_ten_thousand_reads_are_right_with_one_good_gateway_behind_bad_ones() -> None:
    """All bad gateways come before the good one. Every read is right, and the statistics say how each bad
    gateway failed."""
    blocks = raw_blocks(1, 2000, size=900)
    wanted = [*blocks] * 5
    random.Random(1).shuffle(wanted)

    async def main() -> None:
        bad = [Server(blocks, behave) for behave in ALL_BAD]
        failing = [Server(blocks, evil.one_in_three_fails()) for _ in range(2)]
        good = Server(blocks)
        servers = [*bad, *failing, good]
        for server in servers:
            server.__enter__()
        try:
            sources: list[Source] = [gateway(server) for server in servers]
            pool = SourcePool(sources, rng=random.Random(2))
            left = iter(wanted)

            async def read() -> None:
                for cid in left:
                    assert (await pool.get(cid)).block == blocks[cid]

            async with trio.open_nursery() as nursery:
                for _ in range(16):
                    nursery.start_soon(read)
            for behave, statistics in zip(ALL_BAD, pool.statistics(), strict=False):
                assert statistics.blocks == 0, behave.__name__
                if behave in (evil.wrong_bytes, evil.another_block):
                    assert (statistics.state, statistics.wrong > 0) == ("quarantined", True), behave.__name__
                else:
                    assert (
                        statistics.failures.get(KINDS[behave], 0) + statistics.failures.get("reset", 0) > 0
                    ), behave.__name__
                    assert (statistics.state in ("open", "half_open"), statistics.why != "") == (
                        True,
                        True,
                    ), behave.__name__
            answered = sum(statistics.blocks for statistics in pool.statistics())
            assert len(wanted) <= answered <= 1.05 * len(wanted) + 5  # if one is slow, two may answer
            await pool.aclose()
        finally:
            for server in servers:
                server.__exit__(None, None, None)

    trio.run(main)
