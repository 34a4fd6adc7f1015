"""Open files, and the state of a file in the kernel between the listing that names it and its FORGET:

    listed -> pushed into the page cache -> allowed to be opened in C -> open -> released -> forgotten

A small file's bytes are pushed to the kernel before a program reads it (`PageCachePusher`). The C thread then
answers its open without Python (`device`), and `drain` tells Python later. Each step must undo the step
before it, so one class has them all.

Concurrency: on the event loop; between two awaits the tables are consistent.
"""

import errno
import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import pyfuse3
import trio
from pyfuse3 import InodeT

from ipfsfuse.cache.passthrough import PassthroughFiles
from ipfsfuse.cache.store.staging import StagingEntry
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File
from ipfsfuse.errors import MountFailed
from ipfsfuse.fileio.files import Closing
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inode, Inodes
from ipfsfuse.sources.base import Caller
from ipfsfuse.vfs.open_file import BufferBudget, OpenFile
from ipfsfuse.vfs.tree import Attributes, Tree, attributes_of

log = logging.getLogger("ipfsfuse.fuse")

MAX_WAITING = 256
"""Files that may wait for the thread. Further ones are dropped: the kernel will read them."""
STORE_END_SECONDS = 5.0
"""How long to wait at the end for a store that is under way."""
DRAIN_SECONDS = 1.0
"""The longest time until the cache and the pins are told of an open in C."""


# -- passthrough: files whose staging files the kernel reads itself -----------------------------------------

# The kernel's rules (fs/fuse/iomode.c, Linux 6.9 and later): either all open files of an inode are passed
# through, with one backing id, or none is. Any other reply makes the open fail with EIO. So an inode with a
# cached open stays cached until its last release. The kernel counts an open before we see the next request
# for that inode, and stops counting it before it sends the RELEASE. So our counts are never lower than the
# kernel's.


@dataclass(slots=True)
class _Backing:
    """The backing file with which an inode is open."""

    inode: Inode
    entry: StagingEntry
    backing: int
    opens: int = 0


class Passthrough:
    def __init__(self, files: PassthroughFiles) -> None:
        self._files = files
        self._by_inode: dict[int, _Backing] = {}
        self._by_handle: dict[int, _Backing] = {}

    def check(self, agreed: bool) -> None:
        """Raises MountFailed, which says what to do, unless passthrough works here. `agreed`: whether the
        kernel agreed to it in INIT."""
        if not agreed:
            raise MountFailed(
                "--passthrough: this kernel has no FUSE passthrough: Linux 6.9 or newer is needed"
            )
        try:
            file = self._files.check_place()
        except OSError as exc:
            raise MountFailed(
                f"--passthrough: the cache folder's file system can't be used for it ({exc.strerror}): use "
                "a cache folder on a local disk"
            ) from exc
        with Closing(file):
            try:
                device.close_backing(device.open_backing(file))
            except OSError as exc:
                raise MountFailed(f"--passthrough: {_why(exc)}") from exc

    def open(self, inode: Inode) -> int | None:
        """A handle with which the kernel reads the file itself; None if it must be read through the daemon.
        There must be no await between this and the reply."""
        found = self._by_inode.get(inode.number)
        if found is None:
            found = None if inode.cached_opens else self._open(inode)
            if found is None:
                return None
        found.opens += 1
        return device.passthrough_handle(found.backing)

    def _open(self, inode: Inode) -> _Backing | None:
        opened = self._files.open(inode.cid)
        if opened is None:
            self._files.consider(inode.cid)
            return None
        entry, file = opened
        try:
            backing = device.open_backing(file)
        except OSError:
            self._files.close(entry)
            return None
        found = self._by_inode[inode.number] = _Backing(inode, entry, backing)
        self._by_handle[device.passthrough_handle(backing)] = found
        return found

    def release(self, handle: int) -> Inode | None:
        """Counts a release. Returns the inode of a handle that `open` returned; None for other handles."""
        found = self._by_handle.get(handle)
        if found is None:
            return None
        found.opens -= 1
        if not found.opens:
            del self._by_inode[found.inode.number], self._by_handle[handle]
            device.close_backing(found.backing)
            self._files.close(found.entry)
        return found.inode


