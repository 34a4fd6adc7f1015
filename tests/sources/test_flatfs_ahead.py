"""Reading ahead in a Kubo repository: the first links of a block, for a program that follows one path."""

import ctypes
import gc
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Link
from ipfsfuse.errors import WrongBlock
from ipfsfuse.fileio.flatfs import BlockFiles
from ipfsfuse.sources.http.client import HttpSettings
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.local import kubo_repo
from ipfsfuse.sources.local.kubo_repo import Flatfs
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.streams import Hashed
from tests.dag.blocks import Blocks
from tests.kubo.node import Node
from tests.mounting import Home

ALONE = 0.03
"""Seconds without a request, after which a block counts as asked for alone (`flatfs.c`)."""


class Repository:
    """Blocks that a test writes, in the layout of flatfs."""

    def __init__(self, folder: Path) -> None:
        self.blocks = Flatfs(folder, 2)
        self.heap = Blocks()

    def put(self, cid: Cid) -> Path:
        path = Path(self.blocks._path(cid))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.heap.block(cid))
        return path

    def directory(self, count: int, *others: Link) -> tuple[Cid, list[Cid]]:
        """Writes a directory with `count` small files, and the files, but not `others`. Returns the CIDs."""
        files = [self.heap.leaf(b"file %d" % number * 1000) for number in range(count)]
        links = [Link(cid, b"%d.txt" % number, 1000) for number, cid in enumerate(files)]
        root = self.heap.directory([*links, *others])
        for cid in (root, *files):
            self.put(cid)
        return root, files

    def ask_alone(self, cid: Cid) -> bytes | None:
        """Takes a block as the event loop does, after a while without requests."""
        time.sleep(ALONE)
        return self.take(cid)

    def take(self, cid: Cid) -> bytes | None:
        found = self.blocks.take_hashed(cid)
        return found.block if isinstance(found, Hashed) else found

    def watch(self, cid: Cid) -> "OpenWatch":
        return OpenWatch(Path(self.blocks._path(cid)))


class OpenWatch:
    """Notices if a file is opened from now on. Source: inotify(7)."""

    _IN_OPEN = 0x20
    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, path: Path) -> None:
        self._inotify = self._libc.inotify_init1(os.O_CLOEXEC)
        assert self._libc.inotify_add_watch(self._inotify, os.fsencode(path), self._IN_OPEN) > 0

    def opened_within(self, seconds: float) -> bool:
        """Whether the file is opened within so many seconds. Ends the watch."""
        ready, _, _ = select.select([self._inotify], [], [], seconds)
        os.close(self._inotify)
        return bool(ready)


