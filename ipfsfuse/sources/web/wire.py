"""One HTTP/1.1 connection: h11 reads unusual heads, bodies go around it.

Measured on 2 cores, CPU time of the client per GET: of 8 KiB 95 us here, 210 us urllib3's connection in worker
threads, 250 us its pool, 470 us httpx on trio; of 1 MiB about the same for all that read in threads, 3 times as much
on the event loop. So heads and waiting belong to the event loop, which thousands of stalled calls do not burden, and
bytes that come fast are read by a worker thread.

Concurrency: one request at a time, by one task. A cancelled request leaves the connection fit only to be closed.
"""

import contextlib
import functools
import os
import re
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import h11
import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.fileio import buffers, threads
from ipfsfuse.sources.web.chunks import Chunks
from ipfsfuse.sources.web.failures import PROTOCOL, SHORT
from ipfsfuse.sources.web.heads import Head, Request, common

T = TypeVar("T")

PIECE: Final = 64 * 1024
FAST: Final = 32 * 1024
"""A read that gives so much at once, with more than PIECE still to come, sends the rest to a thread."""
THREAD_WAIT: Final = struct.pack("ll", 0, 20_000)
"""20 ms: how long a thread waits for bytes before the event loop does, so that a source that drips holds no thread."""
MAX_THREADS: Final = 16
TARGET: Final = re.compile(r"[!-~]+")
"""What may stand in a request line (RFC 9112, 3.2): no space, no control character."""


class Threads:
    """The worker threads that all connections to one origin share for reading, made with the first."""

    def __init__(self) -> None:
        self.limiter = trio.CapacityLimiter(MAX_THREADS)


