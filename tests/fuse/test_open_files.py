"""A file that was opened in C and is read by Python: once Python has taken it over, nothing may be stored
into its page cache."""

import threading
from collections.abc import Callable
from typing import cast

import pyfuse3
import pytest
import trio

from ipfsfuse.cache.base import FileRef, LeafPart
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inodes
from ipfsfuse.fuse.open_files import OpenFiles
from ipfsfuse.vfs.prefetch import SmallFileBuffer
from ipfsfuse.vfs.tree import Tree, attributes_of
from tests.sources.content import raw_blocks

((CID, CONTENT),) = raw_blocks(95, 1).items()


class Cache:
    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        pass

    def opened(self, file: FileRef) -> None:
        pass

    async def part(
        self, file: FileRef, leaf: object, start: int, stop: int, *, early: bool = False
    ) -> LeafPart:
        return LeafPart(CONTENT[start:stop], None)


class SmallTree:
    """A tree of one small file."""

    use = None

    def __init__(self) -> None:
        self.cache, self.small_files = Cache(), SmallFileBuffer()
        self.opened = self.cache.opened

    async def file(self, cid: Cid) -> File:
        return File(cid, len(CONTENT), len(CONTENT))


def test_nothing_is_stored_into_a_file_that_is_taken_over_from_c(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []
    asked, may_answer = threading.Event(), threading.Event()
    opens = 2

    def revoke_if_closed(_inode: int) -> bool:
        asked.set()
        may_answer.wait(60)
        return opens == 0

    def revoke(_inode: int) -> int:
        nonlocal opens
        before, opens = opens, 0
        return before

    monkeypatch.setattr(device, "revoke_if_closed", revoke_if_closed)
    monkeypatch.setattr(device, "revoke", revoke)
    monkeypatch.setattr(pyfuse3, "notify_store", lambda inode, _offset, _content: stored.append(inode))
    inodes, tree = Inodes(bytes(32)), cast(Tree, SmallTree())
    held = inodes.file(CID, attributes_of(File(CID, len(CONTENT), len(CONTENT))))

    async def main() -> None:
        files = OpenFiles(tree, inodes, push=True)
        with files.pushing():
            files._pusher.push([(held.number, CONTENT)])
            await trio.to_thread.run_sync(asked.wait)
            threading.Timer(0.1, may_answer.set).start()
            handle = 1 << 63 | held.number
            assert bytes(await (await files.take_over(handle)).file.read(0, 10)) == CONTENT[:10]
            assert held.opens == 2

    trio.run(main)
    assert stored == []
