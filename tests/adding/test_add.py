"""`add`: what it tells, what it stores, what it refuses; whatever ends it early leaves the library as it was."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ipfsfuse.adding import Added, AddOptions, add
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.build import UNIXFS_V0_2015
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import AddFailed, IpfsFuseError, StoreFailed, UsageError
from ipfsfuse.sources.library import Library
from tests.adding.trees import Bytes, Dir, To, write

PLAIN = AddOptions()
MIB = 1 << 20


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    write(Dir({"a": Bytes(10), "b": Dir({"c": Bytes(3 * MIB + 1, 2), ".h": Bytes(1)}), "l": To("b/c"), "z": Dir()}), path)
    return path


def told(found: list[Added]) -> list[str]:
    return [added.name for added in found]


def content(library: Library, cid: Cid) -> object:
    """A DAG read back from the library, block by block, each verified: bytes, or a dict of names."""
    block = library.block(cid)
    cids.verify(cid, block)
    if cids.codec(cid) == cids.RAW:
        return block
    node = dagpb.decode(block)
    if node.links and not node.links[0].name:
        return b"".join(bytes(child) for link in node.links if isinstance(child := content(library, link.cid), bytes))
    return {link.name.decode(): content(library, link.cid) for link in node.links} if node.data == b"\x08\x01" else node.data


def snapshot(library: Library) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in library.folder.rglob("*") if path.is_file() and path.name != "lock"}


def refuse(library: Library, path: Path, message: str, options: AddOptions = PLAIN) -> None:
    """Adding `path` fails with `message` and changes nothing."""
    before = snapshot(library)
    with pytest.raises(IpfsFuseError, match=message) as caught:
        list(add([str(path)], options, library))
    assert "\n" not in str(caught.value)
    assert snapshot(library) == before


def test_a_tree_is_told_children_first_and_is_all_there(tree: Path, library: Library) -> None:
    found = list(add([str(tree)], PLAIN, library))
    assert told(found) == ["tree/a", "tree/b/c", "tree/b", "tree/l", "tree/z", "tree"]
    expected = {
        "a": (tree / "a").read_bytes(),
        "b": {"c": (tree / "b" / "c").read_bytes()},
        "l": b"\x08\x04\x12\x03b/c",
        "z": {},
    }
    assert content(library, found[-1].cid) == expected
    (entry,) = library.entries()
    assert (entry.cid, entry.name) == (found[-1].cid, "tree")
    assert entry.size == found[-1].size > 3 * MIB


def test_a_second_add_adds_nothing(tree: Path, library: Library) -> None:
    first = list(add([str(tree)], PLAIN, library))
    before = snapshot(library)
    assert list(add([str(tree)], PLAIN, library)) == first
    assert snapshot(library) == before


def test_several_paths_are_several_roots(tree: Path, library: Library) -> None:
    found = list(add([str(tree / "a"), str(tree / "b")], PLAIN, library))
    assert told(found) == ["a", "b/c", "b"]
    assert list(library.roots()) == [found[0].cid, found[2].cid]


def test_wrapped_paths_are_one_root(tree: Path, library: Library) -> None:
    found = list(add([str(tree / "a"), str(tree / "b")], replace(PLAIN, wrap=True), library))
    assert told(found) == ["a", "b/c", "b", ""]
    assert list(library.roots()) == [found[-1].cid]
    assert content(library, found[-1].cid) == {"a": (tree / "a").read_bytes(), "b": {"c": (tree / "b" / "c").read_bytes()}}


def test_only_hash_needs_no_library_and_gives_the_same(tree: Path, library: Library) -> None:
    assert list(add([str(tree)], replace(PLAIN, only_hash=True), None)) == list(add([str(tree)], PLAIN, library))
    with pytest.raises(UsageError):
        list(add([str(tree)], PLAIN, None))


def test_names_given_as_people_give_them(tree: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "b")
    for path in (".", "../b/", "../b/.", "../../tree/b"):
        assert told(list(add([path], PLAIN, library)))[-1] == "b"
    assert len(library.roots()) == 1


def test_the_old_profile_shows_version_0_cids(tree: Path, library: Library) -> None:
    found = list(add([str(tree)], replace(PLAIN, profile=UNIXFS_V0_2015), library))
    assert all(cids.is_v0(added.cid) for added in found)
    assert list(library.roots()) == [found[-1].cid]


def test_progress_reaches_the_total(tree: Path, library: Library) -> None:
    seen: list[tuple[int, int | None, str]] = []
    list(add([str(tree)], PLAIN, library, lambda *report: seen.append(report)))
    assert seen[-1][:2] == (3 * MIB + 11, 3 * MIB + 11)
    assert [done for done, _total, _path in seen] == sorted(done for done, _total, _path in seen)
    assert {path for _done, _total, path in seen} == {str(tree / "a"), str(tree / "b" / "c")}


ADD_STDIN = """
import sys
from pathlib import Path
from ipfsfuse.adding import AddOptions, add
from ipfsfuse.dag import cid
from ipfsfuse.sources.library import Library
for added in add(["-"], AddOptions(wrap="-w" in sys.argv), Library(Path(sys.argv[1]))):
    print(cid.text(added.cid), added.name, flush=True)
