"""If `add` refuses a file or ends early, the library stays as it was. Refused files are named."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ipfsfuse.errors import AddFailed, StoreFailed, UsageError
from ipfsfuse.importer.add import AddOptions, add
from ipfsfuse.sources.local.library import Library
from tests.importer.checks import ADD_STDIN, MIB, PLAIN, names_of, refuse, refuse_changed, snapshot


def test_an_add_that_is_killed_leaves_the_library_as_it_was(library: Library, tree: Path) -> None:
    list(add([str(tree)], PLAIN, library))
    before = snapshot(library)
    with subprocess.Popen(
        [sys.executable, "-c", ADD_STDIN, library.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        process.stdin.write(bytes(5 * MIB))
        process.stdin.flush()
        process.send_signal(signal.SIGKILL)
    library.compact()  # every `add` does this first
    assert snapshot(library) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_add_leaves_the_library_as_it_was(
    interruption: type[BaseException], library: Library, tree: Path
) -> None:
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


def test_a_file_that_grows_while_it_is_read_is_refused(tree: Path, library: Library) -> None:
    file = tree / "b" / "c"
    refuse_changed(library, file, lambda: os.truncate(file, 4 * MIB), f"{file} grew while it was read")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tree: Path, library: Library) -> None:
    file = tree / "b" / "c"
    refuse_changed(library, file, lambda: os.truncate(file, 2 * MIB), f"{file} shrank while it was read")


def test_a_file_that_is_written_while_it_is_read_is_refused(tree: Path, library: Library) -> None:
    file = tree / "b" / "c"
    refuse_changed(library, file, lambda: os.utime(file, ns=(1, 1)), f"{file} changed while it was read")


def test_a_file_that_vanishes_before_its_turn_is_named(tree: Path, library: Library) -> None:
    refuse_changed(library, tree, (tree / "l").unlink, f"{tree / 'l'}: No such file")


def test_a_directory_that_vanishes_before_its_turn_is_named(tree: Path, library: Library) -> None:
    refuse_changed(library, tree, (tree / "z").rmdir, f"{tree / 'z'}: No such file")


def test_a_path_that_does_not_exist_is_named(tmp_path: Path, library: Library) -> None:
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
    with tempfile.TemporaryDirectory() as folder:  # only this user may enter the folders above tmp_path
        Path(folder).chmod(0o755)
        file = Path(folder) / "file"
        file.write_bytes(b"x")
        file.chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", AS_OTHER, folder], capture_output=True, text=True, check=False
        )
        assert f"AddFailed: {file}: Permission denied" in done.stderr


AS_OTHER = """
import os, sys
from ipfsfuse.importer.add import AddOptions, add
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
list(add([sys.argv[1]], AddOptions(), None))
"""


def test_a_name_that_is_not_utf_8_is_refused(tree: Path, library: Library) -> None:
    with open(os.fsencode(tree) + b"/b/caf\xe9", "wb"):
        pass
    refuse(library, tree, r"caf\\xe9': the name is not UTF-8")


def test_a_closed_standard_input_is_named(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AddFailed, match="standard input is closed"):
        list(add(["-"], AddOptions(), library))


def test_two_paths_of_one_name_can_not_be_wrapped(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    both = [str(tree / "a"), str(tmp_path / "a")]
    with pytest.raises(UsageError, match="two PATHs are called 'a'"):
        list(add(both, AddOptions(wrap=True), None))
    assert names_of(list(add(both, AddOptions(), None))) == ["a", "a"]


def test_an_add_without_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match="PATH"):
        list(add([], AddOptions(), None))


def test_a_full_disk_gives_one_line_of_error_and_leaves_nothing(tree: Path, tmp_path: Path) -> None:
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


def test_a_library_without_its_folder_of_roots_gives_store_failed(tree: Path, library: Library) -> None:
    (library.folder / "roots").rmdir()
    with pytest.raises(StoreFailed):
        list(add([str(tree)], PLAIN, library))


def test_a_file_that_has_content_though_its_size_is_0_is_refused(library: Library) -> None:
    refuse(library, Path("/proc/version"), "/proc/version has content but says it is empty")
