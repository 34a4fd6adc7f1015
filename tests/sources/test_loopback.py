"""Our transport reads heads, bodies of known length and chunks as h11 does, in whatever pieces they come. It
refuses all else."""

import math
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import h11
import pytest
import trio
from httptools import HttpParserError
from hypothesis import given, settings
from hypothesis import strategies as st

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.http.client import Http
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.origin import parse_origin
from ipfsfuse.sources.http.transport import MAX_FRAMING, Connection
from tests.sources.content import raw_blocks
from tests.sources.servers import Ask, Server

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZES = [b"%x", b"%X", b"000%x", b"%x;a", b"%x;a=b;c", b'%x;a="b;c"']
TRAILERS = [b"X-Other: \t a: b\t", b"X-Empty:", b"X-Long: " + b"y" * 300]
KUBO = (
    b"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\nAccess-Control-Allow-Headers: Content-Type\r\nAccess-Control-Allow-Headers: Range\r\n"
    b"Access-Control-Allow-Origin: *\r\nCache-Control: public, max-age=29030400, immutable\r\n"
    b"Content-Disposition: attachment; filename=\"b.bin\"; filename*=UTF-8''b.bin\r\nContent-Length: 5\r\n"
    b"Content-Type: application/vnd.ipld.raw\r\nX-Empty:\r\nX-Ipfs-Path:\t/ipfs/b \t\r\nDate: Tue, 24 Nov 2026 10:08:21 GMT\r\n\r\n"
)
LINES = [
    *(
        b"Content-Length: 5",
        b"content-length:7",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: ",
        b"Content-Length: 5\x0b",
    ),
    *(
        b"Transfer-Encoding: chunked",
        b"Connection: close",
        b"X: a",
        b"x: b",
        b"X : a",
        b"X:",
        b" folded",
        b"\tfolded",
        b": none",
        b"no colon",
    ),
    *(
        b"X: \xff",
        b"X: \x00",
        b"X: a\x1fb",
        b"X: a\rb",
        b"X: a\nY: b",
        b"X\x00: a",
        b"X: \x7f",
        b"X:  \t a b\t ",
        b"(X): a",
    ),
]
STARTS = [
    b"HTTP/1.1 200 OK",
    b"HTTP/1.1 206 Partial Content",
    b"HTTP/1.1 200 ",
    b"HTTP/1.0 200 OK",
    b"HTTP/1.1 204 No Content",
]
STARTS += [
    b"HTTP/1.1 404 Not Found",
    b"HTTP/2 200 OK",
    b"http/1.1 200 OK",
    b"HTTP/1.1  200 OK",
    b"HTTP/1.1 200 \xe9",
    b"",
]

piece_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=8)
bodies = st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.sampled_from(SIZES)), max_size=6)
trailers = st.lists(st.sampled_from(TRAILERS), max_size=3)
few = settings(max_examples=60, deadline=None)


class Read(NamedTuple):
    """What was read from some bytes. `body` is None if it had not ended."""

    status: int
    body: bytes | None


def encode(chunks: Iterable[tuple[bytes, bytes]], ends: Sequence[bytes] = ()) -> bytes:
    """A chunked body. `chunks`: the content of each, and how its size is spelled. `ends`: the trailers."""
    body = b"".join(size % len(content) + b"\r\n" + content + b"\r\n" for content, size in chunks)
    return body + b"0\r\n" + b"".join(line + b"\r\n" for line in ends) + b"\r\n"