def _why(exc: OSError) -> str:
    if exc.errno == errno.EPERM:
        return "only root (CAP_SYS_ADMIN) may let the kernel read files itself: run it as root, or without"
    if exc.errno == errno.ELOOP:
        return "the cache folder lies on an overlay: use a cache folder on a local disk"
    return f"the kernel can't read the cache folder's files itself: {exc.strerror}"


# -- open files ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Handle:
    """A file handle that Python answers for."""

    file: OpenFile
    inode: Inode
    opener: Caller = None
    """The user who opened it, which a read request does not contain; None if the C thread opened it."""
    opens: int = 1
    """More than one only for a handle that the C thread gave: all opens of an inode there have the same
    handle."""
    in_one_block: bool = True


class OpenFiles:
    def __init__(
        self, tree: Tree, inodes: Inodes, push: bool, passthrough: Passthrough | None = None
    ) -> None:
        """Without `push`, no data is pushed to the kernel, and Python answers every open and read."""
        self._tree, self._inodes, self._push, self._passthrough = tree, inodes, push, passthrough
        self._buffer_budget = BufferBudget()
        self._pusher = PageCachePusher()
        self.handles: dict[int, Handle] = {}
        """The handles that Python answers for."""
        self._last_handle = 0
        if push:
            tree.cache.when_blocks_leave(device.revoke_idle)

    def pushing(self) -> AbstractContextManager[None]:
        """A context manager in which small files are pushed into the page cache. It must lie within the
        session."""
        return self._pusher.running() if self._push else nullcontext()

    async def run(self) -> None:
        """Drains every DRAIN_SECONDS, until it is cancelled."""
        while True:
            await trio.sleep(DRAIN_SECONDS)
            self.drain()

    # -- what the kernel asks --------------------------------------------------------------------------------

    async def open(self, inode: Inode, opener: Caller) -> int:
        """A handle for reading `inode`, for the user `opener`. Raises what the walk of its blocks raises."""
        self.drain()  # first, so that earlier opens count as earlier uses
        self._pusher.remove(inode.number)
        inode.opens += 1
        try:
            file = self._tree.file_at_hand(inode.cid) or await self._tree.file(inode.cid)
        except BaseException:
            inode.opens -= 1
            raise
        self._correct(inode, attributes_of(file))
        in_one_block = file.inline == file.size  # the C thread may open it, and its pages may be pushed
        if self._passthrough is not None and not in_one_block:
            handle = self._passthrough.open(inode)
            if handle is not None:
                self._tree.used(inode.cid, file.size)
                return handle
        if self._push:
            self._push_following(inode.cid)
            if in_one_block:
                device.allow(inode.number)
        self._last_handle += 1
        inode.cached_opens += not in_one_block
        self.handles[self._last_handle] = Handle(
            self._open_file(file, self._last_handle, inode), inode, opener, in_one_block=in_one_block
        )
        return self._last_handle

    def _open_file(self, file: File, handle: int, inode: Inode) -> OpenFile:
        windows = device.ReadWindows(handle, inode.number, inode.cid) if self._push else None
        return OpenFile(self._tree, file, self._buffer_budget, windows)

    def _correct(self, inode: Inode, true: Attributes) -> None:
        """If a link has claimed a wrong size, makes the kernel ask for the attributes again before it
        reads."""
        lied = inode.attributes.size != true.size
        inode.attributes = true
        if lied:
            with suppress(OSError):  # the kernel has forgotten it already
                pyfuse3.invalidate_inode(InodeT(inode.number), attr_only=True)

    async def take_over(self, handle: int) -> Handle:
        """Makes a handle of a file that the C thread opened. It is read because the kernel has dropped its
        pages."""
        number = device.inode_of(handle)
        if number is None:
            raise KeyError(f"a read of handle {handle}, which is not open")
        inode = self._inodes.get(number)
        file = await self._tree.file(inode.cid)
        if handle not in self.handles:  # unless another read has made it meanwhile
            # `remove` comes before `revoke`: while the C thread counts the file as open, nothing is stored
            # into it. The kernel waits for our reply with a page locked, and a store would wait for that
            # page.
            self._pusher.remove(number)
            opens = device.revoke(number)
            inode.opens += opens
            self.handles[handle] = Handle(self._open_file(file, handle, inode), inode, opens=opens)
        return self.handles[handle]

    def release(self, handle: int) -> None:
        if self._passthrough is not None and (inode := self._passthrough.release(handle)) is not None:
            inode.opens -= 1
            return
        found = self.handles.get(handle)
        if found is None and device.inode_of(handle) is not None:
            return  # the C thread has counted the release, but could not answer it
        if found is None:
            raise KeyError(f"a release of handle {handle}, which is not open")
        found.inode.opens -= 1
        found.opens -= 1
        if found.opens < 1:  # the C thread may have counted a release that it could not answer
            del self.handles[handle]
            found.inode.cached_opens -= not found.in_one_block
            found.file.close()

    def forget(self, number: int, count: int) -> None:
        """The kernel returns `count` references to an inode. After the last one, removes everything about
        it."""
        if self._inodes.forget(number, count) is not None:
            self._pusher.remove(number)
            device.revoke(number)

    # -- data pushed to the kernel ---------------------------------------------------------------------------

    def drain(self) -> None:
        """Tells the cache and the prefetcher what the C thread has opened."""
        if not self._push:
            return
        last = None
        for number in device.drain():
            inode = self._inodes.known(number)
            if inode is None:
                continue
            if inode.attributes.is_directory:
                self._tree.note_use(inode.cid)
            else:
                last = inode
                self._tree.used(inode.cid, inode.attributes.size)
        if last is not None:
            self._push_following(last.cid)

    def _push_following(self, cid: Cid) -> None:
        """Pushes the small files that come next in the directory of `cid`. The kernel then does not ask for
        their bytes, nor for their access times after a read."""
        given = []
        for following, content in self._tree.coming(cid):
            inode, true = self._inodes.find(following), self._tree.known(following)
            if inode and true and not inode.opens and inode.attributes.size == true.size:
                inode.attributes = true
                given.append((inode.number, content))
        if given:
            self._pusher.push(given)


