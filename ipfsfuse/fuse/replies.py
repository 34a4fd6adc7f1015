"""pyfuse3's structures, filled: attributes, statfs, extended attributes, and the entries of an open
directory, which are given to the kernel a buffer at a time.

An entry's offset is its place plus two, for "." and "..", so that any reader resumes exactly. An entry whose
attributes are known carries them, and is a reference for the kernel to count; of any other, and where the
table of inodes is full, the kernel is given the name alone, and the type where that is known.

Concurrency: the kernel asks for one buffer of a handle at a time.
"""

import errno
import os
from collections.abc import Callable, Sequence

import pyfuse3
import trio
from pyfuse3 import FileNameT, ReaddirToken, readdir_reply

from ipfsfuse.cache.base import CacheItem
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.directory_pages import Entry
from ipfsfuse.fuse.device import NAME_ONLY
from ipfsfuse.fuse.inodes import ROOT, Inode, Inodes
from ipfsfuse.vfs.tree import Listed, Roots, Tree, name_of

FOREVER = 365 * 86400
"""Seconds for which the kernel may keep what a CID fixes."""
BLOCK = 1 << 20
"""st_blksize: how much programs should read at a time."""

MIN_TIME, MAX_TIME = -(1 << 63), (1 << 63) - 1
"""pyfuse3 holds times as signed 64-bit nanoseconds since 1970: from the year 1677 to 2262."""


class Replies:
    """Fills replies for one mount.

    It costs more to make an EntryAttributes than to fill it, so one is reused for each kind of reply. That is
    safe because pyfuse3 copies it before anything else runs."""

    def __init__(self, owner: tuple[int | None, int | None] = (None, None), umask: int = 0) -> None:
        """`owner`: the user and group that everything is shown with; None for those who mount. `umask`:
        permission bits that nothing is shown with."""
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
        """A node id with its attributes: the reply to lookup and getattr, and a whole entry of a listing."""
        out, shown = self._entry, inode.attributes
        out.st_ino = pyfuse3.InodeT(inode.number)
        out.st_mode = pyfuse3.ModeT(shown.mode & self._mask)
        out.st_size = shown.size
        out.st_blocks = (shown.size + 511) >> 9
        out.st_mtime_ns = out.st_ctime_ns = out.st_atime_ns = min(max(shown.mtime, MIN_TIME), MAX_TIME)
        return out

    def name_only(self, number: int, mode: int) -> pyfuse3.EntryAttributes:
        """An entry of a listing without a node id: the kernel takes the name, the type in `mode` (0 if it is
        not known) and the `number` to show, and counts no reference."""
        out = self._name_only
        out.st_ino = pyfuse3.InodeT(number)
        out.st_mode = pyfuse3.ModeT(mode)
        return out

    def absent(self) -> pyfuse3.EntryAttributes:
        """Proved absent: the kernel need not ask for this name again."""
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
    """The value of `name`. Raises FUSEError: ENODATA for an attribute that is not there (the mount's root,
    whose CID is empty, has none), ENOTSUP for namespaces that are not kept at all, so that `ls -l` asks for
    access lists once and not for each file."""
    if not cid or name not in _XATTRS:
        raise pyfuse3.FUSEError(
            errno.ENOTSUP if name.startswith((b"system.", b"security.")) else pyfuse3.ENOATTR
        )
    return _XATTRS[name](cid, find).encode()


# -- listings ------------------------------------------------------------------------------------------------

_DIRECTORY = 0o040000
DOTS = 2
NAME_MAX = 255
ENTRIES_AT_A_TIME = 500
"""Entries that are put into a reply before other requests get their turn: about 10 ms."""
ROOTS_AT_A_TIME = 128
"""Entries of the root that are made at a time: a reply holds some hundred at most."""


