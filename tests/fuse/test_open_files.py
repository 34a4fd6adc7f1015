"""What `OpenFiles` offers to the C thread, and when it withdraws that: nothing may be stored into an open file."""

import hashlib
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import trio

from ipfsfuse.cache.base import FileRef, LeafPart
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inode, Inodes
from ipfsfuse.fuse.open_files import OFFERED, OpenFiles
from ipfsfuse.sources.base import Caller, current_request, request_of
from ipfsfuse.vfs.prefetch import SmallFileBuffer
from ipfsfuse.vfs.tree import Attributes, Tree, attributes_of
from tests.sources.content import raw_blocks

BLOCKS = raw_blocks(95, 3)
FIRST, SECOND, THIRD = BLOCKS
DIRECTORY = FIRST
"""Stands for a directory: its listing is the three files."""


def raw(content: bytes) -> Cid:
    return cids.make(cids.RAW, multihashes.SHA2_256_PREFIX + hashlib.sha256(content).digest())


def file_of(cid: Cid) -> File:
    return File(cid, len(BLOCKS[cid]), len(BLOCKS[cid]))


class Cache:
    def __init__(self) -> None:
        self.fetched: dict[Cid, bytes] = {}

    def arrived(self, cid: Cid) -> bytes | None:
        return self.fetched.get(cid)

    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        pass

    def opened(self, file: FileRef) -> None:
        pass

    async def part(
        self, file: FileRef, leaf: object, start: int, stop: int, *, early: bool = False
    ) -> LeafPart:
        return LeafPart(BLOCKS[file.cid][start:stop], None)


class SmallTree:
    """A tree of one directory of three small files, whose contents have arrived."""

    use = None

    def __init__(self) -> None:
        self.cache, self.small_files = Cache(), SmallFileBuffer()
        self.opened = self.cache.opened
        self.uses: list[tuple[Cid, Caller]] = []
        """What was used, and to whom that was charged."""
        for cid, content in BLOCKS.items():
            self.small_files.put(cid, content)

    def file_at_hand(self, cid: Cid) -> File:
        return file_of(cid)

    async def file(self, cid: Cid) -> File:
        return file_of(cid)

    def known(self, cid: Cid) -> Attributes:
        return attributes_of(file_of(cid))

    def first(self, _directory: Cid) -> Sequence[Cid]:
        return list(BLOCKS)

    def following(self, cid: Cid) -> Sequence[Cid]:
        return list(BLOCKS)[list(BLOCKS).index(cid) + 1 :]

    def used(self, cid: Cid, size: int) -> None:
        self.uses.append((cid, current_request.get().caller))


