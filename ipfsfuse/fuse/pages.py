"""The page cache as a place to put verified bytes that nobody asked for yet.

A leaf is hashed whole, so the parts of it that a read did not want, and what was fetched ahead, are stored in the
kernel at once. Concurrency: `store` is called on the event loop and never blocks; one thread does the storing, because
the kernel may make it wait for a page that some handler still has to fill.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyfuse3

from ipfsfuse.cache.base import Content

log = logging.getLogger("ipfsfuse.fuse")

MAX_QUEUED = 32 << 20
"""Bytes that may wait for the thread; what comes on top is dropped: it will be asked for instead."""


class Pages:
    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, int, Content] | None] = queue.SimpleQueue()
        self._queued = 0
        self._lock = threading.Lock()

    def store(self, inode: int, offset: int, content: Content) -> None:
        """Hands `content` at `offset` of the file `inode` to the kernel, soon, if there is room."""
        with self._lock:
            if self._queued + len(content) > MAX_QUEUED:
                return
            self._queued += len(content)
        self._queue.put((inode, offset, content))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            inode, offset, content = item
            try:
                pyfuse3.notify_store(pyfuse3.InodeT(inode), offset, content)  # type: ignore[arg-type]  # any buffer
            except OSError as exc:
                log.debug("inode %d took no pages: %s", inode, exc)  # the kernel forgot it, or the mount is going
            with self._lock:
                self._queued -= len(content)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["Pages"]:
        """The thread lives for the length of the block; what is queued at its end is dropped."""
        pages = cls()
        thread = threading.Thread(target=pages._work, name="pages", daemon=True)
        thread.start()
        try:
            yield pages
        finally:
            pages._queue.put(None)
