"""Plain HTTP/1.1 to a node on this machine, where the CPU is the limit and not the network.

httptools parses heads and bodies in chunks. A body of known length goes around the parser: it is received straight
into the caller's buffers, by a worker thread where it comes fast. docs/adr/0001-http-client.md has the measurements.

Concurrency: one request at a time on a connection, by one task. A request that was cancelled or has failed leaves
the connection fit only to be closed. This module knows nothing of httpx; `client` mounts it there.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

import trio
from httptools import HttpParserError, HttpResponseParser

from ipfsfuse.errors import SourceFailed
from ipfsfuse.fileio import buffers
from ipfsfuse.sources.origin import Origin

T = TypeVar("T")

PIECE: Final = 64 * 1024
FAST: Final = 32 * 1024
"""A receive that gives so much at once, with more than PIECE still to come, sends the rest to a thread."""
THREAD_WAIT: Final = struct.pack("ll", 0, 20_000)
"""20 ms: how long a thread waits for bytes before the event loop does, so that a server that drips holds no thread."""
MAX_THREADS: Final = 16
"""Worker threads that receive, for each origin."""
MAX_FRAMING: Final = 16 * 1024
"""Bytes of a head, or between two pieces of a body in chunks: sizes, extensions, trailers."""
WANTED: Final = frozenset(
    b"content-encoding content-length content-range content-type location retry-after transfer-encoding x-stream-error".split()
)
"""The headers that anybody here looks at. A Kubo node sends 27: to decode them all costs as much as to parse them."""


class Connection:
    """An open connection. The methods that begin with `on_` are the parser's."""

    def __init__(self, stream: trio.SocketStream, idle: float, threads: trio.CapacityLimiter) -> None:
        """`idle`: seconds to wait for the next byte. Takes `stream` over."""
        self._stream = stream
        self._idle = idle
        self._threads = threads
        self._raw = socket.socket(fileno=os.dup(stream.socket.fileno()))
        """The same socket, for the system calls that trio does not have."""
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, THREAD_WAIT)
        self.idle_since = 0.0
        self._fast = False
        """Whether the last bytes came faster than they were asked for."""
        self._begin()

    def _begin(self) -> None:
        self._parser = HttpResponseParser(self)
        self.status = 0
        self.headers: dict[str, str] = {}
        """Those of WANTED, by names in lower case; of one that came twice the last. Trailers are added to them."""
        self._pieces: list[bytes] = []
        """Of the body, parsed and not read yet."""
        self._left: int | None = None
        """Bytes of the body that are still in the socket, where the head gave its length."""
        self._framing = 0
        self._in_body = self._complete = self._surplus = self._keep = self._until_close = False

    # -- called by the parser -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._surplus = self._complete

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in WANTED and not self._surplus:
            self.headers[name.decode()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._surplus or status < 200:  # 100 Continue and its like: the answer is still to come
            return
        self.status, self._in_body, self._keep = status, True, self._parser.should_keep_alive()
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        if coding is not None and coding.lower() != "chunked":
            self._surplus, self._keep = True, False  # `request` refuses it
        elif coding is None and length is not None and status not in (204, 304):
            self._left = int(length)
        self._until_close = coding is None and length is None and status not in (204, 304)

    def on_body(self, piece: bytes) -> None:
        if not self._surplus:
            self._framing = 0
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if self._in_body:
            self._complete = True
        else:
            self.headers.clear()

    # -- requests -----------------------------------------------------------------------------------------------

    async def request(self, data: bytes, total: float) -> None:
        """Sends a request's bytes and receives, within `total` seconds, the response's head: then `status` and `headers`
        are set.

        Raises EOFError where the server closed the connection before its first byte."""
        self._begin()
        await self._send(data)
        end = trio.current_time() + total
        while not self._in_body:
            piece = await self._receive(PIECE, end)
            if not piece:
                raise EOFError
            self._feed(piece)
        if self._surplus and not self._complete:
            raise HttpParserError(f"transfer-encoding {self.headers['transfer-encoding'][:80]!r}")
        if self._left is not None:
            self._left -= self.buffered

    def _feed(self, piece: bytes) -> None:
        self._framing += len(piece)
        try:
            self._parser.feed_data(piece)
        except HttpParserError:
            if not self._complete:
                raise
            self._surplus = True
        if self._framing > MAX_FRAMING + PIECE or (not self._in_body and self._framing > MAX_FRAMING):
            raise HttpParserError("a head, or framing of a body, without end")

    @property
    def ended(self) -> bool:
        """Whether the whole body was read."""
        return not self._pieces and (self._left == 0 if self._left is not None else self._complete)

    @property
    def buffered(self) -> int:
        """Bytes of the body that can be received without waiting."""
        return sum(map(len, self._pieces))

    @property
    def reusable(self) -> bool:
        return self._keep and self.ended and not self._surplus

    async def receive(self, most: int = 4 * PIECE) -> bytes:
        """The next piece of the body, b"" at its end. Raises SourceFailed (`short`) where it was cut."""
        while not self.ended:
            if self._pieces:
                piece = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
                self._pieces = [piece[most:]] if len(piece) > most else []
                return piece[:most]
            piece = await self._receive(PIECE if self._left is None else min(self._left, most, PIECE))
            if not piece and not self._until_close:
                raise SourceFailed("the body was cut short", "short")
            if self._left is not None:
                self._left -= len(piece)
                self._fast = len(piece) >= FAST
                return piece
            if piece:
                self._feed(piece)
            else:
                self._complete = True
        if "x-stream-error" in self.headers:  # how Kubo's RPC API says that it broke off
            raise SourceFailed(f"the body broke off: {self.headers['x-stream-error'][:200]}", "short")
        return b""

    async def receive_into(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """The next bytes of a body of known length, in a buffer for each of `sizes`, copied once by few system calls."""
        filled = [buffers.lend(size) for size in sizes]
        left = [*filled]
        while left:
            wanted = sum(map(len, left))
            if self._fast and wanted > PIECE and not self._pieces and self._left is not None:
                count = await self._in_thread(lambda: self._raw.recvmsg_into(left, 0, socket.MSG_WAITALL)[0], 0)
                self._fast = count == wanted
                self._left -= count
                buffers.advance(left, count)
            else:
                piece = await self.receive(min(wanted, PIECE))
                if not piece:
                    raise SourceFailed("the body was cut short", "short")
                buffers.fill(left, piece)
        return filled

    # -- the socket ---------------------------------------------------------------------------------------------

    async def _send(self, data: bytes) -> None:
        with contextlib.suppress(BlockingIOError):  # nearly always it goes whole, and 10 us cheaper than by trio
            data = data[self._raw.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        if data:
            with trio.fail_after(self._idle):
                await self._stream.send_all(data)

    async def _receive(self, count: int, end: float = float("inf")) -> bytes:
        """Bytes from the socket; trio's own call would first look whether there are any, in vain."""
        while True:
            with trio.CancelScope(deadline=min(trio.current_time() + self._idle, end)) as scope:
                await trio.lowlevel.wait_readable(self._stream.socket)
            if scope.cancelled_caught:  # as `trio.fail_at` does, at half its cost
                raise trio.TooSlowError
            with contextlib.suppress(BlockingIOError):  # woken for nothing
                return self._raw.recv(count, socket.MSG_DONTWAIT)

    async def _in_thread(self, receive: Callable[[], T], nothing: T) -> T:
        """What one system call in a worker thread receives: all, less where bytes stop coming, or `nothing`."""
        file = self._raw.fileno()

        def blocking() -> T:
            os.set_blocking(file, True)
            try:
                return receive()
            except BlockingIOError:
                return nothing
            finally:
                os.set_blocking(file, False)

        # Not abandoned when it is cancelled: it waits no longer than THREAD_WAIT for each piece.
        return await trio.to_thread.run_sync(blocking, limiter=self._threads)

    def is_fresh(self) -> bool:
        """Whether an idle connection still stands: the server neither closed it nor sent what nobody asked for."""
        try:
            self._raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._raw.close()
        self._stream.socket.close()


class ConnectionPool:
    """Kept-alive connections to one origin on this machine."""

    def __init__(self, origin: Origin, connect: float, idle: float, total: float, most: int, keep: float) -> None:
        """`connect`, `idle`, `total`: seconds to connect, to wait for a byte, for a head. At most `most` idle connections are kept,
        for `keep` seconds."""
        self._origin, self._connect, self._idle, self._total = origin, connect, idle, total
        self._most, self._keep = most, keep
        self._threads = trio.CapacityLimiter(MAX_THREADS)
        self._waiting: list[Connection] = []
        self._closed = False

    async def request(self, data: bytes, trace: Callable[[str, dict[str, object]], Awaitable[None]]) -> Connection:
        """The connection that sent `data` and has received the response's head. It goes to `release` at last.

        Tells `trace`, as httpcore would, before it opens a new connection."""
        connection = self._kept()
        if connection is None:
            await trace("connection.connect_tcp.started", {})
            with trio.fail_after(self._connect):
                connection = Connection(await self._open(), self._idle, self._threads)
        try:
            await connection.request(data, self._total)
        except BaseException:
            connection.close()
            raise
        return connection

    def _kept(self) -> Connection | None:
        while self._waiting:
            connection = self._waiting.pop()
            if trio.current_time() - connection.idle_since < self._keep and connection.is_fresh():
                return connection
            connection.close()
        return None

    async def _open(self) -> trio.SocketStream:
        if self._origin.unix is not None:
            return await trio.open_unix_socket(self._origin.unix)
        stream = await trio.open_tcp_stream(self._origin.host, self._origin.port)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream

    def release(self, connection: Connection) -> None:
        if connection.reusable and not self._closed and len(self._waiting) < self._most:
            connection.idle_since = trio.current_time()
            self._waiting.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        self._closed = True
        while self._waiting:
            self._waiting.pop().close()
