"""Bodies in chunks are read as h11 reads them, however they are cut into chunks and into pieces; all else is refused."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import h11
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.sources.web.chunks import LONGEST, Chunks
from ipfsfuse.sources.web.gateway import Gateway
from ipfsfuse.sources.web.http import Http
from ipfsfuse.sources.web.origin import parse_origin
from tests.sources.content import raw_blocks
from tests.sources.servers import Ask, Server

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZES = [b"%x", b"%X", b"000%x", b"%x ", b"%x \t", b"%x;a", b"%x;a=b;c", b'%x;a="b;c"', b"%x;"]
TRAILERS = [b"X-Stream-Error: broke off", b"x-stream-error:again", b"X-Other: \t a: b\t", b"X-Empty:", b"X-Long: " + b"y" * 300]

piece_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8)
bodies = st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.sampled_from(SIZES)), max_size=6)
trailers = st.lists(st.sampled_from(TRAILERS), max_size=3)


class Read(NamedTuple):
    """What a reader made of some bytes."""

    body: bytes
    ended: bool
    refused: bool
    trailers: dict[str, str]
    surplus: bytes


def encode(chunks: Iterable[tuple[bytes, bytes]], ends: Sequence[bytes] = ()) -> bytes:
    """(content, how its size is spelled) of each chunk, and the trailers."""
    body = b"".join(size % len(content) + b"\r\n" + content + b"\r\n" for content, size in chunks)
    return body + b"0\r\n" + b"".join(line + b"\r\n" for line in ends) + b"\r\n"


def by_h11(data: bytes) -> Read:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(HEAD + data)
    body = b""
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                return Read(body, False, False, {}, b"")
            if isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in event.headers.raw_items()}
                return Read(body, True, False, found, bytes(connection.trailing_data[0]))
    except h11.RemoteProtocolError:
        return Read(body, False, True, {}, b"")


def by_us(data: bytes, sizes: Sequence[int]) -> Read:
    """Fed in pieces of `sizes` by turns; what is behind the end is fed no more."""
    chunks, body, at, turn = Chunks(), b"", 0, 0
    try:
        while at < len(data) and not chunks.ended:
            piece = data[at : at + sizes[turn % len(sizes)]]
            body += chunks.feed(piece)
            at += len(piece)
            turn += 1
    except h11.RemoteProtocolError:
        return Read(body, False, True, {}, b"")
    return Read(body, chunks.ended, False, chunks.trailers, chunks.surplus + data[at:] if chunks.ended else b"")


@given(bodies, trailers, st.binary(max_size=20), piece_sizes)
def test_any_body_in_any_chunks_and_pieces_is_read_as_h11_reads_it(
    chunks: list[tuple[bytes, bytes]], ends: list[bytes], surplus: bytes, sizes: list[int]
) -> None:
    data = encode(chunks, ends) + surplus
    read = by_us(data, sizes)
    assert read == by_h11(data)
    assert (read.body, read.ended, read.surplus) == (b"".join(content for content, _size in chunks), True, surplus)


def test_blanks_before_an_extension_are_none_of_its_size() -> None:  # RFC 9112, 7.1.1; h11 refuses them
    assert by_us(encode([(b"hello", b"%x \t;a=b")]), [3]) == Read(b"hello", True, False, {}, b"")


def test_a_blank_that_damage_puts_before_an_extension_changes_no_byte() -> None:
    assert by_us(encode([(b"hello", b"%x;a")]).replace(b";", b" ;"), [1]).body == b"hello"


@given(bodies, trailers, st.data(), st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"f", b";", b"-", b"\x00", b" ", b"\xff"]), piece_sizes)
def test_damaged_framing_never_gives_other_bytes_than_h11(
    chunks: list[tuple[bytes, bytes]], ends: list[bytes], draw: st.DataObject, put: bytes, sizes: list[int]
) -> None:
    whole = encode(chunks, ends)
    at, removed = draw.draw(st.integers(0, len(whole) - 1)), draw.draw(st.integers(0, 3))
    data = whole[:at] + put + whole[at + removed :]
    ours, theirs = by_us(data, sizes), by_h11(data)
    if ours.ended and theirs.refused:
        assert re.search(rb"[0-9A-Fa-f][ \t]+;", data), "blanks before an extension alone are read by us and not by h11"
    elif ours.ended:
        assert ours == theirs
    else:
        assert theirs.body.startswith(ours.body)


@given(bodies, trailers, piece_sizes)
def test_a_body_that_is_cut_short_has_not_ended(chunks: list[tuple[bytes, bytes]], ends: list[bytes], sizes: list[int]) -> None:
    whole = encode(chunks, ends)
    for cut in range(len(whole)):
        assert not by_us(whole[:cut], sizes).ended


@pytest.mark.parametrize("begin", [b"", b"5;", b"0\r\n", b"0\r\nX: ", b"5\r\nhello"])
def test_lines_without_end_are_refused(begin: bytes) -> None:
    assert by_us(begin + b"a" * 2 * LONGEST, [1000]).refused


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_trailers_without_end_are_refused(size: int) -> None:
    assert by_us(b"0\r\n" + b"X: y\r\n" * LONGEST, [size]).refused


@pytest.mark.parametrize("size", [b"-5", b"+5", b"0x5", b"", b" 5", b"5 5", b"1" * 16, b"five", b"5\r"])
def test_a_size_that_is_none_is_refused(size: bytes) -> None:
    assert by_us(size + b"\r\nhello\r\n0\r\n\r\n", [100]).refused


def test_bytes_behind_the_end_make_the_connection_unusable() -> None:
    blocks = raw_blocks(41, 3)
    (first, body), *others = blocks.items()

    def behave(ask: Ask) -> None:
        surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil" if ask.cid == first else b""
        ask.connection.sendall(HEAD + encode([(ask.block or b"", b"%x")]) + surplus)

    async def main() -> None:
        with Server(blocks, behave) as server:
            source = Gateway(Http(parse_origin(server.url)), server.url)
            try:
                assert await source.get(first) == body
                for cid, block in others:
                    assert await source.get(cid) == block
            finally:
                await source.aclose()
            assert server.asked[1].connection is not server.asked[0].connection
            assert server.asked[2].connection is server.asked[1].connection

    trio.run(main)
