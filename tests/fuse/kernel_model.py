"""A model of the kernel's side of FUSE: it keeps dentries, inodes, references and open files as fs/fuse does,
and speaks FUSE messages (linux/fuse.h, protocol 7.31) over a socket. It checks each answer against the
content that it knows.

`serving` starts the real code behind the socket, from the device thread up to the tree. Only the cache is a
fake: blocks in memory.
"""

import errno
import functools
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyfuse3
import trio

from ipfsfuse.cache.base import Arrived, FileRef, LeafPart
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, unixfs
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.fuse import device
from ipfsfuse.fuse.inodes import Inodes
from ipfsfuse.fuse.operations import Operations
from ipfsfuse.vfs.tree import Roots, Tree
from tests.fuse.forest import BAD, DIRECTORY, FILE, LINK, Expected, Forest, Path

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, RELEASE, GETXATTR = 1, 2, 3, 5, 14, 15, 18, 22
INIT, OPENDIR, RELEASEDIR, BATCH_FORGET, READDIRPLUS = 26, 27, 29, 42, 44
NOTIFY_INVAL_INODE, NOTIFY_STORE = 2, 4
KERNEL_OFFERS = (1 << 20) - 1
ROOT = 1
ANSWER_SECONDS = 60

ENTRY = struct.Struct("<QQQQII")  # nodeid, generation, entry_valid, attr_valid, two times nanoseconds
ATTR = struct.Struct(
    "<QQQqqqIIIIIIIIII"
)  # ino, size, blocks, atime, mtime, ctime, nanoseconds, mode, nlink, ...
DIRENT = struct.Struct("<QQII")  # ino, off, namelen, type
KINDS = {stat.S_IFREG: FILE, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: LINK}


@dataclass
class Held:
    """An inode that the kernel holds."""

    identity: object
    expected: Expected
    nlookup: int = 0


@dataclass
class OpenFile:
    nodeid: int
    handle: int
    path: Path
    offset: int = 0
    """The place of the reader, if this is a directory."""


