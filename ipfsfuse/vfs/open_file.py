"""An open file: finds the leaves under a read, and fetches ahead of a sequential reader.

Concurrency: reads of one open file may overlap. Closing the file cancels what is being fetched ahead.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes, traversal
from ipfsfuse.dag.nodes import File, Leaf
from ipfsfuse.errors import IpfsFuseError, NotALeaf
from ipfsfuse.sources.base import current_request
from ipfsfuse.structures import Buffer
from ipfsfuse.vfs.tree import Tree

RECENT = 64
"""Requested leaves that are remembered."""
WALKS_REMEMBERED = 4
"""Walks whose leaves are remembered. With only the last one, a reader and its read-ahead walked again in
turns: 12 % of the CPU of a cold read."""

MIN_WINDOW = 2 << 20
MAX_WINDOW = 16 << 20
SEQUENTIAL_SLACK = 2 << 20


_OFFSET = attrgetter("offset")


class Window(NamedTuple):
    """Bytes to fetch: `size` from `start`."""

    start: int
    size: int


class ReadAhead:
    """Decides what to fetch ahead for one open file. Pure."""

    def __init__(self, file_size: int) -> None:
        self._file_size = file_size
        self._next = -1
        self._until = 0
        self._window = MIN_WINDOW
        self.sequential = False
        """Whether the last read followed the one before it."""

    def note(self, offset: int, size: int) -> Window | None:
        """Notes a read of `size` bytes at `offset`. Returns what should be fetched ahead of it, if
        anything."""
        end = offset + size
        follows = self._next - SEQUENTIAL_SLACK <= offset <= self._next + max(SEQUENTIAL_SLACK, self._window)
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


# -- leaves that were fetched ahead --------------------------------------------------------------------------

# They are not cached here: each byte is given to the reader once, and then dropped.

MAX_BUFFERED = 64 << 20
"""Bytes of leaves in the buffers of all open files together."""
BEHIND = 4 << 20
"""Bytes by which a leaf may be behind the reader before it is dropped: the kernel reads a little out of
order."""
UNSEEN = 4 << 20
"""Bytes that the C thread may give to a reader without a call to Python. The next fetch may begin so much
later."""


class BufferBudget:
    """The bytes that the prefetch buffers of all open files share."""

    def __init__(self, limit: int = MAX_BUFFERED) -> None:
        self.left = limit


class ReadWindows(Protocol):
    """The bytes of one open file that the C thread may give to its reader without Python."""

    def expect(self, offset: int, size: int) -> None:
        """What is there is soon added or removed. For a moment, a read of it waits for that."""
        ...

    def add(self, offset: int, content: Buffer, notify: bool) -> None:
        """Adds bytes at `offset`. With `notify`, the read of the last byte still calls Python."""
        ...

    def remove(self, offset: int) -> None:
        """Removes what was added or expected at `offset`. After this returns, it is not read any more."""
        ...

    def allow(self, folder: int, name: bytes, offset: int, size: int, tags: bytes) -> None:
        """Lets the C thread answer small reads within the leaf at `offset`, of `size` bytes, from its staging
        file (`cache.base.Pieces`), for all that have the file open. Some reads still call Python."""
        ...


class PrefetchBuffer:
    """Leaves of one open file, by offset.

    A leaf is dropped when its last byte was read, when it is too far behind the reader, when the reader has
    reached the file's end, or when the file is closed. It is not added if the budget is used up."""

    def __init__(self, budget: BufferBudget, size: int = 0, windows: ReadWindows | None = None) -> None:
        """`size`: the file's bytes. The read of the last byte always calls Python."""
        self._budget = budget
        self._size = size
        self._windows = windows
        self._closed = False
        self.leaves: dict[int, Buffer] = {}
        """The leaves by offset. Changed only by `put` and `drop`."""
        self._starts: list[int] = []
        """The offsets, sorted."""

    def expect(self, leaves: Sequence[Leaf]) -> None:
        """`leaves` are being fetched for the reader: `put` or `give_up` follows. The reads that Python has to
        see do not wait for them. Python sees all reads of a short window, because the next window should be
        fetched while they wait."""
        if self._windows is None or self._closed or sum(leaf.size for leaf in leaves) <= UNSEEN:
            return
        for leaf in leaves:
            if leaf.offset not in self.leaves and not self._is_seen(leaf.offset, leaf.size):
                self._windows.expect(leaf.offset, leaf.size)

    def give_up(self, leaves: Iterable[Leaf]) -> None:
        """Those of `leaves` that are not here are not expected any more."""
        if self._windows is not None:
            for leaf in leaves:
                if leaf.offset not in self.leaves:
                    self._windows.remove(leaf.offset)

    def put(self, offset: int, content: Buffer) -> None:
        """Adds a leaf for the reader, if the budget allows it."""
        if offset in self.leaves or self._closed:
            return
        fits = len(content) <= self._budget.left
        if fits:
            self.leaves[offset] = content
            insort(self._starts, offset)
            self._budget.left -= len(content)
        if self._windows is not None and fits:
            self._windows.add(offset, content, self._is_seen(offset, len(content)))
        elif self._windows is not None:
            self._windows.remove(offset)

    def _is_seen(self, offset: int, size: int) -> bool:
        """Whether the read of the last byte of the leaf there calls Python."""
        return offset // UNSEEN != (offset + size) // UNSEEN or offset + size == self._size

    def read(self, offset: int, size: int) -> Buffer | None:
        """The bytes of a sequential read, if all of them are here. Drops leaves whose last byte was read, or
        that are too far behind the reader."""
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
            self.clear()  # leaves that the C thread has given are still here
        else:
            for start in done:
                self.drop(start)
            while self._starts and self._starts[0] + len(self.leaves[self._starts[0]]) <= first - BEHIND:
                self.drop(self._starts[0])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def passed(self, offset: int) -> None:
        """Notes that everything before `offset` was read. Drops leaves far behind it."""
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
        """Drops all leaves, and accepts no more."""
        self._closed = True
        self.clear()

    def clear(self) -> None:
        for offset in list(self.leaves):
            self.drop(offset)