"""


def test_standard_input_in_pieces_is_one_file(tmp_path: Path, library: Library) -> None:
    data = Bytes(2 * MIB + 77).read()
    (tmp_path / "file").write_bytes(data)
    with subprocess.Popen([sys.executable, "-c", ADD_STDIN, library.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        for start in range(0, len(data), 99_991):
            process.stdin.write(data[start : start + 99_991])
            process.stdin.flush()
        process.stdin.close()
        printed = process.stdout.read().decode().split()
    expected = list(add([str(tmp_path / "file")], replace(PLAIN, only_hash=True), None))[-1].cid
    assert printed == [cids.text(expected)] * 2
    assert content(library, expected) == data


def test_an_add_that_is_killed_leaves_the_library_as_it_was(library: Library, tree: Path) -> None:
    list(add([str(tree)], PLAIN, library))
    before = snapshot(library)
    with subprocess.Popen([sys.executable, "-c", ADD_STDIN, library.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(bytes(5 * MIB))
        process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    library.compact()  # as every add does first
    assert snapshot(library) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_add_leaves_the_library_as_it_was(interruption: type[BaseException], library: Library, tree: Path) -> None:
    list(add([str(tree / "a")], PLAIN, library))
    before = snapshot(library)

    def interrupt(done: int, _total: int | None, _path: str) -> None:
        if done > 2 * MIB:
            raise interruption

    with pytest.raises(interruption):
        list(add([str(tree)], PLAIN, library, interrupt))
    assert snapshot(library) == before
    steps = add([str(tree)], PLAIN, library)
    next(steps)
    steps.close()
    assert snapshot(library) == before


def at(done: int, act: Callable[[], object]) -> Callable[[int, int | None, str], None]:
    """A progress callback that does something once so much was read."""
    acted: list[object] = []

    def report(now: int, _total: int | None, _path: str) -> None:
        if now >= done and not acted:
            acted.append(act())

    return report


def changed(library: Library, path: Path, act: Callable[[], object], message: str) -> None:
    before = snapshot(library)
    with pytest.raises(AddFailed, match=message):
        list(add([str(path)], PLAIN, library, at(MIB, act)))
    assert snapshot(library) == before


def test_a_file_that_grows_while_it_is_read_is_refused(tree: Path, library: Library) -> None:
    file = tree / "b" / "c"
    changed(library, file, lambda: os.truncate(file, 4 * MIB), f"{file} grew while it was read")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tree: Path, library: Library) -> None:
    file = tree / "b" / "c"
    changed(library, file, lambda: os.truncate(file, 2 * MIB), f"{file} shrank while it was read")


def test_a_file_that_is_written_while_it_is_read_is_refused(tree: Path, library: Library) -> None:
    file = tree / "b" / "c"
    changed(library, file, lambda: os.utime(file, ns=(1, 1)), f"{file} changed while it was read")


def test_a_file_that_vanishes_before_its_turn_is_named(tree: Path, library: Library) -> None:
    changed(library, tree, (tree / "l").unlink, f"{tree / 'l'}: No such file")


def test_a_directory_that_vanishes_before_its_turn_is_named(tree: Path, library: Library) -> None:
    changed(library, tree, (tree / "z").rmdir, f"{tree / 'z'}: No such file")


def test_no_such_path(tmp_path: Path, library: Library) -> None:
    refuse(library, tmp_path / "none", f"{tmp_path / 'none'}: No such file or directory")
    refuse(library, tmp_path / "library" / "lock" / "x", "Not a directory")


def test_other_kinds_of_files_are_refused_by_name(tmp_path: Path, library: Library) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    refuse(library, folder / "fifo", f"{folder / 'fifo'} is a FIFO")
    refuse(library, folder, f"{folder / 'fifo'} is a FIFO")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        refuse(library, tmp_path / "socket", "is a socket")
    refuse(library, Path("/dev/null"), "/dev/null is a device")


def test_an_unreadable_file_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies where only this user may enter
        Path(folder).chmod(0o755)
        file = Path(folder) / "file"
        file.write_bytes(b"x")
        file.chmod(0)
        done = subprocess.run([sys.executable, "-c", AS_OTHER, folder], capture_output=True, text=True, check=False)
        assert f"AddFailed: {file}: Permission denied" in done.stderr


AS_OTHER = """
import os, sys
from ipfsfuse.adding import AddOptions, add
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
list(add([sys.argv[1]], AddOptions(only_hash=True), None))
"""


def test_a_name_that_is_not_utf_8_is_refused(tree: Path, library: Library) -> None:
    with open(os.fsencode(tree) + b"/b/caf\xe9", "wb"):
        pass
    refuse(library, tree, r"caf\\xe9': the name is not UTF-8")


def test_a_link_loop_is_a_link(tmp_path: Path, library: Library) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (added,) = add([str(tmp_path / "loop")], PLAIN, library)
    assert content(library, added.cid) == b"\x08\x04\x12\x04loop"


def test_a_tree_1000_deep(tmp_path: Path, library: Library) -> None:
    depth = 1000
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("directory", dir_fd=fd)
        below = os.open("directory", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open("file", "wb", opener=lambda name, flags: os.open(name, flags, 0o600, dir_fd=fd)) as out:
        out.write(b"down here")
    os.close(fd)
    found = list(add([str(tmp_path / "directory")], PLAIN, library))
    assert len(found) == depth + 1
    block = library.block(found[-1].cid)
    for _ in range(depth):
        block = library.block(dagpb.decode(block).links[0].cid)
    assert block == b"down here"
    subprocess.run(["rm", "-rf", tmp_path / "directory"], check=True)


def test_two_paths_of_one_name_can_not_be_wrapped(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    both = [str(tree / "a"), str(tmp_path / "a")]
    with pytest.raises(UsageError, match="two PATHs are called 'a'"):
        list(add(both, AddOptions(wrap=True, only_hash=True), None))
    assert told(list(add(both, AddOptions(only_hash=True), None))) == ["a", "a"]


def test_nothing_to_add() -> None:
    with pytest.raises(UsageError, match="PATH"):
        list(add([], AddOptions(only_hash=True), None))


def test_a_full_disk_is_one_line_and_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make a small file system")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=True)
    try:
        library = Library(small / "library")
        refuse(library, tree, "No space left on device")
        assert not list(library.folder.glob("*.tmp"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_store_failed_is_what_a_lost_folder_gives(tree: Path, library: Library) -> None:
    (library.folder / "roots").rmdir()
    with pytest.raises(StoreFailed):
        list(add([str(tree)], PLAIN, library))


def test_a_file_that_says_it_is_empty_and_is_not_is_refused(library: Library) -> None:
    refuse(library, Path("/proc/version"), "/proc/version has content but says it is empty")
