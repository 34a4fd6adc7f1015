"""Open directories: their handles and their listings, which the kernel gets one buffer at a time.

An entry's offset is its cookie plus two, for "." and "..", so that any reader resumes exactly. If an entry's
attributes are known, the reply contains them, and the kernel counts a reference. If they are not known, or
the table of inodes is full, the kernel gets only the name, and the type if that is known.

When the kernel has a complete listing, it asks for it again only after it has dropped it to free memory.
Until then, the C thread answers opens and releases of the directory (`device`).

Concurrency: the kernel asks for one buffer of an open directory at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import trio
from pyfuse3 import FileNameT, ReaddirToken, readdir_reply

from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.directory_pages import DirectoryEntry
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import ROOT_INODE, Inode, Inodes
from ipfsfuse.fuse.replies import Replies
from ipfsfuse.sources.base import Caller
from ipfsfuse.vfs.tree import Listed, Roots, Tree, name_of

# -- listings ------------------------------------------------------------------------------------------------

_DIRECTORY = 0o040000
DOTS = 2
NAME_MAX = 255
ENTRIES_AT_A_TIME = 500
"""Entries that are put into a reply before other tasks run, which takes about 10 ms."""
ROOTS_AT_A_TIME = 128
"""Entries of the root that are made at a time: a reply has room for about a hundred."""


class _Reply:
    """One reply that is being filled with entries of `directory`."""

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
        """The number of entries in it, without "." and ".."."""

    def dots(self, start: int) -> bool:
        """Adds "." and "..", as far as they come after the offset `start`. Returns False if the buffer is
        full."""
        for cookie, (name, number) in enumerate(
            ((b".", self._directory.number), (b"..", self._directory.parent)), 1
        ):
            if start < cookie and not self._name_only(name, number, _DIRECTORY, cookie):
                return False
        return True

    def _name_only(self, name: bytes, number: int, mode: int, cookie: int) -> bool:
        return readdir_reply(self._token, FileNameT(name), self._replies.name_only(number, mode), cookie)

    async def fill(self, entries: Sequence[DirectoryEntry], first: int) -> int:
        """Adds `entries` from index `first` on. Returns the index of the first that did not fit."""
        for index in range(first, len(entries)):
            if not self._add(entries[index]):
                return index
            self.entries += 1
            if not self.entries % ENTRIES_AT_A_TIME:
                await trio.lowlevel.checkpoint()
        return len(entries)

    def _add(self, entry: DirectoryEntry) -> bool:
        cookie = entry.cookie + DOTS
        inode = self._inode(entry)
        if inode is None:
            return self._name_only(
                entry.name, self._inodes.likely(self._directory.number, entry.name, entry.cid), 0, cookie
            )
        try:
            if readdir_reply(self._token, FileNameT(entry.name), self._replies.entry(inode), cookie):
                self._inodes.refer(inode)
                self._referred.append(inode)
                return True
            return False
        finally:
            if not inode.lookups:
                self._inodes.drop_unused(inode)

    def _inode(self, entry: DirectoryEntry) -> Inode | None:
        """The inode of an entry. If its attributes are not known, or the table of inodes is full: its inode
        if the kernel has one, else None."""
        attributes = self._tree.claimed_attributes(entry.cid, entry.tsize)
        if attributes is None or self._inodes.full:
            return self._inodes.find(entry.cid)
        if attributes.is_directory:
            return self._inodes.directory(self._directory.number, entry.name, entry.cid, attributes)
        return self._inodes.file(entry.cid, attributes)

    def undo(self) -> None:
        """The reply will not be sent: takes back its references."""
        for inode in self._referred:
            if self._inodes.forget(inode.number, 1) is not None:  # the kernel has returned its own meanwhile
                device.revoke(inode.number)


class Listing:
    """The listing of a directory other than the root, for one reader."""

    def __init__(self, directory: Inode, tree: Tree, inodes: Inodes, replies: Replies) -> None:
        self.directory, self._tree, self._inodes, self._replies = directory, tree, inodes, replies
        self._page: Sequence[DirectoryEntry] = ()
        self._end = False
        self._index = 0
        self._cookie = -1
        """The cookie of the last entry that was given. A reader that goes on from there gets `_index` of
        `_page` next."""

    def is_at(self, start: int) -> bool:
        """Whether the next entry after the offset `start` is the next one of this listing."""
        return self._cookie == max(start - DOTS, 0)

    async def reply(self, start: int, token: ReaddirToken) -> int | None:
        """Fills a reply. Returns the offset of the directory's last entry if the kernel has that now, else
        None.

        Raises what the walk raises if there is no entry before it. Otherwise the reply ends there, and the
        error is raised when the kernel goes on from there."""
        reply = _Reply(self.directory, self._tree, self._inodes, self._replies, token)
        try:
            return await self._fill(start, reply)
        except Exception:
            if not reply.entries:
                raise
            return None
        except BaseException:
            reply.undo()
            raise

    async def _fill(self, start: int, reply: _Reply) -> int | None:
        if start < DOTS and not reply.dots(start):
            return None
        if not self.is_at(start):
            await self._turn(max(start - DOTS, 0))
        while True:
            index = await reply.fill(self._page, self._index)
            if index > self._index:
                self._cookie = self._page[index - 1].cookie
            full, self._index = index < len(self._page), index
            if full or self._end:
                return None if full else self._cookie + DOTS
            await self._turn(self._cookie)

    async def _turn(self, after: int) -> None:
        page = await self._tree.entries(self.directory.cid, after)
        self._page, self._end, self._index, self._cookie = page.entries, page.end, 0, after


class RootListing:
    """The listing of the root, as it was when the reader began."""

    def __init__(self, roots: Roots, tree: Tree, inodes: Inodes, replies: Replies) -> None:
        self._roots, self._tree, self._inodes, self._replies = roots, tree, inodes, replies
        self._listed: Sequence[Listed] | None = None

    async def reply(self, start: int, token: ReaddirToken) -> None:
        if start == 0 or self._listed is None:
            self._listed = await self._roots.entries()
        reply = _Reply(self._inodes.get(ROOT_INODE), self._tree, self._inodes, self._replies, token)
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

    def _page(self, listed: Sequence[Listed], first: int) -> Sequence[DirectoryEntry]:
        """The entries of `listed`, which begins at index `first`, without names that are too long for a file
        system."""
        named = [(cookie, item[0], name_of(item)) for cookie, item in enumerate(listed, first + 1)]
        return [DirectoryEntry(name, cid, -1, cookie) for cookie, cid, name in named if len(name) <= NAME_MAX]


# -- handles -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Shared:
    """The state of a handle that the C thread gave: all opens of a directory there have the same handle."""

    directory: Inode
    opens: int
    idle: list[Listing] = field(default_factory=list)
    """Listings that no read uses now, the last used first. Each reader goes on with the one at its offset, so
    that no reader waits for another."""


class OpenDirectories:
    def __init__(self, roots: Roots, tree: Tree, inodes: Inodes, replies: Replies, push: bool) -> None:
        """Without `push`, Python answers every open."""
        self._roots, self._tree, self._inodes, self._replies, self._push = roots, tree, inodes, replies, push
        self._last_handle = 0
        self._listings: dict[int, Listing | RootListing] = {}
        self._shared: dict[int, _Shared] = {}
        self._openers: dict[int, Caller] = {}

    def open(self, number: int, opener: Caller) -> int:
        """A handle for reading the directory with the inode `number`, for the user `opener`."""
        for released in device.released_listings():
            self.release(released)
        self._last_handle += 1
        handle = self._last_handle
        if number == ROOT_INODE:
            self._listings[handle] = RootListing(self._roots, self._tree, self._inodes, self._replies)
        else:
            handle = device.with_cached_listing(handle)
            inode = self._inodes.get(number)
            self._tree.note_use(inode.cid)
            self._listings[handle] = self._listing(inode)
        self._openers[handle] = opener
        return handle

    def _listing(self, inode: Inode) -> Listing:
        return Listing(inode, self._tree, self._inodes, self._replies)

    def opener(self, handle: int) -> Caller:
        """The user who opened it, which a read request does not contain; None if the C thread opened it."""
        return self._openers.get(handle)

    async def read(self, handle: int, start: int, token: ReaddirToken) -> Cid | None:
        """Fills a reply with the entries after the offset `start`. Returns the directory if the kernel has
        its complete listing with this reply, else None. Raises what `Listing.reply` raises."""
        if device.inode_of(handle) is not None:
            return await self._read_shared(handle, start, token)
        listing = self._listings[handle]
        end = await listing.reply(start, token)
        if end is not None:
            device.listing_ends(handle, end)
        return self._complete(listing, end)

    async def _read_shared(self, handle: int, start: int, token: ReaddirToken) -> Cid | None:
        """Reads a directory that the C thread opened: the kernel had its listing then, and has dropped it."""
        shared = self._shared.get(handle) or self._take_over(handle)
        listing = next((one for one in shared.idle if one.is_at(start)), None)
        if listing is None:
            listing = self._listing(shared.directory)
        else:
            shared.idle.remove(listing)
        end = await listing.reply(start, token)
        shared.idle = [listing, *shared.idle][: max(shared.opens, 1)]
        return self._complete(listing, end)

    def _complete(self, listing: Listing | RootListing, end: int | None) -> Cid | None:
        """Lets the C thread open the directory if the kernel has all of `listing`. Not the root, which
        changes."""
        if end is None or isinstance(listing, RootListing):
            return None
        if self._push:
            device.allow(listing.directory.number)
        return listing.directory.cid

    def _take_over(self, handle: int) -> _Shared:
        """Makes opens of the directory go to Python until the kernel has its listing again."""
        number = device.inode_of(handle)
        assert number is not None
        found = _Shared(self._inodes.get(number), device.revoke(number))
        self._shared[handle] = found
        return found

    def release(self, handle: int) -> None:
        shared = self._shared.get(handle)
        if shared is not None:
            shared.opens -= 1
            if not shared.opens:
                del self._shared[handle]
        elif device.inode_of(handle) is not None:
            device.release(handle)
        self._listings.pop(handle, None)
        self._openers.pop(handle, None)
