"""The kernel's references to our inodes. After any sequence of messages each path gives its own bytes and its
own CID. When the kernel has forgotten everything, the daemon holds nothing."""

import errno
import os
import random
from contextlib import ExitStack

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.vfs.tree import Tree
from tests.dag.blocks import Blocks
from tests.fuse.forest import BAD, DIRECTORY, FILE, LINK, Expected, Forest, forest
from tests.fuse.kernel_model import Kernel, Served, serving

pytestmark = pytest.mark.logs("a call was answered")
EXAMPLES = int(os.environ.get("IPFSFUSE_FUZZ_EXAMPLES", "40"))
FOREST = forest()
FILES, FOLDERS, ALL = FOREST.of_kind(FILE), [(), *FOREST.of_kind(DIRECTORY)], list(FOREST.expected)
ROOM = st.sampled_from([300, 400, 1000, 4096, 1 << 16])
SOME = st.lists(st.integers(0, 1 << 20), min_size=1, max_size=12)


def go_through(kernel: Kernel, folder: tuple[bytes, ...], waits: bool) -> None:
    kernel.list_all(folder, 4096)
    paths = [path for path in FILES if path[:-1] == folder]
    for path in paths:
        kernel.walk(path)
    opening = []
    for path in paths:
        file, unique = kernel.ask_to_open(path)
        opening.append((file, unique))
        if waits:
            kernel.wait(unique)
    for file, unique in opening:
        if not waits:
            assert kernel.wait(unique)[0] == 0
        kernel.read(file, 0, 1 << 16)
    for file, _unique in opening:
        kernel.close(file)