# -- the open file -------------------------------------------------------------------------------------------


class OpenFile:
    def __init__(
        self, tree: Tree, file: File, budget: BufferBudget, windows: ReadWindows | None = None
    ) -> None:
        """`windows`: for reads that the C thread answers. They are not seen here."""
        self._tree = tree
        self._file = file
        self._ref = FileRef(cids.canonical(file.cid), file.size)
        self._is_value = nodes.holds_values(file.cid)
        self._ahead = ReadAhead(file.size)
        self._buffer = PrefetchBuffer(budget, file.size, windows)
        self._windows = windows
        self._walks: deque[Sequence[Leaf]] = deque(maxlen=WALKS_REMEMBERED)
        """The leaves that the last walks found: a reader is in some of them while others are fetched
        ahead."""
        if file.inline == file.size:
            self._walks.append((Leaf(file.cid, 0, file.size, bool(file.children)),))
            if (come := tree.small_files.take(file.cid)) is not None:
                self._buffer.put(0, come)
        self._asked: deque[int] = deque(maxlen=RECENT)
        """Offsets of the leaves that were requested last, so that they are not fetched ahead too."""
        self._sure = False
        """Set when a supposed leaf was an interior node. From then on every node is examined."""
        self._scopes: set[trio.CancelScope] = set()
        tree.opened(self._ref)

    def close(self) -> None:
        """Cancels what is being fetched ahead, and drops the buffer."""
        for scope in self._scopes:
            scope.cancel()
        self._buffer.close()

    async def read(self, offset: int, size: int) -> Buffer:
        """`size` bytes of the content from `offset`; fewer only at the file's end."""
        size = min(size, self._file.size - offset)
        if size <= 0:
            return b""
        if self._is_value:
            document = await self._tree.document(self._file.cid)
            return document.content(cids.value_place(self._file.cid)[1])[offset : offset + size]
        window = self._ahead.note(offset, size)
        if window is not None:
            self._tree.nursery.start_soon(self._bring, window)
        if self._ahead.sequential and self._tree.use is None:
            buffered = self._buffer.read(offset, size)
            if buffered is not None:
                return buffered
        cache, sequential = self._tree.cache, self._ahead.sequential
        parts: list[Buffer] = []
        end, walked_again = offset + size, False
        while offset < end:
            leaves: Sequence[Leaf] = ()
            for walk in self._walks:  # leaves of the last walks
                if not leaves and walk[0].offset <= offset < walk[-1].offset + walk[-1].size:
                    first_leaf = bisect_right(walk, offset, key=_OFFSET) - 1
                    leaves = walk[first_leaf : bisect_left(walk, end, key=_OFFSET)]
            try:
                for leaf in leaves or await self._walk(offset, end - offset):
                    if self._tree.use is not None:
                        self._tree.use(leaf.cid, ahead=False)
                    self._asked.append(leaf.offset)
                    first, last = offset - leaf.offset, min(end - leaf.offset, leaf.size)
                    data = self._buffer.leaves.get(leaf.offset)
                    if data is None and not sequential:
                        content, pieces = await cache.part(self._ref, leaf, first, last, early=True)
                        if self._windows is not None and pieces is not None:
                            folder, name, tags = pieces
                            self._windows.allow(folder, name, leaf.offset, leaf.size, tags)
                    else:
                        # the rest of the leaf goes into the buffer, so that a leaf is hashed only once
                        data = data or await cache.leaf(self._ref, leaf, early=True)
                        content = memoryview(data)[first:last]
                        if sequential and leaf.offset + last == self._file.size:
                            self._buffer.clear()  # leaves that the C thread has given are still there
                        elif last == leaf.size:
                            self._buffer.drop(leaf.offset)
                        elif sequential:
                            self._buffer.put(leaf.offset, data)
                        self._buffer.passed(leaf.offset)
                    parts.append(content)
                    offset = leaf.offset + last
            except NotALeaf:
                if walked_again:
                    raise
                self._sure = walked_again = True
                self._walks.clear()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _walk(self, offset: int, size: int) -> Sequence[Leaf]:
        walk = file_layout.leaves(self._file, offset, size, self._sure)
        leaves = await traversal.drive(walk, self._tree.nodes)
        if leaves:
            self._walks.appendleft(leaves)
        return leaves

    async def _bring(self, window: Window) -> None:
        current_request.set(current_request.get().for_background())
        leaves: Sequence[Leaf] = ()
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                found = await self._walk(window.start, window.size)
                leaves = [leaf for leaf in found if leaf.offset not in self._asked]
                if self._tree.use is not None:
                    for leaf in leaves:
                        self._tree.use(leaf.cid, ahead=True)
                self._buffer.expect(leaves)
                await self._tree.cache.ahead(
                    self._ref, leaves, lambda leaf, data: self._buffer.put(leaf.offset, data)
                )
            except IpfsFuseError:
                pass  # the read of these leaves will raise it
            finally:
                self._scopes.discard(scope)
                self._buffer.give_up(leaves)
