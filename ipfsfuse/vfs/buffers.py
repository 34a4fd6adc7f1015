"""Content on its way from a source to the kernel: fetched ahead, verified, and not read yet.

It is in flight, not cached: each piece is given away once, and then dropped. `PrefetchBuffer` holds leaves of
one open file, `SmallFileBuffer` whole small files that arrived with their directory.

Concurrency: the event loop's.
"""

from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Protocol

from ipfsfuse.cache.base import Content
from ipfsfuse.dag.cid import Cid

MAX_LEAVES = 64 << 20
"""Bytes of leaves that may be in flight, for all open files together."""
BEHIND = 4 << 20
"""Bytes that a leaf may be behind the reader before it is dropped: the kernel asks a little out of order."""
UNSEEN = 4 << 20
"""Bytes that a reader may take in C without a call to Python. The next fetch may begin so much later."""
MAX_SMALL_FILES = 16 << 20
"""Bytes of small files that may be in flight."""


class BufferBudget:
    """The bytes that the prefetch buffers of all open files share."""

    def __init__(self, limit: int = MAX_LEAVES) -> None:
        self.left = limit


class ReadWindows(Protocol):
    """Bytes of one open file that its reader gets without a call to Python."""

    def add(self, offset: int, content: Content, told: bool) -> None:
        """With `told`, the read of the last byte still calls Python."""
        ...

    def remove(self, offset: int) -> None:
        """Nobody reads what was added at `offset` once this has returned."""
        ...


class PrefetchBuffer:
    """The leaves of one open file, by offset.

    A leaf is dropped when its last byte was read, when the reader has left it behind or reached the file's
    end, or when the file is closed. It is not taken in when the budget is used up."""

    def __init__(self, budget: BufferBudget, size: int = 0, windows: ReadWindows | None = None) -> None:
        """`size` is the file's. The read of its last byte always calls Python."""
        self._budget = budget
        self._size = size
        self._windows = windows
        self._closed = False
        self.leaves: dict[int, Content] = {}
        """By their offsets. `put` and `drop` change it."""
        self._starts: list[int] = []
        """Their offsets, sorted."""

    def put(self, offset: int, content: Content) -> None:
        """Keeps a leaf for the reader, if the budget allows."""
        if len(content) <= self._budget.left and offset not in self.leaves and not self._closed:
            self.leaves[offset] = content
            insort(self._starts, offset)
            self._budget.left -= len(content)
            if self._windows is not None:
                end = offset + len(content)
                self._windows.add(offset, content, offset // UNSEEN != end // UNSEEN or end == self._size)

    def read(self, offset: int, size: int) -> Content | None:
        """What a sequential reader asks for, if leaves here hold all of it. Leaves of which it has then read
        the last byte, or that it has left behind, are dropped."""
        parts: list[memoryview] = []
        done: list[int] = []
        first, end, at = offset, offset + size, bisect_right(self._starts, offset) - 1
        while offset < end:
            if not 0 <= at < len(self._starts):
                return None
            start = self._starts[at]
            content = self.leaves[start]
            stop = min(end, start + len(content))
            if not start <= offset < stop:
                return None
            parts.append(memoryview(content)[offset - start : stop - start])
            if stop == start + len(content):
                done.append(start)
            offset, at = stop, at + 1
        if end == self._size:
            self.clear()  # leaves that were read in C are still there
        else:
            for start in done:
                self.drop(start)
            while self._starts and self._starts[0] + len(self.leaves[self._starts[0]]) <= first - BEHIND:
                self.drop(self._starts[0])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def passed(self, offset: int) -> None:
        """Everything before `offset` was read. Leaves well behind it are dropped."""
        while self._starts and self._starts[0] + len(self.leaves[self._starts[0]]) <= offset - BEHIND:
            self.drop(self._starts[0])

    def drop(self, offset: int) -> None:
        content = self.leaves.pop(offset, None)
        if content is not None:
            del self._starts[bisect_right(self._starts, offset) - 1]
            self._budget.left += len(content)
            if self._windows is not None:
                self._windows.remove(offset)

    def close(self) -> None:
        """Nothing is taken in from now on."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        for offset in list(self.leaves):
            self.drop(offset)


class SmallFileBuffer:
    """Small files that arrived with their directory, and whose reader is still to come.

    Each is given away once: to the page cache when the reader comes near, or to the program that opens it. If
    there are too many, the oldest are dropped."""

    def __init__(self) -> None:
        self._files: OrderedDict[Cid, bytes] = OrderedDict()
        self._bytes = 0

    def put(self, cid: Cid, content: bytes) -> None:
        """The verified content of a raw file that has just arrived."""
        if cid not in self._files:
            self._files[cid] = content
            self._bytes += len(content)
            while self._bytes > MAX_SMALL_FILES:
                self._bytes -= len(self._files.popitem(last=False)[1])

    def take(self, cid: Cid) -> bytes | None:
        content = self._files.pop(cid, None)
        if content is not None:
            self._bytes -= len(content)
        return content

    def take_all(self, wanted: Iterable[Cid]) -> Iterator[tuple[Cid, bytes]]:
        """Those of `wanted` that are here."""
        for cid in wanted:
            content = self.take(cid)
            if content is not None:
                yield cid, content
