"""The meaning of answers that are not the requested block. Any exception of a request is a failure of its
source."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.failures import one_line, retry_after
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.pool.pool import SourcePool
from tests.sources.content import raw_blocks
from tests.sources.servers import Server


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("120") == 120
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after("soon") is None
    assert retry_after("") is None


@pytest.mark.parametrize("value", ["Fri, 31 Dec 99999 23:59:59 GMT", "\u0663", "1e309", "-1", "9" * 400])
def test_an_absurd_retry_after_is_none_or_far_away(value: str) -> None:
    found = retry_after(value)
    assert found is None or found > 1e8


@given(st.text())
def test_any_retry_after_is_seconds_or_nothing(value: str) -> None:
    found = retry_after(value)
    assert found is None or found >= 0


RAISED = [
    ValueError("x\n\x1b[31my"),
    RuntimeError(),
    KeyError("k"),
    AssertionError(),
    RecursionError(),
    ExceptionGroup("g", [OSError("x")]),
]


async def raising_within(url: str, raised: Exception) -> None:
    """Raises `raised` while a response is read."""
    http = Http(parse_origin(url))
    try:
        async with http.ask("GET", "/ipfs/x?format=raw"):
            raise raised
    finally:
        await http.aclose()


@pytest.mark.parametrize("raised", RAISED)
def test_any_exception_of_a_request_is_its_sources_failure_in_one_line(raised: Exception) -> None:
    with Server({}) as server:
        with pytest.raises(SourceFailed) as caught:
            trio.run(raising_within, server.url, raised)
        assert str(caught.value).startswith(f"{server.url}: ")
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is raised


def test_errors_of_a_source_are_passed_on_unchanged() -> None:
    with Server({}) as server:
        for raised in (NotHere("x"), SourceFailed("x", "busy", 7)):
            with pytest.raises(type(raised)) as caught:
                trio.run(raising_within, server.url, raised)
            assert caught.value is raised


def test_text_of_a_server_becomes_one_printable_line() -> None:
    assert one_line("a\nb\x1b[31mc\u202e") == "a b [31mc "
    assert len(one_line("x" * 10_000)) == 300


HEADS = {
    "location": "302 Found\r\nLocation: http://[::1/x",
    "retry-after": "503 Later\r\nRetry-After: Fri, 31 Dec 99999 23:59:59 GMT",
    "length": "200 OK\r\nContent-Length: 99999999999999999999999",
    "status": "99999 OK",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_bad_answer_head_of_one_gateway_does_not_stop_reads_from_a_good_one(head: str) -> None:
    blocks = raw_blocks(84, 100, size=500)

    async def main() -> None:
        lines = f"HTTP/1.1 {head}\r\n\r\n".encode()
        with (
            Server(blocks, lambda ask: (ask.connection.sendall(lines), ask.hang_up())[0]) as bad,
            Server(blocks) as good,
        ):
            chain = SourcePool(
                [Gateway(Http(parse_origin(server.url)), server.url, local=True) for server in (bad, good)]
            )
            for cid, block in blocks.items():
                assert (await chain.get(cid)).block == block
            assert chain.statistics()[0].state in ("open", "half_open")
            await chain.aclose()

    trio.run(main)
