"""The handlers of pyfuse3. They only translate: the layers below decide what to answer, and `errnos` chooses
the errno.

Concurrency: pyfuse3 runs each call as a task of its own; any number of them may wait. The inode table is used
only between two awaits.
"""

import errno
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Never

import pyfuse3
import trio
from pyfuse3 import (
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    XAttrNameT,
)

from ipfsfuse import errors
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fuse import device, replies
from ipfsfuse.fuse.errnos import fuse_error, translated
from ipfsfuse.fuse.inodes import ROOT_INODE, Inode, Inodes
from ipfsfuse.fuse.open_directories import OpenDirectories
from ipfsfuse.fuse.open_files import OpenFiles, Passthrough
from ipfsfuse.sources.base import Caller, Request, current_request
from ipfsfuse.structures import Buffer, Histogram
from ipfsfuse.vfs.tree import Attributes, Roots, Tree

log = logging.getLogger("ipfsfuse.fuse")

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_CREAT
NAME_MAX = 255
ANSWER_GRACE_SECONDS = 0.5
"""Seconds after its deadline at which a call is answered in any case. Usually the wait for a block fails
before that, with a message that names the block."""
LEAST = 0.5
"""The least seconds that a call has, even if its request has waited long for us. The cache answers within
them."""
SPREAD, APART = 2.0, 0.0004
"""Seconds. Calls that wait at the same time end APART seconds from each other, up to SPREAD seconds (at most
a quarter of the deadline) before their deadlines. If thousands ended at the same moment, they would block the
event loop for a second."""