@dataclass
class Kernel:
    ours: socket.socket
    forest: Forest
    inodes: dict[int, Held] = field(default_factory=dict)
    dentries: dict[Path, int] = field(default_factory=lambda: {(): ROOT})
    files: list[OpenFile] = field(default_factory=list)
    folders: list[OpenFile] = field(default_factory=list)
    stored: int = 0
    """How many files were stored into the page cache."""
    _unique: int = 0
    _answers: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    _opening: dict[int, OpenFile] = field(default_factory=dict)
    """Files that are open once the answer arrives."""

    # -- messages --------------------------------------------------------------------------------------------

    def send(self, opcode: int, nodeid: int, body: bytes) -> int:
        self._unique += 2
        self.ours.send(
            struct.pack("<IIQQIIIHH", 40 + len(body), opcode, self._unique, nodeid, 0, 0, 0, 0, 0) + body
        )
        return self._unique

    def wait(self, unique: int) -> tuple[int, bytes]:
        """The answer to a request: its errno (0 for none) and its body."""
        while unique not in self._answers:
            message = self.ours.recv(2 << 20)
            length, error, of = struct.unpack_from("<IiQ", message)
            assert length == len(message)
            if of:
                assert of not in self._answers
                self._answers[of] = -error, message[16:]
                if (file := self._opening.pop(of, None)) is not None and not error:
                    file.handle = struct.unpack_from("<Q", message, 16)[0]
                    self.files.append(file)
            else:
                self._notified(error, message[16:])
        return self._answers.pop(unique)

    def ask(self, opcode: int, nodeid: int, body: bytes) -> tuple[int, bytes]:
        return self.wait(self.send(opcode, nodeid, body))

    def _notified(self, code: int, body: bytes) -> None:
        if code == NOTIFY_STORE:
            nodeid, offset, size, _padding = struct.unpack_from("<QQII", body)
            if nodeid in self.inodes:  # else the kernel answers ENOENT
                assert (offset, size) == (0, len(body) - 24)
                assert self.inodes[nodeid].expected.kind == FILE
                assert body[24:] == self.inodes[nodeid].expected.content, "other bytes in the page cache"
                assert all(file.nodeid != nodeid for file in self.files), (
                    "a store into an open file can deadlock"
                )
                self.stored += 1
        else:
            assert code == NOTIFY_INVAL_INODE

    # -- names -----------------------------------------------------------------------------------------------

    def expected(self, path: Path) -> Expected:
        if not path:
            return Expected(
                DIRECTORY, Cid(b""), names=tuple(cids.text(cid).encode() for cid in self.forest.listed)
            )
        return self.forest.expected[path]

    def linked(self, path: Path, nodeid: int) -> None:
        """The kernel gets `nodeid` for `path`, with one reference."""
        expected = self.forest.expected[path]
        identity: object = cids.canonical(expected.cid)
        if expected.kind == DIRECTORY:
            # with its parent's number: if the kernel forgets the parent and numbers collide, the parent may
            # get another one
            identity = self.dentries[path[:-1]], path[-1], identity
        held = self.inodes.get(nodeid)
        if held is None:
            assert identity not in [other.identity for other in self.inodes.values()], (
                "one file or directory has one number"
            )
            held = self.inodes[nodeid] = Held(identity, expected)
        assert held.identity == identity, f"the number of {held.expected} was given to {expected}"
        assert self.dentries.get(path, nodeid) == nodeid
        held.nlookup += 1
        self.dentries[path] = nodeid

    def entry(self, path: Path, body: bytes) -> int:
        """Checks the attributes of an entry. Returns its node id."""
        nodeid, generation, *_times = ENTRY.unpack_from(body)
        ino, size, mode = (lambda attr: (attr[0], attr[1], attr[9]))(ATTR.unpack_from(body, ENTRY.size))
        expected = self.forest.expected[path]
        assert (ino, generation) == (nodeid, 0)
        assert ROOT < nodeid < 1 << 63
        assert KINDS[stat.S_IFMT(mode)] == expected.kind
        assert expected.kind == DIRECTORY or size in (
            len(expected.content),
            *self._claims[cids.canonical(expected.cid)],
        )
        return nodeid

    @functools.cached_property
    def _claims(self) -> dict[Cid, set[int | None]]:
        """The sizes that all links to a CID claim: they share the inode."""
        found: dict[Cid, set[int | None]] = {}
        for expected in self.forest.expected.values():
            found.setdefault(cids.canonical(expected.cid), set()).add(expected.claimed)
        return found

    def look_up(self, path: Path) -> int | None:
        """The node id of `path`, whose parent must be in the dentry cache. None if the lookup fails and
        should fail."""
        if path not in self.dentries:
            self.looked_up(path, self.wait(self.ask_to_look_up(path)))
        return self.dentries.get(path)

    def ask_to_look_up(self, path: Path) -> int:
        return self.send(LOOKUP, self.dentries[path[:-1]], path[-1] + b"\0")

    def looked_up(self, path: Path, answer: tuple[int, bytes]) -> None:
        error, body = answer
        if self.forest.expected[path].kind == BAD:
            assert error in (errno.EIO, errno.ENOTSUP)
        else:
            assert error == 0, os.strerror(error)
            self.linked(path, self.entry(path, body))

    def walk(self, path: Path) -> int | None:
        for length in range(1, len(path) + 1):
            if self.look_up(path[:length]) is None:
                return None
        return self.dentries[path]

    def look_up_absent(self, folder: Path) -> None:
        error, body = self.ask(LOOKUP, self.dentries[folder], b"absent\0")
        assert error == errno.ENOENT or ENTRY.unpack_from(body)[0] == 0

    # -- files -----------------------------------------------------------------------------------------------

    def open(self, path: Path) -> OpenFile:
        file, unique = self.ask_to_open(path)
        error, _body = self.wait(unique)
        assert error == 0, os.strerror(error)
        return file

    def ask_to_open(self, path: Path) -> tuple[OpenFile, int]:
        nodeid = self.walk(path)
        assert nodeid is not None
        unique = self.send(OPEN, nodeid, struct.pack("<II", os.O_RDONLY, 0))
        self._opening[unique] = OpenFile(nodeid, 0, path)
        return self._opening[unique], unique

    def read(self, file: OpenFile, offset: int, size: int) -> None:
        error, body = self.ask(
            READ, file.nodeid, struct.pack("<QQIIQII", file.handle, offset, size, 0, 0, 0, 0)
        )
        assert error == 0, os.strerror(error)
        assert body == self.forest.expected[file.path].content[offset : offset + size], (
            "these are the bytes of another file"
        )

    def close(self, file: OpenFile) -> None:
        """Closes a file. The kernel keeps the inode until this is answered."""
        assert self.ask(RELEASE, file.nodeid, struct.pack("<QIIQ", file.handle, 0, 0, 0)) == (0, b"")
        self.files.remove(file)

    def check(self, path: Path) -> None:
        """Checks that `path` leads to the right CID and the right bytes."""
        nodeid, expected = self.walk(path), self.forest.expected[path]
        if nodeid is None:
            return
        error, shown = self.ask(GETXATTR, nodeid, struct.pack("<II", 4096, 0) + b"ipfs.cid\0")
        assert error == 0, os.strerror(error)
        cid = cids.parse(shown.rstrip(b"\0").decode())
        assert cids.canonical(cid) == cids.canonical(expected.cid)
        assert self.ask(GETATTR, nodeid, struct.pack("<IIQ", 0, 0, 0))[0] == 0
        if expected.kind == LINK:
            assert self.ask(READLINK, nodeid, b"") == (0, expected.content)
        elif expected.kind == FILE:
            file = self.open(path)
            self.read(file, 0, len(expected.content) + 10)
            self.close(file)

    # -- listings --------------------------------------------------------------------------------------------

    def open_folder(self, path: Path) -> OpenFile | None:
        nodeid = self.walk(path) if path else ROOT
        if nodeid is None:
            return None
        error, body = self.ask(OPENDIR, nodeid, struct.pack("<II", os.O_RDONLY | os.O_DIRECTORY, 0))
        assert error == 0, os.strerror(error)
        self.folders.append(OpenFile(nodeid, struct.unpack_from("<Q", body)[0], path))
        return self.folders[-1]

    def ask_to_list(self, folder: OpenFile, room: int) -> int:
        return self.send(
            READDIRPLUS,
            folder.nodeid,
            struct.pack("<QQIIQII", folder.handle, folder.offset, room, 0, 0, 0, 0),
        )

    def listed(
        self, folder: OpenFile, answer: tuple[int, bytes], has_memory: Callable[[], bool]
    ) -> list[bytes]:
        """Takes a buffer of entries as fuse_direntplus_link does, and returns the names.
        `has_memory` says whether there is memory for one more inode."""
        error, body = answer
        assert error == 0, os.strerror(error)
        found, at = [], 0
        while at < len(body):
            start, at = at, at + ENTRY.size + ATTR.size
            ino, folder.offset, length, kind = DIRENT.unpack_from(body, at)
            name = body[at + DIRENT.size :][:length]
            at = at + DIRENT.size + length + 7 & ~7
            nodeid = ENTRY.unpack_from(body, start)[0]
            assert ino > 0, "the C library skips such an entry"
            if name in (b".", b".."):
                continue
            found.append(name)
            path = (*folder.path, name)
            if not nodeid:
                assert kind in (0, 4, 8, 10)
                continue
            _ino, size, *_rest = attr = ATTR.unpack_from(body, start + ENTRY.size)
            valid = stat.S_IFMT(attr[9]) in KINDS and size < 1 << 63  # as fuse_invalid_attr
            if valid and has_memory():
                assert KINDS[kind << 12] == self.forest.expected[path].kind
                self.entry(path, body[start:])
                self.linked(path, nodeid)
            else:
                self.forget([(nodeid, 1)])
        return found

    def list_all(self, path: Path, room: int, has_memory: Callable[[], bool] = lambda: True) -> None:
        """Reads a directory to its end, in buffers of `room` bytes. Checks that each name comes once."""
        folder = self.open_folder(path)
        if folder is None:
            return
        names: list[bytes] = []
        before = -1
        while folder.offset != before:
            before = folder.offset
            names += self.listed(folder, self.wait(self.ask_to_list(folder, room)), has_memory)
        assert names == list(self.expected(path).names)
        self.close_folder(folder)

    def close_folder(self, folder: OpenFile) -> None:
        assert self.ask(RELEASEDIR, folder.nodeid, struct.pack("<QIIQ", folder.handle, 0, 0, 0)) == (0, b"")
        self.folders.remove(folder)

    # -- memory ----------------------------------------------------------------------------------------------

    def droppable(self) -> list[Path]:
        """Dentries that have no children and lead to no open file or directory."""
        pinned = {path[:length] for path in self.dentries for length in range(len(path))}
        pinned |= {
            one.path[:length] for one in (*self.files, *self.folders) for length in range(len(one.path) + 1)
        }
        return [path for path in self.dentries if path not in pinned]

    def evictable(self) -> list[int]:
        """Inodes without a dentry; files stay a while after their last dentry is gone."""
        used = {*self.dentries.values(), *(one.nodeid for one in (*self.files, *self.folders))}
        return [nodeid for nodeid in self.inodes if nodeid not in used]

    def evict(self, nodeids: Sequence[int]) -> None:
        self.forget([(nodeid, self.inodes.pop(nodeid).nlookup) for nodeid in nodeids])

    def forget(self, counts: Sequence[tuple[int, int]]) -> None:
        """Sends FORGET or BATCH_FORGET, which have no answer."""
        if len(counts) == 1:
            self.send(FORGET, counts[0][0], struct.pack("<Q", counts[0][1]))
        elif counts:
            self.send(
                BATCH_FORGET,
                0,
                struct.pack("<II", len(counts), 0) + b"".join(struct.pack("<QQ", *one) for one in counts),
            )

    def forget_everything(self) -> None:
        """Closes everything, and then drops all caches."""
        for file in list(self.files):
            self.close(file)
        for folder in list(self.folders):
            self.close_folder(folder)
        self.dentries = {(): ROOT}
        self.evict(list(self.inodes))


