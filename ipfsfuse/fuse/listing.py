"""An open directory: its entries are given to the kernel a buffer at a time.

An entry's offset is its place plus two, for "." and "..", so that any reader resumes exactly. An entry whose
attributes are known carries them, and is a reference for the kernel to count; of any other, and where the
table of inodes is full, the kernel is told the name alone, and the type where that is known.

Concurrency: the kernel asks for one buffer of a handle at a time.
"""

from collections.abc import Sequence

import trio
from pyfuse3 import FileNameT, ReaddirToken, readdir_reply

from ipfsfuse.dag.directory_pages import Entry
from ipfsfuse.fuse.inodes import ROOT, Inode, Inodes
from ipfsfuse.fuse.replies import Replies
from ipfsfuse.vfs.roots import Listed, Roots, name_of
from ipfsfuse.vfs.tree import Tree

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
        try:
            fitted = readdir_reply(self._token, FileNameT(entry.name), self._replies.entry(inode), place)
            if fitted:
                self._inodes.refer(inode)
                self._referred.append(inode)
            return fitted
        finally:
            self._inodes.drop_unused(inode)

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
