"""Open files, and the state of a file in the kernel between the reply that names it and its FORGET:

    named -> offered to the C thread -> stored in the page cache and open -> released -> forgotten

The content of a small file is offered to the C thread before a program opens it (`device.offer`). That thread
then stores it in the kernel's page cache and answers the open without Python, and `drain` tells Python later.
Each step must undo the step before it, so one class has them all.

Concurrency: on the event loop; between two awaits the tables are consistent.
"""

import errno
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import pyfuse3
import trio
from pyfuse3 import InodeT

from ipfsfuse.cache.passthrough import PassthroughFiles
from ipfsfuse.cache.store.staging import StagingEntry
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File
from ipfsfuse.errors import MountFailed
from ipfsfuse.fileio.files import Closing
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inode, Inodes
from ipfsfuse.sources.base import Caller, request_of
from ipfsfuse.vfs.open_file import BufferBudget, OpenFile
from ipfsfuse.vfs.tree import Attributes, Tree, attributes_of

OFFERED = 64 << 10
"""Bytes of a file's beginning that are offered when its name is looked up: it is probably opened next."""
DRAIN_SECONDS = 1.0
"""The longest time until the cache and the pins are told of an open in C, while the event loop runs."""


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
    handle. The thread counts later ones itself."""
    in_one_block: bool = True


class OpenFiles:
    def __init__(
        self, tree: Tree, inodes: Inodes, push: bool, passthrough: Passthrough | None = None
    ) -> None:
        """Without `push`, no content is offered to the C thread, and Python answers every open and read."""
        self._tree, self._inodes, self._push, self._passthrough = tree, inodes, push, passthrough
        self._buffer_budget = BufferBudget()
        self.handles: dict[int, Handle] = {}
        """The handles that Python answers for."""
        self._last_handle = 0
        if push:
            tree.cache.when_blocks_leave(device.revoke_idle)

    async def run(self) -> None:
        """Drains every DRAIN_SECONDS, until it is cancelled."""
        while True:
            await trio.sleep(DRAIN_SECONDS)
            self.drain()

    # -- what the kernel asks --------------------------------------------------------------------------------

    async def open(self, inode: Inode, opener: Caller) -> int:
        """A handle for reading `inode`, for the user `opener`. Raises what the walk of its blocks raises."""
        inode.opens += 1  # from here on nothing is offered for it
        device.withdraw(inode.number)
        try:
            self.drain()  # first, so that earlier opens count as earlier uses
            file = self._tree.file_at_hand(inode.cid) or await self._tree.file(inode.cid)
        except BaseException:
            inode.opens -= 1
            raise
        self._correct(inode, attributes_of(file))
        in_one_block = file.inline == file.size  # the C thread may open it
        if self._passthrough is not None and not in_one_block:
            handle = self._passthrough.open(inode)
            if handle is not None:
                self._tree.used(inode.cid, file.size)
                return handle
        if self._push:
            self._offer(self._tree.following(inode.cid))
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
            opened = self._open_file(file, handle, inode)
            opens = device.revoke(number)
            inode.opens += opens
            self.handles[handle] = Handle(opened, inode, opens=opens)
        return self.handles[handle]

    def release(self, handle: int) -> None:
        if self._passthrough is not None and (inode := self._passthrough.release(handle)) is not None:
            inode.opens -= 1
            return
        found = self.handles.get(handle)
        if found is None and device.inode_of(handle) is not None:
            device.release(handle)
            return
        if found is None:
            raise KeyError(f"a release of handle {handle}, which is not open")
        found.inode.opens -= 1
        found.opens -= 1
        if not found.opens:
            del self.handles[handle]
            found.inode.cached_opens -= not found.in_one_block
            found.file.close()

    def forget(self, number: int, count: int) -> None:
        """The kernel returns `count` references to an inode. After the last one, removes everything about
        it. Drain first: an open of an inode that is not known any more is not counted."""
        if self._inodes.forget(number, count) is not None:
            device.revoke(number)

    # -- contents for the kernel -----------------------------------------------------------------------------

    def drain(self) -> None:
        """Tells the cache and the prefetcher what the C thread has opened."""
        if not self._push:
            return
        last = None
        for number, user in device.drain():
            inode = self._inodes.known(number)
            if inode is None:
                continue
            with request_of(user):
                if inode.attributes.is_directory:
                    self._tree.note_use(inode.cid)
                else:
                    last = inode
                    self._tree.used(inode.cid, inode.attributes.size)
        if last is not None:
            self._offer(self._tree.following(last.cid))

    def looked_up(self, inode: Inode) -> None:
        """The kernel gets the attributes of `inode` in a reply. If they came from the content of a raw file,
        which has just arrived, offers the beginning of the content."""
        if self._push and inode.attributes.exact and not inode.opens and cids.codec(inode.cid) == cids.RAW:
            content = self._tree.cache.arrived(inode.cid)
            if content is not None:
                device.offer(inode.number, bytes(content[:OFFERED]))

    def listed(self, directory: Cid) -> None:
        """The kernel has the listing of `directory`: offers the contents of its first files."""
        if self._push:
            self._offer(self._tree.first(directory))

    def _offer(self, files: Iterable[Cid]) -> None:
        """Offers the contents of those of `files` that have arrived. The kernel then does not ask for their
        bytes, nor for their access times after a read."""
        for cid in files:
            inode = self._inodes.find(cid)
            if inode is None or inode.opens or (content := self._tree.small_files.take(cid)) is None:
                continue
            true = self._tree.known(cid)
            if true is not None and true.size == inode.attributes.size:
                inode.attributes = true
                device.offer(inode.number, content)
