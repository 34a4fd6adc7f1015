"""The page cache as a place to put verified bytes that nobody asked for yet.

A leaf is hashed whole, so the parts of it that a read did not want, and what was fetched ahead, are stored in the
kernel at once. Concurrency: `store` is called on the event loop and never blocks; one thread does the storing, because
the kernel may make it wait for a page that some handler still has to fill.
"""

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3

from ipfsfuse.cache.base import Content

log = logging.getLogger("ipfsfuse.fuse")

MAX_QUEUED = 32 << 20
"""Bytes that may wait for the thread; what comes on top is dropped: it will be asked for instead."""


END_SECONDS = 5.0
"""How long the end waits for a store that is under way."""


class Pages:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, int, Content] | None] = queue.SimpleQueue()
        self._queued = 0
        self._inodes: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._ended = False

    def store(self, inode: int, offset: int, content: Content) -> None:
        """Hands `content` at `offset` of the file `inode` to the kernel, soon, if there is room."""
        with self._lock:
            if self._queued + len(content) > MAX_QUEUED:
                return
            self._queued += len(content)
            self._inodes[inode] += 1
        self._queue.put((inode, offset, content))

    def pending(self, inode: int) -> bool:
        """Whether something for the number `inode` still waits: nothing else may be given that number until then."""
        return inode in self._inodes

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            inode, offset, content = item
            try:
                if not self._ended:
                    pyfuse3.notify_store(pyfuse3.InodeT(inode), offset, content)  # type: ignore[arg-type]  # any buffer
            except OSError as exc:
                log.debug("inode %d took no pages: %s", inode, exc)  # the kernel forgot it, or the mount is going
            except Exception:  # the thread must go on: what waits would count for ever
                log.exception("pages for inode %d could not be stored", inode)
            with self._lock:
                self._queued -= len(content)
                self._inodes[inode] -= 1
                if not self._inodes[inode]:
                    del self._inodes[inode]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The thread lives for the length of the block, which must lie within the session's: what is queued at its end
        is dropped."""
        thread = threading.Thread(target=self._work, name="pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended = True
            self._queue.put(None)
            thread.join(END_SECONDS)