class Memory:
    """A cache that has all blocks, and gives them after a few turns of the event loop."""

    def __init__(self, blocks: dict[bytes, bytes]) -> None:
        self._blocks = blocks
        self._forget: list[Callable[[], None]] = []
        self.held_back: set[bytes] = set()
        """The multihashes of blocks that are not given while they are in this set."""

    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        self._forget.append(call)

    def hold_back(self, cid: Cid) -> None:
        """Drops the block of `cid`, and does not give it until it is taken out of `held_back`."""
        self.held_back.add(cids.multihash(cid))
        for call in self._forget:
            call()

    async def block(self, cid: Cid, *, early: bool = False) -> bytes:
        while cids.multihash(cid) in self.held_back:  # noqa: ASYNC110 # another thread changes it
            await trio.sleep(0.01)
        for _ in range(len(cid) % 3):
            await trio.lowlevel.checkpoint()
        return self._blocks[cids.multihash(cid)]

    async def block_size(self, cid: Cid, *, early: bool = False) -> int:
        return len(await self.block(cid))

    async def part(
        self, file: FileRef, leaf: Leaf, start: int, stop: int, *, early: bool = False
    ) -> LeafPart:
        return LeafPart((await self.leaf(file, leaf))[start:stop], None)

    async def leaf(self, file: FileRef, leaf: Leaf, *, early: bool = False) -> bytes:
        content = cids.inline_block(leaf.cid)
        if content is None:
            content = await self.block(leaf.cid)
        if cids.codec(leaf.cid) != cids.RAW:
            content = bytes(unixfs.decode(dagpb.decode(content).data or b"").data or b"")
        return content

    async def ahead(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None = None) -> None:
        for leaf in leaves:
            if arrived is not None:
                arrived(leaf, await self.leaf(file, leaf))

    def gather(
        self, subtree: object, wanted: Iterable[Cid], seen: Callable[[Cid, bytes], Sequence[Cid]]
    ) -> trio.Event:
        for cid in wanted:
            if (block := self._blocks.get(cids.multihash(cid))) is not None:
                seen(cid, block)
        come = trio.Event()
        come.set()
        return come

    def arrived(self, cid: Cid) -> bytes | None:
        return self._blocks.get(cids.multihash(cid))

    def opened(self, file: FileRef) -> None: ...

    def closed(self, file: FileRef) -> None: ...

    def item_of(self, cid: Cid) -> None: ...


