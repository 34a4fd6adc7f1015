"""The library's folder has a marker and belongs to one user. Other files in it, or behind its links, are left
alone."""

import gc
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ipfsfuse import __version__
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import NotFound, SourceFailed, StoreFailed
from ipfsfuse.sources.local.car_file import CarFile, CarLocation
from ipfsfuse.sources.local.library import Library, NewRoot
from tests.sources.libraries import add, dag, packs

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")


def contents(path: Path) -> dict[str, object]:
    """All files below `path`, with their modes, owners and content."""
    found: dict[str, object] = {}
    for each in sorted([path, *path.rglob("*")]):
        info = each.lstat()
        content = os.readlink(each) if each.is_symlink() else each.read_bytes() if each.is_file() else ""
        found[str(each)] = (info.st_mode, info.st_uid, content)
    return found


def refused(folder: Path) -> str:
    """The message with which the folder is refused. It is one line that says what to do."""
    with pytest.raises(StoreFailed) as raised:
        Library(folder)
    line = str(raised.value)
    assert "\n" not in line
    assert any(
        todo in line for todo in ("another --library", "give --library a folder of its own", "run chmod")
    ), line
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A library with one root."""
    library = Library(tmp_path / "library")
    add(library, dag(range(20)))
    library.close()
    return tmp_path / "library"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "precious.car").write_bytes(b"precious" * 1000)
    return outside


def test_a_new_library_is_marked(folder: Path) -> None:
    assert (folder / "format").read_text() == "ipfsfuse library 1\n"


def test_a_library_without_a_marker_gets_one(folder: Path) -> None:
    (folder / "format").unlink()
    (folder / "20260101T000000-0123abcd.tmp").touch()
    library = Library(folder)
    assert (folder / "format").read_text() == "ipfsfuse library 1\n"
    assert list(library.roots()) == [dag(range(20))[-1][0]]


@pytest.mark.parametrize("name", ["mine.car", "notes.txt", "20260101T000000-0123abcd.CAR"])
def test_a_folder_with_other_files_and_no_marker_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "cars").mkdir(mode=0o700)
    (tmp_path / "cars" / name).write_bytes(b"mine")
    before = contents(tmp_path)
    assert f"holds {name}" in refused(tmp_path / "cars")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["ipfsfuse library 2\n", "something else\n", ""])
def test_a_library_with_an_unknown_marker_is_refused_and_left_alone(folder: Path, text: str) -> None:
    (folder / "format").write_text(text)
    before = contents(folder)
    line = refused(folder)
    assert ("format 2" in line and __version__ in line) == (text.startswith("ipfsfuse"))
    assert contents(folder) == before


def test_files_that_are_not_ours_survive_every_removal_and_compaction(folder: Path) -> None:
    """A user's own CAR files in a library are neither read nor removed, whatever their names are."""
    strays = {
        "mine.car",
        "mine.tmp",
        "roots/notes.txt",
        "20260101T000000-0123abcd.car.bak",
        "x20260101T000000-0123abcd.car",
    }
    for name in strays:
        (folder / name).write_bytes(b"mine")
    os.link(folder / "mine.car", folder / "20260101T00000-0123abcd.car")
    library = Library(folder)
    more = dag(range(100, 120))
    add(library, more)
    library.remove(more[-1][0])
    library.remove(dag(range(20))[-1][0])
    library.compact()
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {*strays, "format", "lock", "20260101T00000-0123abcd.car"}


@pytest.mark.logs("space was not given back")
def test_a_compaction_that_fails_writes_to_no_other_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next file that is opened gets the number of the descriptor that the compaction was writing to."""
    library = Library(folder)
    kept, removed = dag(range(200, 220)), dag(range(300, 400))
    with library.open_writer() as writer:
        for cid, block in (*kept, *removed):
            writer.put(cid, block)
        writer.commit([NewRoot(blocks[-1][0], "thing", 1) for blocks in (kept, removed)])
    reads = 0
    read = CarFile.read

    def fail(self: CarFile, location: CarLocation) -> bytes:
        nonlocal reads
        reads += 1
        if reads > 10:
            raise SourceFailed("the disk gives no more", "disk")
        return read(self, location)

    monkeypatch.setattr(CarFile, "read", fail)
    library.remove(removed[-1][0])
    assert reads == 11, "the compaction failed in the middle of a pack"
    with (tmp_path / "precious").open("w+b", buffering=0) as file:
        file.write(b"precious")
        gc.collect()
        file.seek(0)
        assert file.read() == b"precious"


def link_to_a_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "precious.car")


def link_to_a_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "none")


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside / "precious.car", path)


def a_folder(path: Path, _outside: Path) -> None:
    path.mkdir()
    (path / "kept").write_text("kept")


def a_pipe(path: Path, _outside: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _outside: Path) -> None:
    folder_fd = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder_fd}/{path.name}")
    os.close(folder_fd)


def garbage(path: Path, _outside: Path) -> None:
    path.write_bytes(b"\xff\x00 garbage\n" * 300)


def an_empty_file(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")


def of_another_user(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")
    os.chown(path, 12345, 12345)


def open_to_all(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o666)


PLANTED = [
    link_to_a_file,
    link_to_a_folder,
    link_to_nothing,
    hard_link,
    a_folder,
    a_pipe,
    a_socket,
    garbage,
    an_empty_file,
]
PLANTED += [of_another_user, open_to_all]
NAMES = [
    "format",
    "lock",
    "roots",
    "20260101T000000-0123abcd.car",
    "20260101T000000-0123abcd.tmp",
    "roots/{cid}",
    "stray",
    "roots/stray",
]


@as_root
@pytest.mark.logs(".")
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_changes_whatever_is_planted_at_a_name(
    folder: Path, victim: Path, name: str, plant: Callable[[Path, Path], None]
) -> None:
    """The library is refused in one line, or the planted file is left alone and the rest stays readable."""
    blocks = dag(range(20))
    path = folder / name.format(cid=cids.text(dag(range(50, 60))[-1][0]))
    if path.is_dir():
        subprocess.run(["rm", "-r", str(path)], check=True)
    else:
        path.unlink(missing_ok=True)
    plant(path, victim)
    outside, planted = contents(victim), contents(path) if path.is_dir() and not path.is_symlink() else {}
    try:
        library = Library(folder)
    except StoreFailed:
        before = contents(folder)
        refused(folder)
        assert contents(folder) == before
    else:
        more = dag(range(100, 120))
        add(library, more)
        if name != "roots":
            assert [library.block(cid) for cid, _block in blocks] == [block for _cid, block in blocks]
        library.entries()
        library.remove(more[-1][0])
        if name == "roots/{cid}" and path.is_file() and not path.is_symlink():
            with pytest.raises(StoreFailed, match="nothing is removed that it may need"):
                library.compact()
        else:
            library.compact()
        with pytest.raises(NotFound):
            library.remove(dag(range(50, 60))[-1][0])
        library.close()
        if "stray" in name:
            assert os.path.lexists(path)
    assert contents(victim) == outside
    assert planted.items() <= (contents(path) if planted else {}).items()


def test_a_library_behind_a_link_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert "is a symbolic link" in refused(tmp_path / "link")


def test_a_root_file_with_another_name_than_its_cid_is_ignored(folder: Path) -> None:
    (root,) = (folder / "roots").iterdir()
    (folder / "roots" / "another").write_bytes(root.read_bytes())
    library = Library(folder)
    assert len(library.roots()) == 1
    assert len(packs(library)) == 1
