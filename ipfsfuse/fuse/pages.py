"""The page cache as a place to put small files whose reader is on its way.

Only those that nobody has open: the kernel locks a page while it waits for our answer to a read, a store into that page
waits for the lock, and where the daemon is killed in that moment nothing ever ends (the thread that waits keeps the
connection alive, and who should answer is gone). So an inode has either a store under way or open files, never both: who
opens one calls `withdraw` first, and the porter lets nobody in meanwhile. Concurrency: one thread does the storing, all
else is the event loop's.
"""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyfuse3

from ipfsfuse.fuse import porter

log = logging.getLogger("ipfsfuse.fuse")

MAX_WAITING = 256
"""Files that may wait for the thread; what comes on top is dropped: it will be asked for instead."""
END_SECONDS = 5.0
"""How long the end waits for a store that is under way."""


class Pages:
    def __init__(self) -> None:
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """For what follows."""
        self._waiting: dict[int, bytes] = {}
        self._storing: int | None = None
        self._stored: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._busy = threading.Lock()
        """Held while the kernel takes one file's bytes."""

    def give(self, files: Iterable[tuple[int, bytes]]) -> None:
        """Hands the whole contents of inodes that nobody has open to the kernel, soon."""
        with self._lock:
            for inode, content in files:
                if len(self._waiting) < MAX_WAITING:
                    self._waiting[inode] = content
        self._wake.put(True)

    def pending(self, inode: int) -> bool:
        """Whether something for the number `inode` still waits: nothing else may be given that number until then."""
        return inode in self._waiting or self._storing == inode

    def stored(self) -> Iterator[int]:
        """The inodes that took their bytes, each once."""
        while not self._stored.empty():
            yield self._stored.get()

    def withdraw(self, inode: int) -> None:
        """From now on nothing is stored into `inode`. Waits for a store under way: some 20 us, for no page is locked."""
        with self._lock:
            self._waiting.pop(inode, None)
            stored = self._storing == inode
        if stored:
            with self._busy:
                pass

    def _work(self) -> None:
        while self._wake.get():
            while self._waiting:
                with self._busy:
                    self._store_next()

    def _store_next(self) -> None:
        with self._lock:
            self._storing = next(iter(self._waiting), None)
            if self._storing is None:
                return
            content = self._waiting.pop(self._storing)
        try:
            if porter.closed(self._storing):
                pyfuse3.notify_store(pyfuse3.InodeT(self._storing), 0, content)
                self._stored.put(self._storing)
        except OSError as exc:
            log.debug("inode %d took no pages: %s", self._storing, exc)  # the kernel forgot it, or the mount is going
        except Exception:  # the thread must go on
            log.exception("pages for inode %d could not be stored", self._storing)
        finally:
            self._storing = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The thread lives for the length of the block, which must lie within the session's: what waits at its end is
        dropped."""
        thread = threading.Thread(target=self._work, name="pages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.clear()
            self._wake.put(False)
            thread.join(END_SECONDS)
