"""A connection for plain HTTP/1.1 to a node on this machine, where the limit is the CPU and not the network.

httptools parses heads and chunked bodies. A body of known length does not pass through the parser: it is
received into the caller's buffers, by a worker thread if it comes fast. `client` makes these connections a
transport of httpx. docs/adr/0001-http-client.md has the measurements.

Concurrency: one task uses a connection; after a failed or cancelled request it can only be closed.
"""

import contextlib
import io
import math
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, TypeVarTuple

import trio
from httptools import HttpParserError, HttpResponseParser

from ipfsfuse.errors import SourceFailed
from ipfsfuse.fileio import buffers, threads
from ipfsfuse.sources.http.failures import SHORT, one_line

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

RECEIVE_BYTES: Final = 64 * 1024
MAX_RECEIVES: Final = 32
"""After a first receive, up to so many more are tried at once, for at most RECEIVE_BYTES together."""
FAST: Final = 32 * 1024
"""After a receive of so many bytes, a thread receives the rest if it is more than RECEIVE_BYTES."""
THREAD_WAIT: Final = struct.pack("ll", 0, 20_000)
"""20 ms: the longest wait of a thread for bytes. Then the event loop waits: so a slow server keeps no thread
busy."""
MAX_FRAMING: Final = 80 * 1024
"""The most bytes of a head, and of the sizes, extensions and trailers between two pieces of a body."""
WANTED: Final = {
    *(b"content-encoding", b"content-length", b"content-range", b"content-type"),
    *(b"location", b"retry-after", b"transfer-encoding", b"x-stream-error"),
}
"""The headers that are used. A Kubo node sends 27: to decode them all costs as much as to parse them."""