class Operations(pyfuse3.Operations):
    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(
        self,
        tree: Tree,
        roots: Roots,
        inodes: Inodes,
        budget: Callable[[], int],
        deadline: float,
        push: bool = True,
        owner: tuple[int | None, int | None] = (None, None),
        umask: int = 0,
        passthrough: Passthrough | None = None,
    ) -> None:
        """`deadline`: the seconds in which each call is answered. Without `push`, the kernel gets nothing
        that it did not ask for, so that a recording mount sees every read."""
        super().__init__()
        self._deadline = deadline
        self._tree, self._roots, self.inodes, self._budget = tree, roots, inodes, budget
        self._replies = replies.Replies(owner, umask)
        self.files = OpenFiles(tree, inodes, push, passthrough)
        self.directories = OpenDirectories(roots, tree, inodes, self._replies, push)
        self._calls: dict[int, trio.CancelScope] = {}
        """The calls that wait, by the kernel's request number."""
        self.latencies: defaultdict[str, Histogram] = defaultdict(Histogram)
        """Latencies of the calls that Python answers, by name."""
        self.bytes: defaultdict[str, int] = defaultdict(int)
        """Bytes that those calls returned, by name."""

    @contextmanager
    def _call(self, caller: Caller, what: str, about: object = "") -> Iterator[None]:
        """Wraps a call of the user `caller`. Ends it soon after its deadline, or when the caller gets a
        signal. Use it before the first await of the handler. `what` and `about` (the node or handle) are for
        the log.

        The deadline is counted from when the request was read. Turns any error into FUSEError (`errnos`)."""
        number, waited = device.REQUEST_NUMBER.value, device.NANOSECONDS_WAITED.value * 1e-9
        began = trio.current_time()
        early = len(self._calls) * APART % min(SPREAD, self._deadline / 4)
        request = Request(caller, began + max(self._deadline - waited - early, LEAST))
        token = current_request.set(request)
        outcome = "failed"
        try:
            with trio.CancelScope(deadline=request.deadline + ANSWER_GRACE_SECONDS) as scope:
                self._calls[number] = scope
                try:
                    yield
                    outcome = "answered"
                finally:
                    del self._calls[number]
            if scope.cancelled_caught:
                if trio.current_time() < scope.deadline:
                    outcome = "interrupted"
                    raise errors.Interrupted("the caller was interrupted")
                raise errors.Unavailable(f"not answered within {self._deadline:g} s")
        except Exception as exc:
            raise fuse_error(exc) from exc
        finally:
            current_request.reset(token)
            seconds = trio.current_time() - began
            self.latencies[what].add(seconds)
            if log.isEnabledFor(logging.DEBUG):
                line = "request %d: %s %s of user %s: %s in %.1f ms, after %.1f ms in the queue"
                log.debug(line, request.number, what, about, caller, outcome, seconds * 1e3, waited * 1e3)

    def interrupt(self, number: int) -> None:
        """The caller of the request `number` got a signal."""
        if number in self._calls:
            self._calls[number].cancel()

    # -- names -----------------------------------------------------------------------------------------------

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        with self._call(ctx.uid, "lookup", name):
            if len(name) > NAME_MAX:
                raise errors.NameTooLong(f"a name of {len(name)} bytes")
            try:
                cid = (
                    self._roots.parse(name)
                    if parent_inode == ROOT_INODE
                    else (await self._tree.child(self.inodes.get(parent_inode).cid, name)).cid
                )
            except errors.NotFound:
                return self._replies.absent()
            found = self._tree.known(cid)
            if found is None:
                found = await self._tree.attributes(cid)
            if parent_inode == ROOT_INODE:
                self._roots.note(cid, name)
            inode = self._inode(parent_inode, name, cid, found)
            try:
                reply = self._replies.entry(inode)
                self.files.looked_up(inode)
                self.inodes.refer(inode)  # from here on nothing fails
                return reply
            finally:
                self.inodes.drop_unused(inode)

    def _inode(self, parent: int, name: bytes, cid: Cid, found: Attributes) -> Inode:
        if found.is_directory:
            return self.inodes.directory(parent, name, cid, found)
        return self.inodes.file(cid, found)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        self.files.drain()
        for number, count in inode_list:
            self.files.forget(number, count)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        with translated:
            held = self.inodes.get(inode)
            if not held.attributes.exact:
                held.attributes = self._tree.known(held.cid) or held.attributes
            return self._replies.entry(held)

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        with self._call(ctx.uid, "readlink", inode):
            return FileNameT(await self._tree.readlink(self.inodes.get(inode).cid))

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """No user may write. A file may be executed only if its stored mode says so."""
        with translated:
            held = self.inodes.get(inode).attributes
        return not mode & os.W_OK and not (mode & os.X_OK and not held.mode & 0o111 and not held.is_directory)

    # -- files -----------------------------------------------------------------------------------------------

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        with self._call(ctx.uid, "open", inode):
            if flags & _WRITING:
                raise errors.ReadOnly("open for writing")
            handle = await self.files.open(self.inodes.get(inode), ctx.uid)
            return FileInfo(fh=FileHandleT(handle), keep_cache=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:  # type: ignore[override]  # pyfuse3 takes any buffer, its annotation only bytes
        handle = self.files.handles.get(fh)
        with self._call(handle.opener if handle else None, "read", (fh, off, size)):
            if handle is None:
                handle = await self.files.take_over(fh)
            content = await handle.file.read(off, size)
            self.bytes["read"] += len(content)
            return content

    async def flush(self, fh: FileHandleT) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)  # the kernel never asks again, which saves a request per close

    async def release(self, fh: FileHandleT) -> None:
        with translated:
            self.files.release(fh)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        return None

    # -- directories -----------------------------------------------------------------------------------------

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        with self._call(ctx.uid, "opendir", inode):
            self.files.drain()
            return FileHandleT(self.directories.open(inode, ctx.uid))

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        with self._call(self.directories.opener(fh), "readdir", (fh, start_id)):
            listed = await self.directories.read(fh, start_id, token)
            if listed is not None:
                self.files.listed(listed)

    async def releasedir(self, fh: FileHandleT) -> None:
        self.directories.release(fh)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        return None

    # -- calls that would change something -------------------------------------------------------------------

    async def _refuse(self, *_arguments: Any, **_options: Any) -> Never:
        """Raises EPERM, for root too."""
        raise pyfuse3.FUSEError(errno.EPERM)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = create = write = _refuse
    setxattr = removexattr = _refuse

    # -- the rest --------------------------------------------------------------------------------------------

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        with translated:
            return replies.statfs(self._budget(), self._tree.cache.used())

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        with translated:
            return replies.xattr(name, self.inodes.get(inode).cid, self._tree.cache.item_of)

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[XAttrNameT]:
        return [XAttrNameT(name) for name in replies.xattr_names()] if inode != ROOT_INODE else []
