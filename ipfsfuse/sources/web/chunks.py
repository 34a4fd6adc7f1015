"""A body in chunks (RFC 9112, 7.1), taken apart as it comes.

h11 gives each chunk as an event of its own; a CAR of small blocks has one or two for each, and they cost twice what verifying the
blocks does. Pure: bytes in, bytes out.
"""

import re
from typing import Final

from h11 import RemoteProtocolError

LONGEST: Final = 16 * 1024
"""Bytes of a line, and of all trailers."""
_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~]*)?")
_TRAILER: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")


class Chunks:
    """`feed` it what comes; `ended` once the last chunk and the trailers have."""

    def __init__(self) -> None:
        self.ended = False
        self.trailers: dict[str, str] = {}
        """By names in lower case."""
        self.surplus = b""
        """Bytes behind the body's end."""
        self._held = b""
        """The beginning of a line."""
        self._left = 0
        self._closing = self._trailing = False
        self._room = LONGEST

    def feed(self, data: bytes) -> bytes:
        """The body's bytes in `data`. Raises h11.RemoteProtocolError."""
        if self._held:
            data, self._held = self._held + data, b""
        view, parts, at = memoryview(data), list[memoryview](), 0
        while at < len(data) and not self.ended:
            if self._left:
                parts.append(view[at : at + self._left])
                at += len(parts[-1])
                self._left -= len(parts[-1])
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._held = data[at:]
                self._bound(len(self._held))
                break
            self._line(data[at:end])
            at = end + 2
        self.surplus = data[at:] if self.ended else b""
        return b"".join(parts)

    def _line(self, line: bytes) -> None:
        if self._trailing:
            self._trailer(line)
        elif self._closing:
            if line:
                raise RemoteProtocolError("a chunk that is longer than it says")
            self._closing = False
        else:
            found = _SIZE.fullmatch(line)
            if found is None:
                raise RemoteProtocolError(f"a chunk of size {line[:20]!r}")
            self._left = int(found[1], 16)
            self._closing, self._trailing = self._left > 0, self._left == 0

    def _trailer(self, line: bytes) -> None:
        self.ended = not line
        if line:
            self._bound(len(line))
            self._room -= len(line)
            if not _TRAILER.fullmatch(line):  # content, behind a size that was damaged
                raise RemoteProtocolError(f"a trailer {line[:20]!r}")
            name, _, value = line.decode("latin-1").partition(":")
            self.trailers[name.lower()] = value.strip(" \t")

    def _bound(self, size: int) -> None:
        if size > self._room:
            raise RemoteProtocolError("a chunk's head or trailers without end")