class PageCachePusher:
    """Stores small files into the kernel's page cache before programs read them.

    Only files that are not open are stored. The kernel locks a page while it waits for our reply to a read of
    it, and a store into that page waits for the lock. If the daemon is killed at that moment, both wait
    forever: the storing thread keeps the connection alive, and no process is left to reply. So an inode has
    either a store under way or open files, never both. `remove` must be called before a file is opened, and
    the C thread does not open a file while it is stored. After that it may.

    One thread stores; everything else runs on the event loop."""

    def __init__(self) -> None:
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Protects `_waiting` and `_storing`."""
        self._waiting: dict[int, bytes] = {}
        """Contents by inode number."""
        self._storing: int | None = None
        self._busy = threading.Lock()
        """Held while one file is stored."""

    def push(self, files: Iterable[tuple[int, bytes]]) -> None:
        """Queues files (inode number, whole content) that are not open to be stored."""
        with self._lock:
            for number, content in files:
                if len(self._waiting) < MAX_WAITING:
                    self._waiting[number] = content
        self._wake.put(True)

    def remove(self, number: int) -> None:
        """Ensures that nothing is stored into inode `number`. Waits for a store under way, about 20 us,
        because no page of it is locked."""
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
            number = self._storing = next(iter(self._waiting), None)
            if number is None:
                return
            content = self._waiting.pop(number)
        try:
            if device.revoke_if_closed(number):
                pyfuse3.notify_store(InodeT(number), 0, content)
                device.allow(number)
        except OSError as exc:  # the kernel has forgotten it, or the mount is going
            log.debug("inode %d took no pages: %s", number, exc)
        except Exception:  # the thread must go on
            log.exception("pages for inode %d could not be stored", number)
        finally:
            self._storing = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the thread while the block runs, which must lie within the session. Drops what is queued at
        the end."""
        thread = threading.Thread(target=self._work, name="page-cache-pusher", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.clear()
            self._wake.put(False)
            thread.join(STORE_END_SECONDS)