class References(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.served: Served

    @initialize(
        known=st.sampled_from([1, 3, 1000]),
        bits=st.sampled_from([8, 63]),
        key=st.binary(min_size=32, max_size=32),
    )
    def mount(self, known: int, bits: int, key: bytes) -> None:
        """With few known attributes most listings have only names. With few numbers most numbers collide."""
        self.served = self.stack.enter_context(serving(FOREST, known, bits, key))

    @property
    def kernel(self) -> Kernel:
        return self.served.kernel

    @rule(path=st.sampled_from(ALL))
    def walk(self, path: tuple[bytes, ...]) -> None:
        self.kernel.walk(path)

    @rule(path=st.sampled_from(ALL))
    def check(self, path: tuple[bytes, ...]) -> None:
        self.kernel.check(path)

    @rule(folder=st.sampled_from(FOLDERS))
    def look_up_absent(self, folder: tuple[bytes, ...]) -> None:
        if not folder or self.kernel.walk(folder) is not None:
            self.kernel.look_up_absent(folder)

    @rule(path=st.sampled_from(FILES))
    def open(self, path: tuple[bytes, ...]) -> None:
        self.kernel.open(path)

    @rule(folder=st.sampled_from(FOLDERS), waits=st.booleans())
    def go_through(self, folder: tuple[bytes, ...], waits: bool) -> None:
        """Opens the files of a directory in order, as `tar` does, or all at once. Each is stored into
        the page cache before its open is answered."""
        go_through(self.kernel, folder, waits)

    @precondition(lambda self: self.kernel.files)
    @rule(which=st.integers(0, 1 << 20), offset=st.integers(0, 2000), size=st.integers(1, 30_000))
    def read(self, which: int, offset: int, size: int) -> None:
        files = self.kernel.files
        self.kernel.read(files[which % len(files)], offset, size)

    @precondition(lambda self: self.kernel.files)
    @rule(which=st.integers(0, 1 << 20))
    def close(self, which: int) -> None:
        files = self.kernel.files
        self.kernel.close(files[which % len(files)])

    @rule(path=st.sampled_from(FOLDERS), room=ROOM)
    def list_all(self, path: tuple[bytes, ...], room: int) -> None:
        self.kernel.list_all(path, room)

    @rule(path=st.sampled_from(FOLDERS), room=ROOM, seed=st.integers(0, 1 << 32))
    def list_while_memory_is_short(self, path: tuple[bytes, ...], room: int, seed: int) -> None:
        """The kernel forgets at once what it can't link. The number of entries to link depends on how much
        was stored by then, so Hypothesis does not draw each answer: it could not repeat them."""
        memory = random.Random(seed)
        self.kernel.list_all(path, room, lambda: memory.random() < 0.7)

    @rule(path=st.sampled_from(FOLDERS))
    def open_folder(self, path: tuple[bytes, ...]) -> None:
        self.kernel.open_folder(path)

    @precondition(lambda self: self.kernel.folders)
    @rule(which=st.integers(0, 1 << 20), room=ROOM)
    def list_some(self, which: int, room: int) -> None:
        folder = self.kernel.folders[which % len(self.kernel.folders)]
        self.kernel.listed(folder, self.kernel.wait(self.kernel.ask_to_list(folder, room)), lambda: True)

    @precondition(lambda self: self.kernel.folders)
    @rule(which=st.integers(0, 1 << 20))
    def close_folder(self, which: int) -> None:
        self.kernel.close_folder(self.kernel.folders[which % len(self.kernel.folders)])

    @rule(some=SOME)
    def drop_dentries(self, some: list[int]) -> None:
        for which in some:
            if paths := self.kernel.droppable():
                path = paths[which % len(paths)]
                if path:
                    del self.kernel.dentries[path]

    @rule(some=SOME)
    def evict_inodes(self, some: list[int]) -> None:
        nodeids = self.kernel.evictable()
        self.kernel.evict(
            list(dict.fromkeys(nodeids[which % len(nodeids)] for which in some)) if nodeids else []
        )

    @rule(some=SOME, folder=st.sampled_from(FOLDERS), room=ROOM)
    def everything_at_once(self, some: list[int], folder: tuple[bytes, ...], room: int) -> None:
        """The kernel forgets inodes while lookups and a listing are under way."""
        kernel = self.kernel
        if folder and kernel.walk(folder) is None:
            return
        opened = kernel.open_folder(folder)
        assert opened is not None
        children = [path for path in ALL if path[:-1] == folder and path not in kernel.dentries]
        asked = {
            path: kernel.ask_to_look_up(path) for path in children[:: max(len(children) // len(some), 1)]
        }
        listing = kernel.ask_to_list(opened, room)
        self.evict_inodes(some)
        for path, unique in asked.items():
            kernel.looked_up(path, kernel.wait(unique))
        kernel.listed(opened, kernel.wait(listing), lambda: True)
        self.evict_inodes(some)

    def teardown(self) -> None:
        try:
            if hasattr(self, "served"):
                for path in ALL[::7]:
                    self.kernel.check(path)
                self.kernel.forget_everything()
                assert self.served.held() == 0
        finally:
            self.stack.close()


TestReferences = pytest.mark.logs("a call was answered (ENOTSUP|EIO)")(References.TestCase)
TestReferences.settings = settings(max_examples=EXAMPLES, stateful_step_count=40, deadline=None)


def test_each_path_is_right_after_everything_was_listed_forgotten_and_listed_again() -> None:
    with serving(FOREST, 3, 63, bytes(32)) as served:
        for _ in range(2):
            for path in ALL:
                served.kernel.check(path)
            for folder in FOLDERS:
                served.kernel.list_all(folder, 4096)
            for path in ALL:
                served.kernel.check(path)
            served.kernel.forget_everything()
            assert served.held() == 0
    assert {expected.kind for expected in FOREST.expected.values()} == {FILE, DIRECTORY, LINK, BAD}


@pytest.mark.parametrize("waits", [True, False])
def test_stored_bytes_are_right_and_never_go_into_an_open_file(waits: bool) -> None:
    """While a program goes through a directory, the next files are stored. Here it makes no pause, so opens
    and stores come at the same time."""
    stored = 0
    for _ in range(5):
        with serving(FOREST, 1000, 63, bytes(32)) as served:
            for folder in FOLDERS:
                for _ in range(2):
                    go_through(served.kernel, folder, waits)
            stored += served.kernel.stored
            served.kernel.forget_everything()
            assert served.held() == 0
    assert stored > 0, "files were stored"


def test_an_open_without_python_is_counted_though_the_kernel_forgets_the_file_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uses: list[Cid] = []
    real = Tree.used

    def used(tree: Tree, cid: Cid, size: int) -> None:
        uses.append(cids.canonical(cid))
        real(tree, cid, size)

    monkeypatch.setattr(Tree, "used", used)
    opened: list[Cid] = []
    with serving(FOREST, 1000, 63, bytes(32)) as served:
        for path in ALL:
            if FOREST.expected[path].kind == FILE:
                file = served.kernel.open(path)
                if file.handle >> 63:
                    opened.append(cids.canonical(FOREST.expected[path].cid))
                served.kernel.forget_everything()
                assert served.held() == 0
    assert uses == opened
    assert opened


def test_attributes_seen_by_one_spelling_of_a_cid_are_known_by_another() -> None:
    """A listing then carries the attributes, and the kernel does not have to look the file up."""
    with serving(FOREST, 1000, 63, bytes(32)) as served:
        kernel = served.kernel
        roots = [(cids.text(cid).encode(),) for cid in FOREST.listed]
        of_v0 = [path for path in roots if cids.text(FOREST.expected[path].cid).startswith("Qm")]
        links = [path for path in FILES if path[:-1] == roots[0] and path[-1].startswith(b"v0")]
        assert of_v0
        for path in of_v0:
            kernel.walk(path)  # the root lists its version 1
        version_1 = {path: (cids.text(cids.canonical(FOREST.expected[path].cid)).encode(),) for path in links}
        links = [path for path in links if version_1[path] in FOREST.expected]
        assert links
        for path in links:
            kernel.walk(version_1[path])  # the directory links its version 0
        kernel.forget_everything()
        kernel.list_all((), 1 << 16)
        kernel.list_all(roots[0], 1 << 16)
        assert all(path in kernel.dentries for path in (*of_v0, *links))


def large_folder() -> tuple[Forest, tuple[bytes, ...], nodes.Shard]:
    """A HAMT of 6,000 names in a forest of its own, its path, and its root."""
    heap, made = Blocks(), Forest()
    names = sorted((b"%06d" % number for number in range(6000)), key=hamt.hash64)
    root = heap.trie(names)
    shard = nodes.parse(root, heap.block(root))
    assert isinstance(shard, nodes.Shard)
    made.dag.blocks = heap.by_hash
    folder = (cids.text(root).encode(),)
    made.expected = {folder: Expected(DIRECTORY, root, names=tuple(names))} | {
        (*folder, name): Expected(FILE, cids.EMPTY, claimed=1) for name in names
    }
    return made, folder, shard


def test_a_listing_that_fails_half_way_gives_the_entries_before_and_then_the_error() -> None:
    """The daemon counts only the entries that the kernel was given."""
    broken, folder, root = large_folder()
    broken.dag.blocks[cids.multihash(root.links[200].cid)] = b"not a shard"
    for room in (4096, 50_000, 1 << 20):
        with serving(broken, 1000, 63, bytes(32)) as served:
            kernel = served.kernel
            opened = kernel.open_folder(folder)
            assert opened is not None
            given: list[bytes] = []
            while not (answer := kernel.wait(kernel.ask_to_list(opened, room)))[0]:
                some = kernel.listed(opened, answer, lambda: True)
                assert some
                given += some
            assert answer[0] == errno.EIO
            assert 2000 < len(given) < 6000
            kernel.forget_everything()
            assert served.held() == 0


def test_a_waiting_reader_does_not_delay_another_with_the_same_handle() -> None:
    made, folder, root = large_folder()
    with serving(made, 1000, 63, bytes(32)) as served:
        kernel = served.kernel
        kernel.list_all(folder, 4096)
        first, second = kernel.open_folder(folder), kernel.open_folder(folder)
        assert first is not None
        assert second is not None
        assert first.handle == second.handle, "C opens it, since the kernel has its listing"
        kernel.listed(first, kernel.wait(kernel.ask_to_list(first, 4096)), lambda: True)
        served.memory.hold_back(root.links[200].cid)
        first.offset = 200 << 55
        waiting = kernel.ask_to_list(first, 4096)
        for _ in range(10):
            assert kernel.listed(second, kernel.wait(kernel.ask_to_list(second, 4096)), lambda: True)
        served.memory.held_back.clear()
        assert kernel.listed(first, kernel.wait(waiting), lambda: True)
        kernel.forget_everything()
        assert served.held() == 0
