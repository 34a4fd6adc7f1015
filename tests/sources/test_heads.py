"""The common form of an answer's head is read as h11 reads it; all else is left to h11."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.sources.web.heads import LONGEST, Head, Request, common

KUBO = (
    b"HTTP/1.1 200 OK\r\nAccept-Ranges: bytes\r\nAccess-Control-Allow-Headers: Content-Type\r\nAccess-Control-Allow-Headers: Range\r\n"
    b"Access-Control-Allow-Origin: *\r\nCache-Control: public, max-age=29030400, immutable\r\n"
    b"Content-Disposition: attachment; filename=\"b.bin\"; filename*=UTF-8''b.bin\r\nContent-Length: 5\r\n"
    b"Content-Type: application/vnd.ipld.raw\r\nX-Empty:\r\nX-Ipfs-Path:\t/ipfs/b \t\r\nDate: Tue, 24 Nov 2026 10:08:21 GMT\r\n\r\n"
)
LINES = [
    *(b"Content-Length: 5", b"content-length:7", b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length: ", b"Content-Length: 5\x0b"),
    *(b"Transfer-Encoding: chunked", b"Connection: close", b"X: a", b"x: b", b"X : a", b"X:", b" folded", b"\tfolded", b": none", b"no colon"),
    *(b"X: \xff", b"X: \x00", b"X: a\x1fb", b"X: a\rb", b"X: a\nY: b", b"X\x00: a", b"X: \x7f", b"X:  \t a b\t ", b"(X): a"),
]
STARTS = [b"HTTP/1.1 200 OK", b"HTTP/1.1 206 Partial Content", b"HTTP/1.1 200 ", b"HTTP/1.1 200", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 No Content"]
STARTS += [b"HTTP/1.1 404 Not Found", b"HTTP/1.1 100 Continue", b"HTTP/2 200 OK", b"http/1.1 200 OK", b"HTTP/1.1  200 OK", b"HTTP/1.1 200 \xe9", b""]


def _asked() -> Request:
    return Request("GET", [("Host", "localhost:8080"), ("Accept", "a/b")])


def _by_h11(data: bytes) -> tuple[Head, bytes]:
    """As h11 reads it. Raises RemoteProtocolError."""
    connection = _asked().sent(b"")
    connection.receive_data(data)
    event = connection.next_event()
    assert isinstance(event, h11.Response)
    headers = {name.decode().lower(): value.decode() for name, value in event.headers.raw_items()}
    return Head(event.status_code, event.http_version, headers), bytes(connection.trailing_data[0])


def test_a_nodes_answer_is_in_the_common_form() -> None:
    found = common(KUBO + b"hello")
    assert found is not None
    head, begins = found
    assert (head, (KUBO + b"hello")[begins:]) == _by_h11(KUBO + b"hello")
    told = [head.headers[name] for name in ("content-length", "access-control-allow-headers", "x-empty", "x-ipfs-path")]
    assert told == ["5", "Range", "", "/ipfs/b"]


@given(st.sampled_from(STARTS), st.lists(st.sampled_from(LINES), max_size=5), st.sampled_from([b"\r\n", b"\n"]), st.binary(max_size=9))
def test_what_is_read_is_what_h11_reads(start: bytes, lines: list[bytes], end: bytes, body: bytes) -> None:
    data = end.join([start, *lines, b"", b""]) + body
    found = common(data)
    if found is not None:
        assert (found[0], data[found[1] :]) == _by_h11(data)


@given(st.integers(0, len(KUBO) - 1), st.integers(0, 255))
def test_one_byte_changed_is_read_as_h11_reads_it(at: int, byte: int) -> None:
    data = KUBO[:at] + bytes([byte]) + KUBO[at + 1 :] + b"hello"
    found = common(data)
    if found is not None:
        assert (found[0], data[found[1] :]) == _by_h11(data)


@pytest.mark.parametrize("at", [0, 1, 30, len(KUBO) - 1])
def test_a_head_that_has_not_come_whole_waits_for_the_rest(at: int) -> None:
    assert common(KUBO[:at]) is None


def test_a_head_that_h11_would_find_too_long_is_left_to_it() -> None:
    assert common(KUBO[:-2] + b"X: " + b"a" * LONGEST + b"\r\n\r\n") is None


def test_a_request_is_what_h11_would_send() -> None:
    head = _asked().head("/ipfs/b?format=raw")
    connection = h11.Connection(h11.CLIENT)
    wanted = h11.Request(method="GET", target="/ipfs/b?format=raw", headers=[("Host", "localhost:8080"), ("Accept", "a/b")])
    assert head == connection.send(wanted)
