"""An open directory: pages of entries, given to the kernel a buffer at a time.

A reply's offsets are the entries' places plus two, for "." and "..", so any reader resumes exactly. An entry whose
attributes are known carries them and counts as a lookup; the kernel is told only the name (and type) of the others.
"""

from collections.abc import Sequence

from pyfuse3 import FileNameT, ReaddirToken, readdir_reply

from ipfsfuse.fuse.inodes import ROOT, Inode, Inodes, likely
from ipfsfuse.fuse.replies import Replies
from ipfsfuse.vfs.roots import Listed, Roots, name_of
from ipfsfuse.vfs.tree import Entry, Tree

_DIRECTORY = 0o040000
DOTS = 2
NAME_MAX = 255
AT_ONCE = 128
"""Of the root's entries so many are made at a time: a reply holds some hundred at most."""


class _Replier:
    """Puts entries into a reply until it is full."""

    def __init__(self, held: Inode, inodes: Inodes, replies: Replies) -> None:
        self._held = held
        self._inodes = inodes
        self._replies = replies

    def dots(self, start: int, token: ReaddirToken) -> bool:
        for place, (name, number) in enumerate(((b".", self._held.number), (b"..", self._held.parent)), 1):
            if start < place and not self._name(token, name, number, _DIRECTORY, place):
                return False
        return True

    def _name(self, token: ReaddirToken, name: bytes, number: int, mode: int, place: int) -> bool:
        return readdir_reply(token, FileNameT(name), self._replies.name_alone(number, mode), place)

    def entries(self, entries: Sequence[Entry], first: int, token: ReaddirToken) -> int:
        """Replies with `entries` from index `first` on; returns the index of the first that found no room."""
        for index in range(first, len(entries)):
            if not self._entry(entries[index], token):
                return index
        return len(entries)

    def _entry(self, entry: Entry, token: ReaddirToken) -> bool:
        place = entry.place + DOTS
        if entry.attributes is None:
            return self._name(token, entry.name, likely(entry.cid), 0, place)
        if entry.attributes.is_directory:
            inode = self._inodes.directory(self._held.number, entry.name, entry.cid, entry.attributes)
        else:
            inode = self._inodes.file(entry.cid, entry.attributes)
        if not readdir_reply(token, FileNameT(entry.name), self._replies.listed(inode), place):
            self._inodes.forget(inode.number, 0)
            return False
        inode.lookups += 1
        return True


class Listing:
    """Of a directory that is not the root."""

    def __init__(self, held: Inode, tree: Tree, inodes: Inodes, replies: Replies) -> None:
        self._cid = held.cid
        self._tree = tree
        self._replier = _Replier(held, inodes, replies)
        self._page: Sequence[Entry] = ()
        self._end = False
        self._index = 0
        self._place = -1
        """Where the kernel goes on if it reads in order: then `_index` of `_page` is next."""

    async def reply(self, start: int, token: ReaddirToken) -> None:
        if start < DOTS and not self._replier.dots(start, token):
            return
        after = max(start - DOTS, 0)
        if after != self._place:
            await self._turn(after)
        while True:
            index = self._replier.entries(self._page, self._index, token)
            if index > self._index:
                self._place = self._page[index - 1].place
            full, self._index = index < len(self._page), index
            if full or self._end:
                return
            await self._turn(self._place)

    async def _turn(self, after: int) -> None:
        page = await self._tree.entries(self._cid, after)
        self._page, self._end, self._index, self._place = page.entries, page.end, 0, after


class RootListing:
    """Of the root: what was there when the reader began."""

    def __init__(self, roots: Roots, tree: Tree, inodes: Inodes, replies: Replies) -> None:
        self._roots = roots
        self._tree = tree
        self._replier = _Replier(inodes.get(ROOT), inodes, replies)
        self._listed: Sequence[Listed] | None = None

    async def reply(self, start: int, token: ReaddirToken) -> None:
        if start == 0 or self._listed is None:
            self._listed = await self._roots.entries()
        if not self._replier.dots(start, token):
            return
        for first in range(max(start - DOTS, 0), len(self._listed), AT_ONCE):
            page = self._page(self._listed[first : first + AT_ONCE], first)
            if self._replier.entries(page, 0, token) < len(page):
                return

    def _page(self, listed: Sequence[Listed], first: int) -> Sequence[Entry]:
        """The entries of `listed`, which stand from index `first` on; names that no file system can hold are left out."""
        named = [(place, item[0], name_of(item)) for place, item in enumerate(listed, first + 1)]
        return [Entry(name, cid, place, self._tree.known(cid)) for place, cid, name in named if len(name) <= NAME_MAX]
