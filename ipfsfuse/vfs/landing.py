"""Leaves on their way from a source to the kernel: fetched ahead, verified, and not read yet.

They are in flight, not cached: each is dropped when its last byte was read, when the reader has left it behind, or
when there is no room: one bound holds for all open files together. Concurrency: the event loop's.
"""

from collections import OrderedDict
from typing import Protocol

from ipfsfuse.cache.base import Content

LIMIT = 64 << 20
"""Bytes that may be on their way, for all files."""
BEHIND = 4 << 20
"""How far behind a reader a leaf may lie: the kernel asks a little out of order."""

TOLD = 4 << 20
"""Bytes that a reader may take without being heard of: so late what comes next may be begun."""


class Room:
    """What the landings of all open files share."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.left = limit


class Counter(Protocol):
    """Where a reader takes what waits for him unasked."""

    def offer(self, offset: int, content: Content, told: bool) -> None:
        """With `told`, he comes here for its last byte."""
        ...

    def withdraw(self, offset: int) -> None:
        """What was offered at `offset`: nobody takes it any more once this returns."""
        ...


class Landing:
    """The leaves of one open file, by offset."""

    def __init__(self, room: Room, counter: Counter | None = None) -> None:
        self._room = room
        self._counter = counter
        self._leaves: OrderedDict[int, Content] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leaves)

    def put(self, offset: int, content: Content) -> None:
        """Keeps a leaf for the reader that is coming, if there is room."""
        if len(content) <= self._room.left and offset not in self._leaves:
            self._leaves[offset] = content
            self._room.left -= len(content)
            if self._counter is not None:
                self._counter.offer(offset, content, offset // TOLD != (offset + len(content)) // TOLD)

    def get(self, offset: int) -> Content | None:
        return self._leaves.get(offset)

    def passed(self, offset: int) -> None:
        """Everything before `offset` was read: what lies well behind it is dropped."""
        for start in [start for start, content in self._leaves.items() if start + len(content) <= offset - BEHIND]:
            self.drop(start)

    def drop(self, offset: int) -> None:
        content = self._leaves.pop(offset, None)
        if content is not None:
            self._room.left += len(content)
            if self._counter is not None:
                self._counter.withdraw(offset)

    def clear(self) -> None:
        for offset in list(self._leaves):
            self.drop(offset)
