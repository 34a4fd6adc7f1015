"""The heads of requests and answers as bytes: requests made once, and the one form of answer that is nearly all of them.

h11 needs 30 us to make a request and 60 us to read the 27 header lines of a Kubo node's answer, as much as all else
that a small block costs. So a request's bytes are made by it once, and `common` reads what is plainly in the common
form; whatever is not is h11's to read, or to refuse. Pure: bytes in, values out.
"""

import re
from dataclasses import dataclass
from typing import Final

import h11

LONGEST: Final = 16 * 1024
"""Bytes of a head: what h11 takes."""
_COMMON: Final = re.compile(rb"HTTP/1\.1 (20[06]) [\t -~]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~]*\r\n)+)\r\n")
"""Whole, and in ASCII without control characters; names as in RFC 9110, 5.6.2; no line is folded."""
_LENGTH: Final = re.compile("[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class Head:
    """Of an answer. Names in lower case; of a header that came twice the last."""

    status: int
    version: bytes
    headers: dict[str, str]


class Request:
    """A request but for its target and its body."""

    __slots__ = ("_after", "_before", "_request")

    def __init__(self, method: str, headers: list[tuple[str, str]]) -> None:
        """Raises h11.LocalProtocolError for what is no header."""
        self._request = h11.Request(method=method, target="/", headers=headers)
        self._before, _, self._after = (h11.Connection(h11.CLIENT).send(self._request) or b"").partition(b" / ")

    def head(self, target: str) -> bytes:
        """All bytes before the body's."""
        return b"%s %s %s" % (self._before, target.encode(), self._after)

    def sent(self, body: bytes) -> h11.Connection:
        """A connection that has sent it, and reads the answer."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(self._request)
        if body:
            connection.send(h11.Data(data=body))
        connection.send(h11.EndOfMessage())
        return connection


def common(data: bytes) -> tuple[Head, int] | None:
    """The head of an answer whose length it tells, and where in `data` its body begins; None for any other form."""
    found = _COMMON.match(data)
    if found is None or found.end() > LONGEST:
        return None
    headers: dict[str, str] = {}
    lengths = 0
    for line in found[2].decode().splitlines():
        name, _, value = line.partition(":")
        name = name.lower()
        lengths += name == "content-length"
        headers[name] = value.strip(" \t")
    if lengths != 1 or "transfer-encoding" in headers or not _LENGTH.fullmatch(headers["content-length"]):
        return None
    return Head(int(found[1]), b"1.1", headers), found.end()