SOON, NEVER = 20.0, 0.3
"""Seconds to wait for a read that must come, and for one that must not: the machine may be busy."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubo_repo, "READ_WAIT_SECONDS", 10.0)  # the machine may be busy


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_the_children_of_a_small_directory_are_read_ahead(repository: Repository) -> None:
    root, files = repository.directory(4)
    watches = [repository.watch(cid) for cid in files]
    assert repository.ask_alone(root) == repository.heap.block(root)
    assert all(each.opened_within(SOON) for each in watches)
    assert repository.take(files[3]) == repository.heap.block(files[3])


def test_the_first_blocks_of_a_file_that_is_asked_for_are_read_ahead(repository: Repository) -> None:
    large = repository.heap.balanced([bytes([number]) * 70_000 for number in range(9)], 3, True)
    root, _files = repository.directory(1, Link(large, b"large", 700_000))
    inner = Cid(kubo_repo.nodes.links(large, repository.heap.block(large))[0])
    leaves = list(map(Cid, kubo_repo.nodes.links(inner, repository.heap.block(inner))))
    for cid in (large, inner, *leaves):
        repository.put(cid)
    at_large, at_inner, at_first, at_second = map(repository.watch, (large, inner, *leaves[:2]))
    assert repository.ask_alone(root) is not None
    assert at_large.opened_within(SOON)
    assert repository.take(large) is not None
    assert at_inner.opened_within(SOON)
    assert at_first.opened_within(SOON)
    assert not at_second.opened_within(NEVER)
    for cid in (inner, leaves[0]):
        assert repository.take(cid) == repository.heap.block(cid)


def test_a_files_leaves_are_not_read_ahead_if_its_size_may_be_all_that_is_wanted(
    repository: Repository,
) -> None:
    large = repository.heap.balanced([bytes([number]) * 70_000 for number in range(3)], 3, True)
    root, _files = repository.directory(1, Link(large, b"large", 210_000))
    alone = repository.heap.balanced([bytes([number]) * 80_000 for number in range(3)], 3, True)
    for file, asked in ((large, root), (alone, alone)):
        first = Cid(kubo_repo.nodes.links(file, repository.heap.block(file))[0])
        for cid in (file, first):
            repository.put(cid)
        watch = repository.watch(first)
        assert repository.ask_alone(asked) is not None, "its size may be all that is wanted"
        assert not watch.opened_within(NEVER)


def test_a_large_directory_is_not_followed(repository: Repository) -> None:
    root, files = repository.directory(5)
    watch = repository.watch(files[0])
    assert repository.ask_alone(root) is not None
    assert not watch.opened_within(NEVER)


def test_a_small_directory_that_is_asked_for_among_other_blocks_is_not_followed(
    repository: Repository,
) -> None:
    root, files = repository.directory(3)
    other = repository.heap.leaf(b"other")
    repository.put(other)
    for _attempt in range(10):
        watch = repository.watch(files[0])
        time.sleep(ALONE)
        began = time.monotonic()
        assert repository.take(other) is not None
        early = repository.take(root)
        if time.monotonic() - began < ALONE / 2:  # otherwise it may count as asked for alone
            assert early is None
            assert repository.blocks.read(root) == repository.heap.block(root)
            assert not watch.opened_within(NEVER)
            return
        watch.opened_within(0)
        time.sleep(1.1)  # until the blocks that this attempt read ahead are discarded
    pytest.skip("the machine is too busy")


def test_a_walk_down_many_small_directories_is_followed_for_16_blocks(repository: Repository) -> None:
    below, path = repository.heap.leaf(b"leaf"), []
    for number in range(40):
        below = repository.heap.directory([Link(below, b"%d" % number, 10)])
        path.append(below)
        repository.put(below)
    for _attempt in range(10):
        assert repository.ask_alone(path[-1]) is not None
        came, last, longest = 0, time.monotonic(), 0.0
        for cid in reversed(path[:-1]):
            came += repository.take(cid) is not None
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if longest < ALONE / 2:  # otherwise one of them counted as asked for alone
            assert came == 16
            return
        time.sleep(1.1)  # until the blocks that this attempt read ahead are discarded
    pytest.skip("the machine is too busy")


def test_a_block_that_was_read_ahead_in_vain_is_discarded(repository: Repository) -> None:
    root, files = repository.directory(1)
    watch = repository.watch(files[0])
    assert repository.ask_alone(root) is not None
    assert watch.opened_within(SOON)
    time.sleep(1.2)
    repository.put(files[0]).unlink()
    assert repository.take(files[0]) is None


@pytest.mark.logs("wrong bytes")
def test_a_block_that_was_read_ahead_is_verified_like_any_other(repository: Repository) -> None:
    root, files = repository.directory(2)
    path = Path(repository.blocks._path(files[1]))
    path.write_bytes(b"!" + path.read_bytes()[1:])

    async def main() -> None:
        pool = SourcePool([Kubo("kubo", HttpSettings(), blocks=repository.blocks)])
        await trio.sleep(ALONE)
        assert (await pool.get(root)).block == repository.heap.block(root)
        await trio.sleep(0.1)
        with pytest.raises(WrongBlock):
            await pool.get(files[1])
        assert (await pool.get(files[0])).block == repository.heap.block(files[0])
        await pool.aclose()

    trio.run(main)


@pytest.mark.logs("content is blocked")
def test_a_block_that_was_read_ahead_is_not_given_once_content_is_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(kubo_repo, "DENYLIST_CHECK_SECONDS", 1000.0)
    repository = Repository(tmp_path / "blocks")
    (tmp_path / "blocks").mkdir()
    repository.blocks._denylists = kubo_repo.Denylists(tmp_path)
    root, files = repository.directory(1)
    assert not repository.blocks._denylists.any()
    assert repository.ask_alone(root) is not None
    (tmp_path / "denylists").mkdir()
    (tmp_path / "denylists" / "one.deny").touch()
    monkeypatch.setattr(kubo_repo, "DENYLIST_CHECK_SECONDS", 0.0)
    assert repository.take(files[0]) is None
    assert repository.blocks.read(files[0]) is None


@pytest.mark.parametrize("version", [0, 1])
def test_looking_up_a_name_reads_its_block_and_nothing_below(repository: Repository, version: int) -> None:
    function, context = repository.blocks.files.name_listener
    listener = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)(function)
    root, files = repository.directory(1)
    spelled = cids.text(root if version else Cid(cids.multihash(root))).encode()
    for name in (b"", b"x" * 59, b"b" * 59, b"Q" * 46, b"0" * 46, b"z" * 46, spelled[:-1], spelled):
        at_root, below = repository.watch(root), repository.watch(files[0])
        time.sleep(ALONE)
        listener(context, name, len(name))
        assert at_root.opened_within(SOON if name == spelled else 0.01) == (name == spelled)
        assert not below.opened_within(NEVER if name == spelled else 0.0)
    assert repository.take(root) == repository.heap.block(root)


def test_names_that_are_not_opened_do_not_stop_others_from_being_read_ahead(repository: Repository) -> None:
    function, context = repository.blocks.files.name_listener
    listener = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)(function)
    file = repository.heap.leaf(b"file")
    roots = [repository.heap.directory([Link(file, b"%d" % number, 4)]) for number in range(20)]
    time.sleep(ALONE)
    for root in roots:
        repository.put(root)
        watch, name = repository.watch(root), cids.text(root).encode()
        listener(context, name, len(name))
        assert watch.opened_within(SOON)


@pytest.mark.parametrize("characters", [0, 1, 2, 54, 55, 1_000, 2**31, 2**40])
def test_folder_names_of_any_length_do_no_harm(tmp_path: Path, characters: int) -> None:
    blocks = Flatfs(tmp_path, characters)
    cid = Blocks().leaf(b"leaf")
    path = Path(blocks._path(cid))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"leaf")
    assert blocks.read(cid) == b"leaf"


def test_it_can_be_freed_while_it_reads_ahead(tmp_path: Path) -> None:
    for number in range(50):
        repository = Repository(tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        root, _files = repository.directory(4)
        repository.ask_alone(root)
        del repository
    gc.collect()


def test_bytes_that_only_look_like_a_link_are_not_followed(repository: Repository) -> None:
    """A directory with an attribute that has the bytes of a link, before its links."""
    child, other = (repository.heap.leaf(name * 1000) for name in (b"child", b"other"))
    link, like_a_link = (b"\x0a\x24" + cid + b"\x12\x04name\x18\x01" for cid in (child, other))
    data = b"\x08\x01\x7a" + bytes([len(like_a_link)]) + like_a_link
    root = repository.heap.put(b"\x0a" + bytes([len(data)]) + data + b"\x12" + bytes([len(link)]) + link)
    for cid in (root, child, other):
        repository.put(cid)
    at_child, at_other = map(repository.watch, (child, other))
    assert repository.ask_alone(root) is not None
    assert at_child.opened_within(SOON)
    assert not at_other.opened_within(NEVER)


@given(st.binary(max_size=300), st.integers(0, 60))
def test_any_bytes_may_be_a_block(tmp_path_factory: pytest.TempPathFactory, block: bytes, at: int) -> None:
    """All that a block links, or seems to link, may be read."""
    folder = tmp_path_factory.mktemp("any")
    files = BlockFiles(os.fspath(folder), 2)
    block = block[:at] + b"\x12\x2e\n\x24\x01\x55\x12\x20" + block[at:]
    digest = b"\x01" * 32
    path = Path(Flatfs(folder, 2)._path(cids.make(cids.DAG_PB, b"\x12\x20" + digest)))
    path.parent.mkdir()
    path.write_bytes(block)
    time.sleep(0.021)
    read = files.take(digest, cids.DAG_PB, 5.0)
    assert not isinstance(read, int)
    assert read is not None
    assert read.block == block


def directory_of(node: Node, tmp_path: Path) -> tuple[Home, str, Path]:
    """A home that uses `node`, the CID of a directory of one file at the node, and the path of its block."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_bytes(os.urandom(10_000))
    root = node.cmd("add", "-Q", "-r", "--cid-version=1", tmp_path / "one")
    home = Home(tmp_path / "home")
    home.env["IPFS_PATH"] = str(node.repo)
    return home, root, Path(Flatfs(node.repo / "blocks", 2)._path(cids.parse(root)))


