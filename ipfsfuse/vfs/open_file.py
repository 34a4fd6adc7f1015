"""An open file: which leaves lie under a read, and what to fetch ahead of it.

Concurrency: reads of one open file may overlap. What is fetched ahead ends when the file is closed.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import trio

from ipfsfuse.cache.base import Content, FileRef
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes, traversal
from ipfsfuse.dag.nodes import File, Leaf
from ipfsfuse.errors import IpfsFuseError, NotALeaf
from ipfsfuse.sources.base import current_request
from ipfsfuse.vfs.tree import Tree

RECENT = 64
"""Leaves that are remembered as asked for."""
STRETCHES = 4
"""Walks whose leaves are remembered. With the last alone a reader and its read-ahead took turns in walking
anew: 12 % of the CPU of a cold read."""

MIN_WINDOW = 2 << 20
MAX_WINDOW = 16 << 20
SLACK = 2 << 20


_OFFSET = attrgetter("offset")


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


# -- what was fetched ahead ----------------------------------------------------------------------------------

# It is in flight, not cached: each piece is given away once, and then dropped.

MAX_LEAVES = 64 << 20
"""Bytes of leaves that may be in flight, for all open files together."""
BEHIND = 4 << 20
"""Bytes that a leaf may be behind the reader before it is dropped: the kernel asks a little out of order."""
UNSEEN = 4 << 20
"""Bytes that a reader may take in C without a call to Python. The next fetch may begin so much later."""


class BufferBudget:
    """The bytes that the prefetch buffers of all open files share."""

    def __init__(self, limit: int = MAX_LEAVES) -> None:
        self.left = limit


class ReadWindows(Protocol):
    """Bytes of one open file that its reader gets without a call to Python."""

    def add(self, offset: int, content: Content, notify: bool) -> None:
        """With `notify`, the read of the last byte still calls Python."""
        ...

    def remove(self, offset: int) -> None:
        """Nobody reads what was added at `offset` once this has returned."""
        ...

    def allow(self, folder: int, name: bytes, offset: int, size: int, tags: bytes) -> None:
        """From now on small reads within the leaf at `offset`, of `size` bytes, may be given as a `Pieces`
        says, to all who have the file open. Some still call Python."""
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


# -- the open file -------------------------------------------------------------------------------------------


class OpenFile:
    def __init__(
        self, tree: Tree, file: File, budget: BufferBudget, windows: ReadWindows | None = None
    ) -> None:
        """Reads that are answered from `windows` are not seen here."""
        self._tree = tree
        self._file = file
        self._ref = FileRef(cids.canonical(file.cid), file.size)
        self._is_value = nodes.holds_values(file.cid)
        self._ahead = ReadAhead(file.size)
        self._buffer = PrefetchBuffer(budget, file.size, windows)
        self._windows = windows
        self._stretches: deque[Sequence[Leaf]] = deque(maxlen=STRETCHES)
        """Runs of leaves that walks found last: a reader is in one while another is fetched ahead."""
        if file.inline == file.size:
            self._stretches.append((Leaf(file.cid, 0, file.size),))
            if (come := tree.small_files.take(file.cid)) is not None:
                self._buffer.put(0, come)
        self._asked: deque[int] = deque(maxlen=RECENT)
        """Offsets of the leaves asked for last: on their way already, not to be fetched ahead."""
        self._sure = False
        """True once a supposed leaf turned out to be an interior node: then every node is looked at."""
        self._scopes: set[trio.CancelScope] = set()
        tree.opened(self._ref)

    def close(self) -> None:
        """Ends what is still being fetched ahead."""
        for scope in self._scopes:
            scope.cancel()
        self._buffer.close()

    async def read(self, offset: int, size: int) -> Content:
        """`size` content bytes from `offset`, fewer only at the file's end."""
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
        try:
            return await self._range(offset, size)
        except NotALeaf:
            self._sure = True
            self._stretches.clear()
            return await self._range(offset, size)

    async def _range(self, offset: int, size: int) -> Content:
        """The bytes of all leaves that lie under a read. What is left of the last one a sequential reader
        finds in the buffer, so that its hash pays once."""
        parts: list[Content] = []
        cache, sequential = self._tree.cache, self._ahead.sequential
        end = offset + size
        while offset < end:
            leaves: Sequence[Leaf] = ()
            for stretch in self._stretches:  # found by the last walks
                if not leaves and stretch[0].offset <= offset < stretch[-1].offset + stretch[-1].size:
                    first_leaf = bisect_right(stretch, offset, key=_OFFSET) - 1
                    leaves = stretch[first_leaf : bisect_left(stretch, end, key=_OFFSET)]
            for leaf in leaves or await self._walk(offset, end - offset):
                first, last = offset - leaf.offset, min(end - leaf.offset, leaf.size)
                offset = leaf.offset + last
                if self._tree.use is not None:
                    self._tree.use(leaf.cid, ahead=False)
                self._asked.append(leaf.offset)
                data = self._buffer.leaves.get(leaf.offset)
                if data is None and not sequential:
                    content, pieces = await cache.part(self._ref, leaf, first, last, early=True)
                    parts.append(content)
                    if self._windows is not None and pieces is not None:
                        folder, name, tags = pieces
                        self._windows.allow(folder, name, leaf.offset, leaf.size, tags)
                    continue
                if data is None:
                    data = await cache.leaf(self._ref, leaf, early=True)
                parts.append(memoryview(data)[first:last])
                if sequential and offset == self._file.size:
                    self._buffer.clear()  # what was read from the windows is still there
                elif last == leaf.size:
                    self._buffer.drop(leaf.offset)
                elif sequential:
                    self._buffer.put(leaf.offset, data)
                self._buffer.passed(leaf.offset)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _walk(self, offset: int, size: int) -> Sequence[Leaf]:
        walk = file_layout.leaves(self._file, offset, size, self._sure)
        leaves = await traversal.drive(walk, self._tree.nodes)
        if leaves:
            self._stretches.appendleft(leaves)
        return leaves

    async def _bring(self, window: Window) -> None:
        current_request.set(current_request.get().for_background())
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                leaves = await self._walk(window.start, window.size)
                leaves = [leaf for leaf in leaves if leaf.offset not in self._asked]
                if self._tree.use is not None:
                    for leaf in leaves:
                        self._tree.use(leaf.cid, ahead=True)
                await self._tree.cache.ahead(
                    self._ref, leaves, lambda leaf, data: self._buffer.put(leaf.offset, data)
                )
            except IpfsFuseError:
                pass  # a read there will raise it
            finally:
                self._scopes.discard(scope)
