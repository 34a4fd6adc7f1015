"""Open files: what an open costs the kernel and us, and what is spared both.

A small file's bytes are handed to the kernel before its reader is there (`pages`), and who opens it then is let in without
asking (`porter`): such opens are heard of afterwards, in rows. Concurrency: the event loop's; between two awaits the tables
are consistent.
"""

from contextlib import suppress

import pyfuse3
import trio
from pyfuse3 import InodeT

from ipfsfuse.cache.base import Content
from ipfsfuse.dag.nodes import File
from ipfsfuse.fuse import porter
from ipfsfuse.fuse.inodes import Inode, Inodes
from ipfsfuse.fuse.interrupts import Interrupts
from ipfsfuse.fuse.pages import Pages
from ipfsfuse.vfs import attributes
from ipfsfuse.vfs.attributes import Attributes
from ipfsfuse.vfs.openfile import OpenFile
from ipfsfuse.vfs.tree import Tree

HEAR_SECONDS = 1.0
"""How late the cache and the pins hear of an open at most."""


class Files:
    def __init__(self, tree: Tree, inodes: Inodes, interrupts: Interrupts, pages: Pages | None) -> None:
        """Without `pages` nothing is handed to the kernel unasked, and each open is asked for: every use is seen."""
        self._tree, self._inodes, self._interrupts, self._pages = tree, inodes, interrupts, pages
        self._open: dict[int, tuple[OpenFile, Inode]] = {}
        self._taken_over: dict[int, int] = {}
        """Handles of the porter that were read through: how many opens each stands for."""
        self._handles = 0
        if pages is not None:
            tree.cache.when_blocks_leave(porter.dismiss_idle)

    async def open(self, held: Inode, pid: int) -> int:
        """A handle for reading `held`. Raises what its blocks' walk raises."""
        self.hear()  # first: what was opened before this counts as used before it
        if self._pages is not None:
            self._pages.withdraw(held.number)
        held.opens += 1
        try:
            file = await self._file(held, pid)
        except BaseException:
            held.opens -= 1
            raise
        self._correct(held, attributes.of_node(file))
        if self._pages is not None:
            self._give_ahead(held, self._pages)
            if file.inline == file.size:
                porter.know(held.number)
        self._handles += 1
        self._open[self._handles] = self._opened(file, self._handles), held
        return self._handles

    def _opened(self, file: File, handle: int) -> OpenFile:
        return OpenFile(self._tree, file, porter.counter(handle) if self._pages is not None else None)

    async def _file(self, held: Inode, pid: int) -> File:
        file = self._tree.file_at_hand(held.cid)
        if file is None:
            with self._interrupts.watch(pid):
                file = await self._tree.file(held.cid)
        return file

    def _correct(self, held: Inode, true: Attributes) -> None:
        """What the kernel was told of `held` by a link that lied, it shall ask for again, before it reads anything."""
        lied = held.attributes.size != true.size
        held.attributes = true
        if lied:
            with suppress(OSError):  # the kernel has forgotten it already
                pyfuse3.invalidate_inode(InodeT(held.number), attr_only=True)

    def _give_ahead(self, held: Inode, pages: Pages) -> None:
        """Hands the kernel the small files that come next: then it asks neither for their bytes nor, after that, for their
        access times."""
        given = []
        for cid, content in self._tree.coming(held.cid):
            one, true = self._inodes.find(cid), self._tree.known(cid)
            if one and true and not one.opens and one.attributes.size == true.size:
                one.attributes = true
                given.append((one.number, content))
        if given:
            pages.give(given)

    async def read(self, handle: int, offset: int, size: int) -> Content:
        found = self._open.get(handle)
        file, _held = found if found is not None else await self._take_over(handle)
        return await file.read(offset, size)

    async def _take_over(self, handle: int) -> tuple[OpenFile, Inode]:
        """A file that the porter opened is being read: the kernel has not kept its pages."""
        held = self._inodes.get(porter.inode_of(handle))
        file = await self._tree.file(held.cid)
        if handle not in self._open:  # no other read came first
            if self._pages is not None:
                self._pages.withdraw(held.number)  # while the porter still says that it is open: the kernel waits with its page locked
            opens = self._taken_over[handle] = porter.dismiss(held.number)
            held.opens += opens
            self._open[handle] = self._opened(file, handle), held
        return self._open[handle]

    def release(self, handle: int) -> None:
        file, held = self._open[handle]
        held.opens -= 1
        left = self._taken_over[handle] = self._taken_over.get(handle, 1) - 1
        if not left:
            del self._open[handle], self._taken_over[handle]
            file.close()

    def forget(self, number: int, count: int) -> None:
        """The kernel gives `count` references to an inode back."""
        if self._inodes.forget(number, count):
            porter.dismiss(number)

    def hear(self) -> None:
        """Takes note of the opens that were let in unasked, and of what the kernel took."""
        if self._pages is None:
            return
        for number in self._pages.stored():
            held = self._inodes.known(number)
            if held is not None and held.attributes.exact:  # else it was forgotten meanwhile, and is another's word now
                porter.know(number)
        last = None
        for number in porter.heard():
            last = self._inodes.known(number)
            if last is not None:
                self._tree.used(last.cid, last.attributes.size)
        if last is not None:
            self._give_ahead(last, self._pages)

    async def run(self) -> None:
        """Hears of the last of a row, too: as long as the mount serves."""
        while True:
            await trio.sleep(HEAR_SECONDS)
            self.hear()
