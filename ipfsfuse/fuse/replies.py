"""Fills pyfuse3's structures: attributes, entries, statfs, extended attributes."""

import errno
import os
from collections.abc import Callable

import pyfuse3

from ipfsfuse.cache.base import CacheItem
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fuse.device import NAME_ONLY
from ipfsfuse.fuse.inodes import Inode

FOREVER = 365 * 86400
"""Seconds for which the kernel may cache what can't change."""
BLOCK = 1 << 20
"""st_blksize: how much programs should read at a time."""

MIN_NANOSECONDS, MAX_NANOSECONDS = -(1 << 63), (1 << 63) - 1
"""pyfuse3 stores times as signed 64-bit nanoseconds since 1970: from the year 1677 to 2262."""


class Replies:
    """Fills replies for one mount.

    Making an EntryAttributes costs more than filling it, so one is reused for each kind of reply. That is
    safe because pyfuse3 copies it before other code runs."""

    def __init__(self, owner: tuple[int | None, int | None] = (None, None), umask: int = 0) -> None:
        """`owner`: the user and group of everything; None for those of this process. `umask`: permission bits
        that are removed from every mode."""
        uid, gid = owner
        self._uid, self._gid = os.getuid() if uid is None else uid, os.getgid() if gid is None else gid
        self._mask = ~(umask & 0o777)
        self._entry = self._fresh()
        self._name_only = self._fresh()
        self._name_only.generation = NAME_ONLY
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
        """A node id with its attributes: the reply to lookup and getattr, or an entry of a listing with
        attributes."""
        out, shown = self._entry, inode.attributes
        out.st_ino = pyfuse3.InodeT(inode.number)
        out.st_mode = pyfuse3.ModeT(shown.mode & self._mask)
        out.st_size = shown.size
        out.st_blocks = (shown.size + 511) >> 9
        out.st_mtime_ns = out.st_ctime_ns = out.st_atime_ns = min(
            max(shown.mtime, MIN_NANOSECONDS), MAX_NANOSECONDS
        )
        return out

    def name_only(self, number: int, mode: int) -> pyfuse3.EntryAttributes:
        """An entry of a listing without a node id. The kernel takes the name, the type in `mode` (0 if it is
        not known) and the `number` to show, and counts no reference."""
        out = self._name_only
        out.st_ino = pyfuse3.InodeT(number)
        out.st_mode = pyfuse3.ModeT(mode)
        return out

    def absent(self) -> pyfuse3.EntryAttributes:
        """The reply for a name that is proved absent. The kernel need not ask for it again."""
        return self._absent


def statfs(budget: int, used: int) -> pyfuse3.StatvfsData:
    """The file system's size is the budget; used is what is staged."""
    out = pyfuse3.StatvfsData()
    out.f_bsize = out.f_frsize = 4096
    out.f_blocks = budget // 4096
    out.f_bfree = out.f_bavail = max(budget - used, 0) // 4096
    out.f_files = out.f_ffree = out.f_favail = 0
    out.f_namemax = 255
    return out


# -- extended attributes -------------------------------------------------------------------------------------

Find = Callable[[Cid], CacheItem | None]

_XATTRS: dict[bytes, Callable[[Cid, Find], str]] = {
    b"ipfs.cid": lambda cid, _find: cids.text(cid),
    b"ipfsfuse.staged": lambda cid, find: str(kept.staged if (kept := find(cid)) else 0),
    b"ipfsfuse.pinned": lambda cid, find: (kept.pinned if (kept := find(cid)) else "") or "no",
    b"ipfsfuse.source": lambda cid, find: kept.source if (kept := find(cid)) else "",
}


def xattr_names() -> list[bytes]:
    return list(_XATTRS)


def xattr(name: bytes, cid: Cid, find: Find) -> bytes:
    """The value of the attribute `name`. Raises FUSEError: ENODATA if there is no such attribute (the mount's
    root, whose CID is empty, has none); ENOTSUP for namespaces without any, so that `ls -l` asks for access
    lists once and not for each file."""
    if not cid or name not in _XATTRS:
        raise pyfuse3.FUSEError(
            errno.ENOTSUP if name.startswith((b"system.", b"security.")) else pyfuse3.ENOATTR
        )
    return _XATTRS[name](cid, find).encode()