def test_a_lookup_in_the_mounts_root_starts_to_read_at_once(own_node: Node, tmp_path: Path) -> None:
    """A block that is already staged is read there too, because Python is not asked first."""
    home, root, path = directory_of(own_node, tmp_path)
    with home.mounted("--from", "kubo") as mount:
        assert os.listdir(mount.path / root) == ["file"]
    watch = OpenWatch(path)
    with home.mounted("--from", "kubo") as mount:
        assert os.listdir(mount.path / root) == ["file"]
    assert watch.opened_within(SOON)


class HangingFiles:
    """Each open of one of `paths` waits until this is closed, as on a hanging disk. Source: fanotify(7)."""

    _CLASS_CONTENT, _CLOEXEC, _ADD, _OPEN_PERM, _CWD = 4, 1, 1, 0x10000, -100
    _libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, paths: Sequence[Path]) -> None:
        self._group = self._libc.fanotify_init(self._CLASS_CONTENT | self._CLOEXEC, os.O_RDONLY)
        if self._group < 0:
            pytest.skip("only root can make files hang, by fanotify")
        for path in paths:
            mask = ctypes.c_uint64(self._OPEN_PERM)
            assert not self._libc.fanotify_mark(self._group, self._ADD, mask, self._CWD, os.fsencode(path))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_exc: object) -> None:
        os.close(self._group)


