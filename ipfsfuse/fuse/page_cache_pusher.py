"""Stores small files into the kernel's page cache before their reader asks for them.

Only files that nobody has open. The kernel locks a page while it waits for our answer to a read of it, and a
store into that page waits for the lock. If the daemon is killed in that moment, nothing ever ends: the
waiting thread keeps the connection alive, and nobody is left to answer. So an inode has either a store under
way or open files, never both: whoever opens one calls `remove` first, and C opens none meanwhile.

Concurrency: one thread stores; everything else belongs to the event loop.
"""

import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyfuse3

from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inode

log = logging.getLogger("ipfsfuse.fuse")

MAX_WAITING = 256
"""Files that may wait for the thread. More are dropped: the kernel will ask for them."""
END_SECONDS = 5.0
"""How long the end waits for a store that is under way."""


class PageCachePusher:
    def __init__(self) -> None:
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """For the next two."""
        self._waiting: dict[int, tuple[Inode, bytes]] = {}
        self._storing: int | None = None
        self._stored: queue.SimpleQueue[Inode] = queue.SimpleQueue()
        self._busy = threading.Lock()
        """Held while the kernel takes one file's bytes."""

    def push(self, files: Iterable[tuple[Inode, bytes]]) -> None:
        """Soon gives the kernel the whole contents of inodes that nobody has open."""
        with self._lock:
            for inode, content in files:
                if len(self._waiting) < MAX_WAITING:
                    self._waiting[inode.number] = inode, content
        self._wake.put(True)

    def stored(self) -> Iterator[Inode]:
        """The inodes whose bytes the kernel has taken, each once."""
        while not self._stored.empty():
            yield self._stored.get()

    def remove(self, number: int) -> None:
        """From now on nothing is stored into inode `number`. Waits for a store under way: some 20 us, since
        no page of it is locked."""
        with self._lock:
            self._waiting.pop(number, None)
            storing = self._storing == number
        if storing:
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
            inode, content = self._waiting.pop(self._storing)
        try:
            if device.revoke_if_closed(inode.number):
                pyfuse3.notify_store(pyfuse3.InodeT(inode.number), 0, content)
                self._stored.put(inode)
        except OSError as exc:
            log.debug(
                "inode %d took no pages: %s", inode.number, exc
            )  # the kernel has forgotten it, or the mount is going
        except Exception:  # the thread must go on
            log.exception("pages for inode %d could not be stored", inode.number)
        finally:
            self._storing = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """The thread lives as long as this block, which must lie within the session. What waits at its end is
        dropped."""
        thread = threading.Thread(target=self._work, name="page-cache-pusher", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.clear()
            self._wake.put(False)
            thread.join(END_SECONDS)
