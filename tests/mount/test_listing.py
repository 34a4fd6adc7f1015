"""Listings: the names in the root, resuming at any offset, types, and inode numbers."""

import os
import subprocess

from tests.mount.conftest import Sample
from tests.mounting import Home


def test_the_root_lists_added_content(sample: Sample) -> None:
    assert os.listdir(sample.mount.path) == [sample.cid]


def test_ls_a_shows_dot_and_dot_dot(sample: Sample) -> None:
    names = subprocess.run(
        ["ls", "-a", sample.root], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert names[:2] == [".", ".."]


def test_dot_dot_leads_to_the_parent(sample: Sample) -> None:
    assert os.stat(sample.root / "dir" / "nested" / "..").st_ino == os.stat(sample.root / "dir").st_ino
    assert os.stat(sample.root / "..").st_ino == os.stat(sample.mount.path).st_ino
    listed = {entry.name: entry.inode() for entry in os.scandir(sample.root / "dir")}
    assert listed["same.txt"] == os.stat(sample.root / "hello.txt").st_ino


def test_a_file_has_one_inode_for_all_paths_and_a_directory_one_for_each_path(home: Home) -> None:
    tree = home.folder / "tree"
    for name in ("a", "b"):
        (tree / name / "sub").mkdir(parents=True)
        (tree / name / "sub" / "file").write_text("same\n")
    cid = home.add(tree)
    numbers = []
    for _ in range(2):  # the second time with another daemon
        with home.mounted() as mount:
            a, b = mount.path / cid / "a", mount.path / cid / "b"
            assert os.stat(a / "sub/file").st_ino == os.stat(b / "sub/file").st_ino
            assert len({os.stat(path).st_ino for path in (a, b, a / "sub", b / "sub")}) == 4
            numbers.append([os.stat(path).st_ino for path in (a, b, a / "sub", a / "sub/file")])
            assert sorted(os.listdir(a / "sub")) == sorted(os.listdir(b / "sub")) == ["file"]
    assert numbers[0] == numbers[1]


def test_a_listing_resumes_at_any_offset(home: Home) -> None:
    folder = home.folder / "many"
    folder.mkdir()
    for number in range(3000):
        (folder / f"file-{number:05}").write_text(str(number))
    cid = home.add(folder)
    with home.mounted() as mount:
        script = """
import ctypes, sys
libc = ctypes.CDLL(None); libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long; libc.telldir.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]; libc.readdir.argtypes = [ctypes.c_void_p]
d = libc.opendir(sys.argv[1].encode())
def name():
    e = libc.readdir(d)
    return ctypes.string_at(e + 19) if e else None
places, names = [], []
while True:
    at, found = libc.telldir(d), name()
    if found is None: break
    places.append(at); names.append(found)
assert len(names) == 3002 and len(set(names)) == 3002, len(names)
for index in (3001, 17, 2999, 0, 1500, 2, 1):
    libc.seekdir(d, places[index])
    assert name() == names[index], index
print("resumed")
"""
        done = subprocess.run(
            ["python3", "-c", script, str(mount.path / cid)], capture_output=True, text=True
        )
        assert done.stdout == "resumed\n", done.stderr
        assert sorted(os.listdir(mount.path / cid)) == sorted(os.listdir(folder))


def test_entries_carry_the_type_if_the_link_tells_it(sample: Sample) -> None:
    entries = {entry.name: entry for entry in os.scandir(sample.root)}
    assert entries["hello.txt"].is_file(follow_symlinks=False)
    assert entries["dir"].is_dir()
    assert entries["link"].is_symlink()


def test_add_and_rm_are_seen_at_once(home: Home) -> None:
    file = home.folder / "file"
    file.write_text("one\n")
    with home.mounted() as mount:
        assert os.listdir(mount.path) == []
        cid = home.add(file)
        assert os.listdir(mount.path) == [cid]
        assert (mount.path / cid).read_text() == "one\n"
        home.run("rm", cid)
        assert os.listdir(mount.path) == []