class _Reply:
    """One buffer that is being filled with entries of the directory `directory`."""

    def __init__(
        self, directory: Inode, tree: Tree, inodes: Inodes, replies: Replies, token: ReaddirToken
    ) -> None:
        self._directory, self._tree, self._inodes, self._replies, self._token = (
            directory,
            tree,
            inodes,
            replies,
            token,
        )
        self._referred: list[Inode] = []
        self.entries = 0
        """How many are in it, "." and ".." not counted."""

    def dots(self, start: int) -> bool:
        """Puts in those of "." and ".." that stand behind `start`. False if the buffer is full."""
        for place, (name, number) in enumerate(
            ((b".", self._directory.number), (b"..", self._directory.parent)), 1
        ):
            if start < place and not self._name_only(name, number, _DIRECTORY, place):
                return False
        return True

    def _name_only(self, name: bytes, number: int, mode: int, place: int) -> bool:
        return readdir_reply(self._token, FileNameT(name), self._replies.name_only(number, mode), place)

    async def fill(self, entries: Sequence[Entry], first: int) -> int:
        """Puts in `entries` from index `first` on. Returns the index of the first that found no room."""
        for index in range(first, len(entries)):
            if not self._add(entries[index]):
                return index
            self.entries += 1
            if not self.entries % ENTRIES_AT_A_TIME:
                await trio.lowlevel.checkpoint()
        return len(entries)

    def _add(self, entry: Entry) -> bool:
        place = entry.place + DOTS
        inode = self._inode(entry)
        if inode is None:
            return self._name_only(
                entry.name, self._inodes.likely(self._directory.number, entry.name, entry.cid), 0, place
            )
        fitted = False
        try:
            fitted = readdir_reply(self._token, FileNameT(entry.name), self._replies.entry(inode), place)
        finally:
            if fitted:
                self._inodes.refer(inode)
                self._referred.append(inode)
            else:
                self._inodes.drop_unused(inode)
        return fitted

    def _inode(self, entry: Entry) -> Inode | None:
        """None where nothing tells its attributes, or the table of inodes is full."""
        attributes = self._tree.claimed_attributes(entry.cid, entry.tsize)
        if attributes is None or self._inodes.full:
            return self._inodes.find(entry.cid)
        if attributes.is_directory:
            return self._inodes.directory(self._directory.number, entry.name, entry.cid, attributes)
        return self._inodes.file(entry.cid, attributes)

    def undo(self) -> None:
        """The reply will not be sent: its references don't count."""
        for inode in self._referred:
            self._inodes.forget(inode.number, 1)


class Listing:
    """Of a directory that is not the root."""

    def __init__(self, directory: Inode, tree: Tree, inodes: Inodes, replies: Replies) -> None:
        self._directory, self._tree, self._inodes, self._replies = directory, tree, inodes, replies
        self._page: Sequence[Entry] = ()
        self._end = False
        self._index = 0
        self._place = -1
        """Where the kernel goes on if it reads in order: then `_index` of `_page` is next."""

    async def reply(self, start: int, token: ReaddirToken) -> None:
        """Raises what the walk raises, if that prevents the first entry; what comes later ends the reply, and
        the kernel meets the failure when it goes on from there."""
        reply = _Reply(self._directory, self._tree, self._inodes, self._replies, token)
        try:
            await self._fill(start, reply)
        except Exception:
            if not reply.entries:
                raise
        except BaseException:
            reply.undo()
            raise

    async def _fill(self, start: int, reply: _Reply) -> None:
        if start < DOTS and not reply.dots(start):
            return
        after = max(start - DOTS, 0)
        if after != self._place:
            await self._turn(after)
        while True:
            index = await reply.fill(self._page, self._index)
            if index > self._index:
                self._place = self._page[index - 1].place
            full, self._index = index < len(self._page), index
            if full or self._end:
                return
            await self._turn(self._place)

    async def _turn(self, after: int) -> None:
        page = await self._tree.entries(self._directory.cid, after)
        self._page, self._end, self._index, self._place = page.entries, page.end, 0, after


class RootListing:
    """Of the root: what was there when the reader began."""

    def __init__(self, roots: Roots, tree: Tree, inodes: Inodes, replies: Replies) -> None:
        self._roots, self._tree, self._inodes, self._replies = roots, tree, inodes, replies
        self._listed: Sequence[Listed] | None = None

    async def reply(self, start: int, token: ReaddirToken) -> None:
        if start == 0 or self._listed is None:
            self._listed = await self._roots.entries()
        reply = _Reply(self._inodes.get(ROOT), self._tree, self._inodes, self._replies, token)
        try:
            if not reply.dots(start):
                return
            for first in range(max(start - DOTS, 0), len(self._listed), ROOTS_AT_A_TIME):
                page = self._page(self._listed[first : first + ROOTS_AT_A_TIME], first)
                if await reply.fill(page, 0) < len(page):
                    return
        except BaseException:
            reply.undo()
            raise

    def _page(self, listed: Sequence[Listed], first: int) -> Sequence[Entry]:
        """The entries of `listed`, which begins at index `first`, without names that no file system can
        hold."""
        named = [(place, item[0], name_of(item)) for place, item in enumerate(listed, first + 1)]
        return [Entry(name, cid, -1, place) for place, cid, name in named if len(name) <= NAME_MAX]