class Wire:
    """An open connection."""

    def __init__(self, base: trio.SocketStream, stream: trio.abc.Stream, threads: Threads) -> None:
        """`stream` is what requests go over: `base` itself, or TLS over it."""
        self._base = base
        self._stream = stream
        self._plain = base.socket if stream is base else None
        self._threads = threads
        self._raw = socket.socket(fileno=os.dup(base.socket.fileno()))
        """The same socket for what trio has no call for."""
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, THREAD_WAIT)
        self._ready = b""
        """Bytes that came with the head, not read yet."""
        self._chunks: Chunks | None = None
        """Of an answer whose body comes in chunks."""
        self._fast = False
        """Whether `each` got the last bytes faster than it asked for them."""
        self._scope = trio.CancelScope()
        self._idle = self._end = float("inf")

    def watch(self, scope: trio.CancelScope, idle: float, end: float) -> None:
        """From now on each piece that comes moves the deadline of `scope` on: `idle` seconds from then, `end` at last."""
        self._scope, self._idle, self._end = scope, idle, end
        self._moved()

    def _moved(self) -> None:
        self._scope.deadline = min(trio.current_time() + self._idle, self._end)

    def is_fresh(self) -> bool:
        """Whether an idle connection still stands. The server may have closed it, or sent what no one asked for."""
        try:
            self._raw.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    @property
    def surplus(self) -> bool:
        """Whether bytes came that belong to no answer."""
        return bool(self._ready)

    def at_hand(self, count: int) -> bytes | None:
        """The next `count` bytes of the body if they came with the head."""
        if len(self._ready) < count:
            return None
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    async def ask(self, request: Request, target: str, body: bytes = b"") -> Head:
        """Sends the request and reads the answer's head. Raises EOFError if the server closed before its first byte."""
        if not TARGET.fullmatch(target):
            raise SourceFailed(f"{target[:80]!r} can't be asked for", PROTOCOL)
        await self._send(request.head(target) + body)
        piece = await self._receive(PIECE)
        if not piece:
            raise EOFError
        found = common(piece)
        if found is None:
            return await self._head(request.sent(body), piece)
        self._ready, self._chunks = piece[found[1] :], None
        return found[0]

    async def _head(self, protocol: h11.Connection, piece: bytes) -> Head:
        """Of an answer that is not in the common form and begins with `piece`."""
        protocol.receive_data(piece)
        while True:
            event = protocol.next_event()
            if isinstance(event, h11.Response):
                names = {name.lower(): value for name, value in event.headers.raw_items()}  # iterating h11's own is slow
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in names.items()}
                self._chunks = Chunks() if "transfer-encoding" in headers else None  # h11 takes no other one than chunked
                self._ready = bytes(protocol.trailing_data[0])
                return Head(event.status_code, event.http_version, headers)
            if event is h11.NEED_DATA:
                protocol.receive_data(await self._receive(PIECE))
            elif not isinstance(event, h11.InformationalResponse):
                raise SourceFailed("no HTTP answer came", PROTOCOL)

    async def some(self) -> bytes:
        """The next piece of a body whose length the head does not tell; b"" at its end. Raises SourceFailed if it is cut short."""
        chunks = self._chunks
        if chunks is None:
            piece, self._ready = self._ready, b""
            return piece or await self._receive(PIECE)
        while not chunks.ended:
            piece = self._ready or await self._receive(PIECE)
            if not piece:
                raise SourceFailed("the body was cut short", SHORT)
            body, self._ready = chunks.feed(piece), chunks.surplus
            if body:
                return body
        error = chunks.trailers.get("x-stream-error")  # how Kubo's RPC API says that it broke off
        if error is not None:
            raise SourceFailed(f"the body broke off: {error}", SHORT)
        return b""

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes of a body of known length. Raises SourceFailed if it ends before."""
        pieces = []
        if self._ready:
            pieces.append(self._ready[:count])
            self._ready = self._ready[count:]
            count -= len(pieces[0])
        fast = bool(pieces) and len(pieces[0]) >= FAST
        while count:
            if fast and count > PIECE and self._plain is not None:
                piece = await self._in_thread(functools.partial(self._raw.recv, count, socket.MSG_WAITALL), b"")
                fast = len(piece) == count
            else:
                piece = await self._receive(min(count, PIECE))
                fast = len(piece) >= FAST
                if not piece:
                    raise SourceFailed("the body was cut short", SHORT)
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def each(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """As `exactly`, into a buffer for each of `sizes`: bytes that come fast are copied once, by one system call."""
        filled = [buffers.lend(size) for size in sizes]
        left = [*filled]
        self._ready = self._ready[_put(left, self._ready) :]
        while left:
            wanted = sum(map(len, left))
            if self._fast and wanted > PIECE and self._plain is not None:
                count = await self._in_thread(lambda: self._raw.recvmsg_into(left, 0, socket.MSG_WAITALL)[0], 0)
                self._fast = count == wanted
                _pass(left, count)
            else:
                piece = await self._receive(min(wanted, PIECE))
                self._fast = len(piece) >= FAST
                if not piece:
                    raise SourceFailed("the body was cut short", SHORT)
                _put(left, piece)
        return filled

    async def _send(self, data: bytes) -> None:
        if self._plain is not None:  # nearly always whole, and 10 us cheaper than trio's
            with contextlib.suppress(BlockingIOError):
                data = data[self._raw.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        if data:
            await self._stream.send_all(data)

    async def _receive(self, count: int) -> bytes:
        piece = await self._receive_plain(self._plain, count) if self._plain is not None else bytes(await self._stream.receive_some(count))
        self._moved()
        return piece

    async def _receive_plain(self, plain: trio.socket.SocketType, count: int) -> bytes:
        """As trio's own, which would look first whether bytes are there: in vain, and an exception is not cheap."""
        while True:
            await trio.lowlevel.wait_readable(plain)
            with contextlib.suppress(BlockingIOError):  # woken for nothing
                return self._raw.recv(count, socket.MSG_DONTWAIT)

    async def _in_thread(self, receive: Callable[[], T], nothing: T) -> T:
        """What `receive` gives in a worker thread by one system call: all it asks for, less if bytes stop coming, or `nothing`."""
        file = self._raw.fileno()

        def read() -> T:
            os.set_blocking(file, True)
            try:
                return receive()
            except BlockingIOError:
                return nothing
            finally:
                os.set_blocking(file, False)

        # Not abandoned when cancelled: it waits no longer than THREAD_WAIT in all.
        received = await threads.run_sync(read, limiter=self._threads.limiter)
        self._moved()
        return received

    def close(self) -> None:
        """At once, without a TLS goodbye: what is left unread would only be waited for."""
        self._raw.close()
        self._base.socket.close()


def _put(left: list[memoryview], piece: bytes) -> int:
    """Copies `piece` into `left`, as far as there is room, and returns how much of it."""
    put = 0
    while left and put < len(piece):
        part = piece[put : put + len(left[0])]
        left[0][: len(part)] = part
        put += len(part)
        _pass(left, len(part))
    return put


def _pass(left: list[memoryview], count: int) -> None:
    """`count` more bytes of `left` are filled."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]
