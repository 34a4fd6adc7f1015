"""When to fetch ahead of a reader, and how far. Pure: it is told of reads and returns what to bring in.

A reader is sequential once two reads follow each other; the kernel's own read-ahead may swap neighbours, so
"follow" allows for SLACK. The window doubles with each step from MIN to MAX and the next one is begun while
half is unread, so that a reader of one byte costs its leaf and a reader of a whole file waits for the first
leaves only. It may be told of a part of the reads alone: of what was fetched ahead not each one
(`prefetch_buffer.UNSEEN`).
"""

from typing import NamedTuple

MIN_WINDOW = 2 << 20
MAX_WINDOW = 16 << 20
SLACK = 2 << 20


class Window(NamedTuple):
    """Bytes to bring in: `size` from `start`."""

    start: int
    size: int


class ReadAhead:
    """The state of one open file."""

    def __init__(self, file_size: int) -> None:
        self._file_size = file_size
        self._next = -1
        self._until = 0
        self._window = MIN_WINDOW
        self.sequential = False
        """Whether the last read followed the one before it."""

    def note(self, offset: int, size: int) -> Window | None:
        """A read of `size` bytes at `offset`; returns what should be fetched behind it, if anything."""
        end = offset + size
        follows = self._next - SLACK <= offset <= self._next + max(SLACK, self._window)
        first, self._next = self._next < 0, max(end, self._next) if follows else end
        self.sequential = follows and not first
        if not self.sequential:
            self._until, self._window = end, MIN_WINDOW
            return None
        if self._until - self._next > self._window // 2 or self._until >= self._file_size:
            return None
        start = max(self._until, end)
        size = min(self._window, self._file_size - start)
        self._until = start + max(size, 0)
        self._window = min(2 * self._window, MAX_WINDOW)
        return Window(start, size) if size > 0 else None