@dataclass
class Served:
    kernel: Kernel
    inodes: Inodes
    memory: Memory
    operations: list[Operations] = field(default_factory=list)

    def held(self) -> int:
        """How much the kernel holds as far as the daemon knows, once the daemon has read all requests: inodes
        without the root, open files, and directories that were opened in C and read by Python."""
        self.kernel.look_up_absent(())
        operations = self.operations[0]
        return len(self.inodes) - 1 + len(operations.files.handles) + len(operations.directories._shared)


@contextmanager
def serving(forest: Forest, known: int, bits: int, key: bytes) -> Iterator[Served]:
    """Runs the real code behind the socket, in a thread. It keeps the attributes of `known` CIDs, and its
    inode numbers have `bits` bits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    ours.settimeout(ANSWER_SECONDS)
    reader, inodes, kernel = device.Device(readahead=True), Inodes(key, bits), Kernel(ours, forest)
    served = Served(kernel, inodes, Memory(forest.dag.blocks))
    ready, failed = threading.Event(), list[BaseException]()
    end: list[Callable[[], None]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            tree = Tree(served.memory, nursery, known=known)
            roots = Roots(lambda: forest.listed, lambda: (), lambda _cid, _name: None, None)
            operations = Operations(tree, roots, inodes, lambda: 1 << 30, deadline=30.0)
            served.operations.append(operations)
            pyfuse3.init(operations, f"/dev/fd/{theirs.fileno()}", set())
            token = trio.lowlevel.current_trio_token()
            end.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
            for task in (pyfuse3.main, operations.files.run):
                nursery.start_soon(task)
            ready.set()
            await trio.sleep_forever()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as exc:
            failed.append(exc)
        finally:
            ready.set()

    serving_thread = threading.Thread(target=run)
    serving_thread.start()
    try:
        ready.wait(ANSWER_SECONDS)
        assert not failed
        begun = kernel.send(INIT, 0, struct.pack("<IIII", 7, 31, 1 << 17, KERNEL_OFFERS))
        assert kernel.wait(begun)[0] == 0
        yield served
    finally:
        for stop in end:
            stop()
        serving_thread.join(ANSWER_SECONDS)
        reader.stop()
        pyfuse3.close(unmount=False)
        ours.close()
        theirs.close()
        assert not failed, failed
