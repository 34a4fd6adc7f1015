"""Every call that would change something, and its one answer: EPERM. Whoever calls, root included."""

import errno
from typing import Never

import pyfuse3
from pyfuse3 import FileHandleT, FileNameT, InodeT, RequestContext, XAttrNameT


def _refuse() -> Never:
    raise pyfuse3.FUSEError(errno.EPERM)


class ReadOnlyOperations(pyfuse3.Operations):
    """The mutating half of the operations."""

    async def setattr(
        self, inode: InodeT, attr: object, fields: object, fh: object, ctx: RequestContext
    ) -> Never:
        _refuse()

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: int, rdev: int, ctx: RequestContext
    ) -> Never:
        _refuse()

    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: int, ctx: RequestContext) -> Never:
        _refuse()

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> Never:
        _refuse()

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> Never:
        _refuse()

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> Never:
        _refuse()

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: int,
        ctx: RequestContext,
    ) -> Never:
        _refuse()

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> Never:
        _refuse()

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: int, flags: int, ctx: RequestContext
    ) -> Never:
        _refuse()

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> Never:
        _refuse()

    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> Never:
        _refuse()

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> Never:
        _refuse()
