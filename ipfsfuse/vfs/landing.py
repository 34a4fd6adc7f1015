"""Leaves on their way from a source to the kernel: fetched ahead, verified, and not read yet.

They are in flight, not cached: each is dropped when its last byte was read here, when the reader has left it
behind or reached the file's end, or when there is no room: one bound holds for all open files together.
Concurrency: the event loop's.
"""

from collections import OrderedDict
from typing import Protocol

from ipfsfuse.cache.base import Content

LIMIT = 64 << 20
"""Bytes that may be on their way, for all files."""
BEHIND = 4 << 20
"""How far behind a reader a leaf may lie: the kernel asks a little out of order."""

STEP = 256 << 10
"""Bytes between two looks for what lies behind: a look takes time for each leaf, and a file may have some for
each KiB."""

TOLD = 4 << 20
"""Bytes that a reader may take without being heard of: so late what comes next may be begun."""


class Room:
    """What the landings of all open files share."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.left = limit


class ReadWindows(Protocol):
    """Bytes of one open file that its reader gets without a call to us."""

    def add(self, offset: int, content: Content, told: bool) -> None:
        """With `told`, the read of the last byte still comes to us."""
        ...

    def remove(self, offset: int) -> None:
        """Nobody reads what was added at `offset` once this has returned."""
        ...


class Landing:
    """The leaves of one open file, by offset."""

    def __init__(self, room: Room, size: int = 0, windows: ReadWindows | None = None) -> None:
        """`size` of the file: who reaches its end is always told of."""
        self._room = room
        self._size = size
        self._windows = windows
        self._closed = False
        self._passed = 0
        self._leaves: OrderedDict[int, Content] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leaves)

    def put(self, offset: int, content: Content) -> None:
        """Keeps a leaf for the reader that is coming, if there is room."""
        if len(content) <= self._room.left and offset not in self._leaves and not self._closed:
            self._leaves[offset] = content
            self._room.left -= len(content)
            if self._windows is not None:
                end = offset + len(content)
                self._windows.add(offset, content, offset // TOLD != end // TOLD or end == self._size)

    def get(self, offset: int) -> Content | None:
        return self._leaves.get(offset)

    def passed(self, offset: int) -> None:
        """Everything before `offset` was read: what lies well behind it is dropped, now or a little later."""
        if abs(offset - self._passed) < STEP:
            return
        self._passed = offset
        for start in [
            start for start, content in self._leaves.items() if start + len(content) <= offset - BEHIND
        ]:
            self.drop(start)

    def drop(self, offset: int) -> None:
        content = self._leaves.pop(offset, None)
        if content is not None:
            self._room.left += len(content)
            if self._windows is not None:
                self._windows.remove(offset)

    def close(self) -> None:
        """Nothing is kept from now on."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        for offset in list(self._leaves):
            self.drop(offset)
