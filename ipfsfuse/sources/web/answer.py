"""One HTTP answer: its head, and its body within every limit.

Concurrency: one reader. Large bodies wait until there is room for them among all that are on their way.
"""

from collections.abc import Callable, Sequence

import trio

from ipfsfuse.errors import SourceFailed
from ipfsfuse.sources.body_budget import BodyShare
from ipfsfuse.sources.web.failures import ENCODING, LONG, SHORT, translated
from ipfsfuse.sources.web.heads import Head
from ipfsfuse.sources.web.wire import Wire

ERROR_BODY = 64 * 1024
SMALL = 64 * 1024


class Answer:
    """An answer's head, and its body to be read once. What is read to its end leaves the connection usable."""

    def __init__(self, wire: Wire, head: Head, name: str, idle: float, total: float, room: BodyShare) -> None:
        """`idle` and `total` as in `HttpSettings`."""
        self.status = head.status
        self.headers = head.headers
        self._wire = wire
        self._room = room
        self._held = 0
        self._name = name
        self._idle, self._total = idle, total
        chunked = "transfer-encoding" in self.headers
        self._left = None if chunked or "content-length" not in self.headers else int(self.headers["content-length"])
        """Body bytes still to come; None where only the stream's end tells."""
        if self.status in (204, 304):
            self._left = 0
        closes = "close" in self.headers.get("connection", "").lower() or head.version != b"1.1"
        self._keep = not closes and (chunked or self._left is not None)
        self._ended = self._left == 0

    @property
    def reusable(self) -> bool:
        return self._keep and self._ended and not self._wire.surplus

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def whole(self, limit: int) -> bytes:
        """The body, of at most `limit` bytes. Raises SourceFailed: long, short, encoding, timeout, reset."""
        if self._left is not None and self._left > limit:
            raise SourceFailed(f"{self._name} offered {self._left} bytes where at most {limit} can be right", LONG)
        end = trio.current_time() + self._total
        if self._left is not None:
            return await self.exactly(self._left, end)
        body = bytearray()
        while piece := await self.some(end):
            body += piece
            if len(body) > limit:
                raise SourceFailed(f"{self._name} sent more than {limit} bytes where no more can be right", LONG)
        return bytes(body)

    async def exactly(self, count: int, end: float = float("inf")) -> bytes:
        """The next `count` bytes of a body whose length the head told, by the time `end`."""
        await self._reserve(count)
        data = self._wire.at_hand(count)
        if data is None:
            with translated(self._name), trio.fail_after(self._idle) as scope:
                self._wire.watch(scope, self._idle, end)
                data = await self._wire.exactly(count)
        self._taken(count)
        return data

    async def each(self, sizes: Sequence[int]) -> Sequence[memoryview]:
        """As `exactly`, in a buffer for each of `sizes`."""
        count = sum(sizes)
        await self._reserve(count)
        with translated(self._name), trio.fail_after(self._idle) as scope:
            self._wire.watch(scope, self._idle, float("inf"))
            found = await self._wire.each(sizes)
        self._taken(count)
        return found

    async def _reserve(self, count: int) -> None:
        """Room for `count` more bytes of a body whose length the head told."""
        if self._left is None or self._left < count:
            raise SourceFailed(f"{self._name} sent a shorter body than was asked for", SHORT)
        await self._hold(count)

    def _taken(self, count: int) -> None:
        assert self._left is not None
        self._left -= count
        self._ended = self._left == 0

    async def some(self, end: float = float("inf")) -> bytes:
        """The next piece of the body, b"" at its end."""
        if self._left is not None:
            return await self.exactly(min(self._left, 256 * 1024), end) if self._left else b""
        with translated(self._name), trio.fail_after(self._idle) as scope:
            self._wire.watch(scope, self._idle, end)
            piece = await self._wire.some()
        self._ended = not piece
        return piece

    async def _hold(self, count: int) -> None:
        """Large bodies wait until there is room for them; what was read before is the reader's own by now."""
        self.release()
        if count > SMALL:
            await self._room.take(count)
            self._held = count

    def detach(self) -> Callable[[], None]:
        """What was read last stays counted until the function returned is called, however much is read meanwhile."""
        held, self._held = self._held, 0
        return lambda: self._room.give(held)

    def release(self) -> None:
        if self._held:
            self._room.give(self._held)
            self._held = 0

    def check_plain(self) -> None:
        """Refuses compression: it was not asked for, and a small answer could grow without end."""
        encoding = self.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise SourceFailed(f"{self._name} compressed its answer ({encoding}), which was not asked for", ENCODING)
