"""pyfuse3's structures, filled. An EntryAttributes costs more to make than to fill: one is reused for each kind of
reply, which is safe because pyfuse3 copies it before anything else runs."""

import os

import pyfuse3

from ipfsfuse.fuse.inodes import Inode
from ipfsfuse.vfs.attributes import Attributes

FOREVER = 365 * 86400
"""Seconds the kernel may keep what a CID fixes."""
BLOCK = 1 << 20
"""st_blksize: what programs should read at a time."""


class Replies:
    """Fills replies for one mount: who mounted owns everything."""

    def __init__(self) -> None:
        self._uid, self._gid = os.getuid(), os.getgid()
        self._entry = self._fresh()
        self._listed = self._fresh()
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = pyfuse3.InodeT(0)
        self._absent.entry_timeout = FOREVER

    def _fresh(self) -> pyfuse3.EntryAttributes:
        made = pyfuse3.EntryAttributes()
        made.generation = 0
        made.st_nlink = 1
        made.st_rdev = 0
        made.st_uid, made.st_gid = self._uid, self._gid
        made.st_blksize = BLOCK
        made.entry_timeout = made.attr_timeout = FOREVER
        return made

    def entry(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """The reply to lookup and getattr."""
        return self._fill(self._entry, inode.number, inode.attributes)

    def listed(self, inode: Inode) -> pyfuse3.EntryAttributes:
        """A listing's entry whose attributes are told along."""
        self._listed.entry_timeout = FOREVER
        return self._fill(self._listed, inode.number, inode.attributes)

    def name_alone(self, number: int, mode: int) -> pyfuse3.EntryAttributes:
        """A listing's entry by name (and type, where `mode` has one): the kernel keeps no attributes of it."""
        listed = self._listed
        listed.st_ino = pyfuse3.InodeT(number)
        listed.st_mode = pyfuse3.ModeT(mode)
        listed.st_size = -1 if mode else 0
        listed.entry_timeout = listed.attr_timeout = 0
        return listed

    def absent(self) -> pyfuse3.EntryAttributes:
        """Proved absent: the kernel need not ask for this name again."""
        return self._absent

    def _fill(self, out: pyfuse3.EntryAttributes, number: int, attributes: Attributes) -> pyfuse3.EntryAttributes:
        out.st_ino = pyfuse3.InodeT(number)
        out.st_mode = pyfuse3.ModeT(attributes.mode)
        out.st_size = attributes.size
        out.st_blocks = (attributes.size + 511) >> 9
        out.st_mtime_ns = out.st_ctime_ns = out.st_atime_ns = attributes.mtime
        out.attr_timeout = FOREVER  # a size that is only claimed, too: `open` takes it back if it was wrong
        return out


def statfs(budget: int, used: int) -> pyfuse3.StatvfsData:
    """The file system's size is the budget; used is what is staged."""
    out = pyfuse3.StatvfsData()
    out.f_bsize = out.f_frsize = 4096
    out.f_blocks = budget // 4096
    out.f_bfree = out.f_bavail = max(budget - used, 0) // 4096
    out.f_files = out.f_ffree = out.f_favail = 0
    out.f_namemax = 255
    return out