class Connection:
    """An open connection, and its last response. The parser calls the methods `on_...`."""

    def __init__(self, stream: trio.SocketStream, idle: float, threads: trio.CapacityLimiter) -> None:
        """`idle`: seconds to wait for the next byte, or until more can be sent."""
        self._socket = socket.socket(fileno=stream.socket.detach())  # for calls that trio does not have
        self._socket.setblocking(True)  # for threads; on the event loop each call has MSG_DONTWAIT
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, THREAD_WAIT)
        self._idle, self._threads = idle, threads
        self._fast = False
        """Whether the last bytes came faster than they were received."""

    async def request(self, data: bytes, end: float) -> None:
        """Sends a request and receives the head of its response, before the time `end`."""
        self._parser = HttpResponseParser(self)
        self.status = 0
        """0 until the head has come."""
        self.headers: dict[str, str] = {}
        """The headers and trailers of WANTED, by names in lower case."""
        self.keep_alive = False
        """Whether the server accepts another request after this response."""
        self._pieces: list[bytes] = []
        """Pieces of the body that were parsed and not read yet."""
        self._left: int | None = None
        """Bytes of a body of known length that were not received yet."""
        self._failure: OSError | None = None
        """An error of the connection, raised after the pieces that came before it."""
        self._framing = 0
        self._complete = False
        while data:  # one send nearly always sends everything
            try:
                data = data[self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                with trio.fail_at(min(trio.current_time() + self._idle, end)):
                    await trio.lowlevel.wait_writable(self._socket)
        while not self.status:
            piece = await self._when_readable(end, self._socket.recv, RECEIVE_BYTES, socket.MSG_DONTWAIT)
            if not piece:
                raise EOFError
            self._feed(piece)
        if self.headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise HttpParserError(f"transfer-encoding {self.headers['transfer-encoding'][:80]!r}")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self._complete:  # it belongs to another message
            self.keep_alive = False
        elif name in WANTED:
            self.headers[name.decode()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._complete:
            self.keep_alive = False
        elif status >= 200:  # else 100 Continue or its like: more is to come
            self.status, self.keep_alive = status, self._parser.should_keep_alive()
            length = self.headers.get("content-length")
            if length is not None and "transfer-encoding" not in self.headers and status not in (204, 304):
                self._left = int(length)

    def on_body(self, piece: bytes) -> None:
        if not self._complete:
            self._framing = 0
            self._pieces.append(piece)
            if self._left is not None:
                self._left -= len(piece)

    def on_message_complete(self) -> None:
        self._complete = self.status > 0
        if not self.status:
            self.headers.clear()

    def _feed(self, piece: bytes) -> None:
        self._framing += len(piece)
        try:
            self._parser.feed_data(piece)
        except HttpParserError:
            if not self._complete:
                raise
            self.keep_alive = False
        if self._framing > MAX_FRAMING:
            raise HttpParserError("a head, or the framing of a body, without end")

    async def receive(self) -> bytes:
        """The next piece of the body; b"" at its end."""
        while not self._pieces and not self._complete:
            if self._failure is not None:
                raise self._failure
            size = min(self._left or RECEIVE_BYTES, RECEIVE_BYTES)
            piece = await self._when_readable(math.inf, self._socket.recv, size, socket.MSG_DONTWAIT)
            if self._left is not None and piece:
                self._left -= len(piece)
                self._complete = not self._left
                return piece
            if piece:
                self._feed(piece)
            elif self._left is None and "transfer-encoding" not in self.headers:  # ends with the connection
                self._complete = True
            else:
                raise SourceFailed("the body was cut short", SHORT)
        try:  # add what has come meanwhile: each piece costs the tasks that it passes through 0.1 ms
            room, more = RECEIVE_BYTES, MAX_RECEIVES
            while more and not self._complete and (piece := self._socket.recv(room, socket.MSG_DONTWAIT)):
                self._feed(piece)
                room, more = room - len(piece), more - 1
        except BlockingIOError:
            pass
        except OSError as exc:
            self._failure = exc
        if not self._pieces and "x-stream-error" in self.headers:  # how Kubo's RPC API says that it broke off
            raise SourceFailed(f"the body broke off: {one_line(self.headers['x-stream-error'])}", SHORT)
        piece = b"".join(self._pieces)
        self._pieces.clear()
        return piece

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes of a body of known length, in a buffer for each of `sizes`. Bytes from the socket
        are copied once."""
        filled = list(map(buffers.lend, sizes))
        left = [*filled]
        parsed = io.BytesIO(b"".join(self._pieces))
        buffers.advance(left, sum(map(parsed.readinto, left)))
        rest = parsed.read()
        self._pieces = [rest] if rest else []
        while left:
            wanted = sum(map(len, left))
            receive = self._socket.recvmsg_into
            if self._fast and wanted > RECEIVE_BYTES:
                try:
                    count = (
                        await threads.run_sync(receive, left, 0, socket.MSG_WAITALL, limiter=self._threads)
                    )[0]
                except BlockingIOError:  # nothing came
                    self._fast = False
                    continue
                self._fast = count == wanted
            else:
                count = (await self._when_readable(math.inf, receive, left, 0, socket.MSG_DONTWAIT))[0]
                self._fast = count >= FAST
            if not count:
                raise SourceFailed("the body was cut short", SHORT)
            self._left = (self._left or 0) - count
            self._complete = not self._left
            buffers.advance(left, count)
        return filled

    async def _when_readable(self, end: float, receive: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Calls `receive` when there are bytes or the server has closed, at the latest at the time `end`."""
        while True:
            with trio.CancelScope(deadline=min(trio.current_time() + self._idle, end)) as scope:
                await trio.lowlevel.wait_readable(self._socket)
            if scope.cancelled_caught:  # as `trio.fail_at` does, at half its cost
                raise trio.TooSlowError
            with contextlib.suppress(BlockingIOError):  # woken for nothing
                return receive(*arguments)

    def is_fresh(self) -> bool:
        """Whether an idle connection is usable: the server neither closed it nor sent anything."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError as exc:
            return isinstance(exc, BlockingIOError)
        return False

    async def aclose(self) -> None:
        self._socket.close()
        self._parser = HttpResponseParser(None)  # breaks a reference cycle