class Thread:
    """Takes the place of the C thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offered: dict[int, bytes] = {}
        self.opens: dict[int, int] = {}
        self.drained: list[tuple[int, int]] = []
        self.released: list[int] = []
        monkeypatch.setattr(device, "offer", self.offered.__setitem__)
        monkeypatch.setattr(device, "withdraw", lambda inode: self.offered.pop(inode, None))
        monkeypatch.setattr(device, "revoke", self._revoke)
        monkeypatch.setattr(device, "drain", self._drain)
        monkeypatch.setattr(device, "release", self.released.append)
        monkeypatch.setattr(device, "allow", lambda _inode: None)
        monkeypatch.setattr(device, "ReadWindows", lambda *_arguments: None)

    def _revoke(self, inode: int) -> int:
        self.offered.pop(inode, None)
        return self.opens.pop(inode, 0)

    def _drain(self) -> Sequence[tuple[int, int]]:
        drained, self.drained = self.drained, []
        return drained


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Thread:
    return Thread(monkeypatch)


class Listed:
    """Open files, and the inodes of the three files, which the kernel has from a listing."""

    def __init__(self) -> None:
        self.inodes = Inodes(bytes(32))
        self.files = OpenFiles(cast(Tree, SmallTree()), self.inodes, push=True)
        self.held: dict[Cid, Inode] = {}
        for cid in BLOCKS:
            inode = self.inodes.file(cid, attributes_of(file_of(cid))._replace(exact=False))
            self.inodes.refer(inode)
            self.held[cid] = inode

    def offers(self, *some: Cid) -> dict[int, bytes]:
        return {self.held[cid].number: BLOCKS[cid] for cid in some}


def test_the_contents_of_a_listed_directory_are_offered_once(thread: Thread) -> None:
    listed = Listed()
    listed.files.listed(DIRECTORY)
    assert thread.offered == listed.offers(*BLOCKS)
    assert all(inode.attributes.exact for inode in listed.held.values())
    thread.offered.clear()
    listed.files.listed(DIRECTORY)
    assert not thread.offered


def test_a_file_of_another_size_than_the_kernel_was_told_is_not_offered(thread: Thread) -> None:
    listed = Listed()
    lying = listed.held[SECOND]
    lying.attributes = lying.attributes._replace(size=lying.attributes.size + 1)
    listed.files.listed(DIRECTORY)
    assert thread.offered == listed.offers(FIRST, THIRD)


def test_a_file_that_the_kernel_has_not_listed_is_offered_later(thread: Thread) -> None:
    listed = Listed()
    listed.inodes.forget(listed.held[SECOND].number, 1)
    listed.files.listed(DIRECTORY)
    assert thread.offered == listed.offers(FIRST, THIRD)
    listed.held[SECOND] = listed.inodes.file(SECOND, attributes_of(file_of(SECOND)))
    thread.drained = [(listed.held[FIRST].number, 0)]
    listed.files.drain()
    assert thread.offered == listed.offers(*BLOCKS)


def test_nothing_is_offered_for_an_open_file(thread: Thread) -> None:
    """An open withdraws the offer, and until the last release there is no other."""

    async def main() -> None:
        listed = Listed()
        listed.files.listed(DIRECTORY)
        handles = [await listed.files.open(listed.held[SECOND], 0) for _ in range(2)]
        assert thread.offered == listed.offers(FIRST, THIRD)
        small_files = listed.files._tree.small_files
        for handle in handles:
            small_files.put(SECOND, BLOCKS[SECOND])
            listed.files.listed(DIRECTORY)
            assert thread.offered == listed.offers(FIRST, THIRD)
            listed.files.release(handle)
        listed.files.listed(DIRECTORY)
        assert thread.offered == listed.offers(*BLOCKS)

    trio.run(main)


def test_the_beginning_of_a_file_that_was_looked_up_is_offered(thread: Thread) -> None:
    listed, large = Listed(), bytes(OFFERED + 1)
    cid = raw(large)
    fetched = cast(Cache, listed.files._tree.cache).fetched
    fetched |= {FIRST: BLOCKS[FIRST], cid: large}
    held = listed.inodes.file(cid, Attributes(0o100444, len(large), 0))
    for inode in (held, *listed.held.values()):
        listed.files.looked_up(inode)
    assert thread.offered == {held.number: large[:OFFERED]}, "the other sizes are only claimed"
    known = listed.held[FIRST]
    known.attributes = known.attributes._replace(exact=True)
    known.opens = 1
    listed.files.looked_up(known)
    assert known.number not in thread.offered
    known.opens = 0
    listed.files.looked_up(known)
    assert thread.offered[known.number] == BLOCKS[FIRST]


def test_the_block_of_a_directory_or_a_dag_pb_file_is_not_offered(thread: Thread) -> None:
    """It is not the content."""
    listed = Listed()
    for kind in (0o040555, 0o100444):
        cid = cids.make(cids.DAG_PB, cids.multihash(FIRST))
        cast(Cache, listed.files._tree.cache).fetched[cid] = BLOCKS[FIRST]
        listed.files.looked_up(listed.inodes.file(cid, Attributes(kind, 10, 0)))
    assert not thread.offered


def test_a_recording_mount_is_offered_nothing(thread: Thread) -> None:
    listed = Listed()
    cast(Cache, listed.files._tree.cache).fetched[FIRST] = BLOCKS[FIRST]
    files = OpenFiles(listed.files._tree, listed.inodes, push=False)
    known = listed.held[FIRST]
    known.attributes = known.attributes._replace(exact=True)
    files.looked_up(known)
    files.listed(DIRECTORY)
    assert not thread.offered


def test_an_offer_is_withdrawn_before_an_open_waits_for_anything(thread: Thread) -> None:
    async def main() -> None:
        listed = Listed()
        listed.files.listed(DIRECTORY)
        opening = listed.files.open(listed.held[FIRST], 0)
        listed.files._tree.file_at_hand = lambda _cid: None  # type: ignore[method-assign]

        async def waits(_cid: Cid) -> File:
            assert thread.offered == listed.offers(SECOND, THIRD)
            return file_of(FIRST)

        listed.files._tree.file = waits  # type: ignore[method-assign]
        await opening

    trio.run(main)


def test_a_file_that_is_taken_over_from_c_counts_as_open(thread: Thread) -> None:
    async def main() -> None:
        listed = Listed()
        held = listed.held[FIRST]
        thread.opens[held.number] = 2
        handle = 1 << 63 | held.number
        taken = await listed.files.take_over(handle)
        assert bytes(await taken.file.read(0, 10)) == BLOCKS[FIRST][:10]
        assert held.opens == 2
        listed.files.listed(DIRECTORY)
        assert thread.offered == listed.offers(SECOND, THIRD)

    trio.run(main)


def test_a_release_that_c_could_not_answer_is_counted_once(thread: Thread) -> None:
    async def main() -> None:
        listed = Listed()
        held = listed.held[FIRST]
        handle = 1 << 63 | held.number
        listed.files.release(handle)
        assert thread.released == [handle]
        thread.opens[held.number] = 2
        await listed.files.take_over(handle)
        for opens in (1, 0):
            listed.files.release(handle)
            assert held.opens == opens
        assert thread.released == [handle]

    trio.run(main)


def test_an_open_in_c_is_charged_to_the_user_who_opened_it(thread: Thread) -> None:
    async def main() -> None:
        listed = Listed()
        thread.drained = [(listed.held[FIRST].number, 1000), (listed.held[SECOND].number, 1001)]
        with request_of(1002):
            await listed.files.open(listed.held[THIRD], 1002)
            assert current_request.get().caller == 1002
        uses = cast(SmallTree, listed.files._tree).uses
        assert uses == [(FIRST, 1000), (SECOND, 1001)]

    trio.run(main)


def test_forgotten_files_are_not_stored(thread: Thread) -> None:
    listed = Listed()
    listed.files.listed(DIRECTORY)
    listed.files.forget(listed.held[FIRST].number, 1)
    assert thread.offered == listed.offers(SECOND, THIRD)