def by_h11(data: bytes) -> Read | None:
    """What h11 reads. None if it refuses `data`. The connection ends behind `data`."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    status, body = 0, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return Read(status, body)
            elif event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed):
                return None
    except h11.RemoteProtocolError:
        return None


def by_us(data: bytes, sizes: Sequence[int] = (1 << 20,)) -> Read | None:
    """What our transport reads. None as for `by_h11`. `data` comes in pieces of `sizes`, in turn."""

    async def main() -> Read | None:
        here, there = trio.socket.socketpair()
        connection = Connection(trio.SocketStream(here), 5.0, trio.CapacityLimiter(1))
        answered = Read(0, None)

        async def send() -> None:
            at = turn = 0
            try:
                while at < len(data):
                    piece = data[at : at + sizes[turn % len(sizes)]]
                    await there.send(piece)
                    at, turn = at + len(piece), turn + 1
                    await trio.lowlevel.checkpoint()
            except OSError:
                pass
            there.shutdown(trio.socket.SHUT_WR)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                try:
                    await connection.request(b"x", trio.current_time() + 5)
                    body = bytearray()
                    while piece := await connection.receive():
                        body += piece
                    answered = Read(connection.status, bytes(body))
                except (HttpParserError, SourceFailed, EOFError):
                    return None
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            await connection.aclose()
            there.close()
        return answered

    return trio.run(main)


@few
@given(bodies, trailers, st.binary(max_size=20), piece_sizes)
def test_any_body_in_any_chunks_and_pieces_is_read_as_h11_reads_it(
    chunks: list[tuple[bytes, bytes]], ends: list[bytes], surplus: bytes, sizes: list[int]
) -> None:
    data = HEAD + encode(chunks, ends) + surplus
    assert by_us(data, sizes) == by_h11(data) == Read(200, b"".join(content for content, _size in chunks))


@settings(max_examples=150, deadline=None)
@given(
    bodies,
    trailers,
    st.data(),
    st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"f", b";", b"-", b"\x00", b" ", b"\xff"]),
    piece_sizes,
)
def test_damaged_framing_never_gives_other_bytes_than_h11(
    chunks: list[tuple[bytes, bytes]],
    ends: list[bytes],
    draw: st.DataObject,
    inserted: bytes,
    sizes: list[int],
) -> None:
    whole = encode(chunks, ends)
    at, removed = draw.draw(st.integers(0, len(whole) - 1)), draw.draw(st.integers(0, 3))
    data = HEAD + whole[:at] + inserted + whole[at + removed :]
    ours, theirs = by_us(data, sizes), by_h11(data)
    assert ours is None or theirs is None or ours == theirs


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(STARTS),
    st.lists(st.sampled_from(LINES), max_size=5),
    st.sampled_from([b"\r\n", b"\n"]),
    st.binary(max_size=9),
)
def test_a_head_is_refused_or_read_as_h11_reads_it(
    start: bytes, lines: list[bytes], end: bytes, body: bytes
) -> None:
    data = end.join([start, *lines, b"", b""]) + body
    ours, theirs = by_us(data), by_h11(data)
    assert ours is None or theirs is None or ours == theirs


@few
@given(st.integers(0, len(KUBO) - 1), st.integers(0, 255))
def test_a_nodes_head_with_a_changed_byte_is_refused_or_read_as_h11_reads_it(at: int, byte: int) -> None:
    assert by_us(KUBO + b"hello") == by_h11(KUBO + b"hello") == Read(200, b"hello")
    data = KUBO[:at] + bytes([byte]) + KUBO[at + 1 :] + b"hello"
    ours, theirs = by_us(data), by_h11(data)
    assert ours is None or theirs is None or ours == theirs


@pytest.mark.parametrize(
    "whole", [HEAD + encode([(b"hello", b"%x")], [TRAILERS[0]]), KUBO + b"hello"], ids=["chunked", "known"]
)
def test_a_response_that_is_cut_short_is_refused(whole: bytes) -> None:
    for cut in range(len(whole)):
        assert by_us(whole[:cut]) is None


@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_endless_heads_and_trailers_are_refused(size: int) -> None:
    filler = b"X: y\r\n" * (MAX_FRAMING // 3)
    assert by_us(b"HTTP/1.1 200 OK\r\n" + filler, [size]) is None
    assert by_us(HEAD + b"0\r\n" + filler, [size]) is None
    assert by_us(HEAD + b"5;" + b"x" * 2 * MAX_FRAMING, [size]) is None


@pytest.mark.parametrize("size", [b"-5", b"+5", b"0x5", b"", b"5 5", b"1" * 17, b"five", b"5\r"])
def test_an_invalid_chunk_size_is_refused(size: bytes) -> None:
    assert by_us(HEAD + size + b"\r\nhello\r\n0\r\n\r\n") is None


def test_a_connection_with_bytes_behind_a_body_is_not_used_again() -> None:
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


def test_a_server_that_receives_a_request_slowly_gets_no_more_time() -> None:
    async def takes_slowly(listener: trio.SocketListener) -> None:
        async with await listener.accept() as stream:
            while True:
                await stream.receive_some(1024)
                await trio.sleep(0.02)

    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(takes_slowly, listener)
            stream = await trio.open_tcp_stream(*listener.socket.getsockname())
            connection, began = Connection(stream, 60, trio.CapacityLimiter(1)), trio.current_time()
            with pytest.raises(trio.TooSlowError), trio.fail_after(10):
                await connection.request(bytes(8 << 20), trio.current_time() + 0.2)
            assert trio.current_time() - began < 5
            await connection.aclose()
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("is_reset", [False, True])
def test_bytes_that_came_before_a_connection_broke_are_given(is_reset: bool) -> None:
    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(breaks_off, listener)
            stream = await trio.open_tcp_stream(*listener.socket.getsockname())
            connection = Connection(stream, 60, trio.CapacityLimiter(1))
            await connection.request(b"GET / HTTP/1.1\r\n\r\n", math.inf)
            await sent.wait()
            got = bytearray()

            async def receive_all() -> None:
                while True:
                    got.extend(await connection.receive())

            with pytest.raises(ConnectionResetError if is_reset else SourceFailed):
                await receive_all()
            assert got == bytes(20_000)
            await connection.aclose()

    async def breaks_off(listener: trio.SocketListener) -> None:
        async with await listener.accept() as stream:
            await stream.receive_some(1024)  # otherwise closing would reset the connection
            await stream.send_all(HEAD + (b"3e8\r\n" + bytes(1000) + b"\r\n") * 10)
            await trio.sleep(0.05)
            await stream.send_all((b"3e8\r\n" + bytes(1000) + b"\r\n") * 10)
            if is_reset:
                await trio.sleep(0.05)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sent.set()

    sent = trio.Event()
    trio.run(main)