def look_up(repository: Repository, cid: Cid) -> None:
    """Does what the thread that reads the device does with a name in the root."""
    function, context = repository.blocks.files.name_listener
    listener = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)(function)
    name = cids.text(cid).encode()
    listener(context, name, len(name))


def test_the_event_loop_waits_only_once_for_a_disk_that_hangs(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a program that looks up many names at once would stop the event loop once for each."""
    monkeypatch.setattr(kubo_repo, "READ_WAIT_SECONDS", 1.0)
    roots = [repository.heap.directory([Link(Blocks().leaf(b"%d" % at), b"1", 1)]) for at in range(6)]
    with HangingFiles([repository.put(root) for root in roots]):
        for root in roots:
            look_up(repository, root)
        began = time.monotonic()
        assert [repository.take(root) for root in roots] == [None] * 6
        assert time.monotonic() - began < 3.0
    for root in roots:
        assert repository.blocks.read(root) == repository.heap.block(root)


def test_a_block_that_was_missing_when_it_was_read_ahead_is_looked_for_again(repository: Repository) -> None:
    root, files = repository.directory(1)
    path = Path(repository.blocks._path(files[0]))
    path.rename(path.with_suffix(".later"))
    assert repository.ask_alone(root) is not None
    time.sleep(0.1)
    path.with_suffix(".later").rename(path)
    assert repository.blocks.read(files[0]) == repository.heap.block(files[0])


@pytest.mark.logs("content is blocked")
def test_nothing_is_read_ahead_while_content_is_blocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "blocks").mkdir()
    (tmp_path / "denylists").mkdir()
    repository = Repository(tmp_path / "blocks")
    repository.blocks._denylists = kubo_repo.Denylists(tmp_path)
    monkeypatch.setattr(kubo_repo, "DENYLIST_CHECK_SECONDS", 0.0)
    root, _files = repository.directory(1)
    assert repository.blocks.read(root) is not None
    (tmp_path / "denylists" / "one.deny").touch()
    assert repository.blocks.read(root) is None
    watch = repository.watch(root)
    time.sleep(ALONE)
    look_up(repository, root)
    assert repository.ask_alone(root) is None
    assert not watch.opened_within(NEVER)
    (tmp_path / "denylists" / "one.deny").unlink()
    assert repository.blocks.read(root) is not None
    watch = repository.watch(root)
    time.sleep(ALONE)
    look_up(repository, root)
    assert watch.opened_within(SOON)


def test_a_block_is_read_once_if_denylists_are_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(kubo_repo, "DENYLIST_CHECK_SECONDS", 0.0)
    (tmp_path / "blocks").mkdir()
    repository = Repository(tmp_path / "blocks")
    repository.blocks._denylists = kubo_repo.Denylists(tmp_path)
    root, _files = repository.directory(1)
    watch = repository.watch(root)
    look_up(repository, root)
    assert watch.opened_within(SOON)
    watch = repository.watch(root)
    time.sleep(0.1)
    assert repository.take(root) is None
    assert repository.blocks.read(root) == repository.heap.block(root)
    assert not watch.opened_within(NEVER)


def run_python(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


READ_AT_EXIT = """
import atexit, sys
atexit.register(lambda: print(files.read(b"\\1" * 32, 0x55)))  # it is called last
from ipfsfuse.fileio.flatfs import BlockFiles
files = BlockFiles(sys.argv[1], 2)
files.read(b"\\1" * 32, 0x55)
"""


def test_a_worker_thread_may_still_read_while_the_process_ends(repository: Repository) -> None:
    """The end of the process does not wait for a thread that reads from a hanging disk."""
    path = Path(repository.blocks._path(cids.make(cids.RAW, b"\x12\x20" + b"\1" * 32)))
    path.parent.mkdir()
    path.write_bytes(b"still there")
    assert "still there" in run_python(READ_AT_EXIT, repository.blocks._folder)


END_AFTER_FORK = """
import gc, os, sys, time
from ipfsfuse.fileio.flatfs import BlockFiles
files = BlockFiles(sys.argv[1], 2)
files.take(b"\\1" * 32, 0x55, 1.0)
if not os.fork():
    began = time.monotonic()
    del files
    gc.collect()
    print(time.monotonic() - began, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_child_process_does_not_wait_for_its_parents_threads(tmp_path: Path) -> None:
    assert float(run_python(END_AFTER_FORK, tmp_path)) < 0.9


def test_a_block_outside_the_allow_list_is_not_read(own_node: Node, tmp_path: Path) -> None:
    home, root, path = directory_of(own_node, tmp_path)
    watch = OpenWatch(path)
    allowed = cids.text(cids.EMPTY)
    with home.mounted("--from", "kubo", "--allow", allowed) as mount, pytest.raises(PermissionError):
        os.listdir(mount.path / root)
    assert not watch.opened_within(NEVER)


@pytest.mark.logs("content is blocked")
def test_an_old_look_for_denylists_does_not_count_while_a_new_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, may_return = threading.Event(), threading.Event()

    def slow(_folder: Path) -> bool:
        looking.set()
        return may_return.wait(SOON)

    monkeypatch.setattr(kubo_repo, "_has_denylist", slow)
    (tmp_path / "blocks").mkdir()
    repository = Repository(tmp_path / "blocks")
    repository.blocks._denylists = kubo_repo.Denylists(tmp_path)
    root, _files = repository.directory(1)
    other = threading.Thread(target=repository.blocks.read, args=(root,))
    other.start()
    assert looking.wait(SOON)
    given = repository.ask_alone(root)
    may_return.set()
    other.join()
    assert given is None
