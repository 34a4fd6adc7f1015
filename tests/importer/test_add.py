"""`add`: its output, its progress, and the blocks that it stores."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.builder import UNIXFS_V0_2015
from ipfsfuse.importer import add as adding
from ipfsfuse.importer.add import add
from ipfsfuse.sources.local.library import Library
from tests.importer.checks import ADD_STDIN, MIB, PLAIN, content, names_of, snapshot
from tests.importer.trees import Bytes


def test_a_tree_is_listed_children_first_and_stored_in_full(tree: Path, library: Library) -> None:
    found = list(add([str(tree)], PLAIN, library))
    assert names_of(found) == ["tree/a", "tree/b/c", "tree/b", "tree/l", "tree/z", "tree"]
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
    assert names_of(found) == ["a", "b/c", "b"]
    assert list(library.roots()) == [found[0].cid, found[2].cid]


def test_wrapped_paths_are_one_root(tree: Path, library: Library) -> None:
    found = list(add([str(tree / "a"), str(tree / "b")], replace(PLAIN, wrap=True), library))
    assert names_of(found) == ["a", "b/c", "b", ""]
    assert list(library.roots()) == [found[-1].cid]
    assert content(library, found[-1].cid) == {
        "a": (tree / "a").read_bytes(),
        "b": {"c": (tree / "b" / "c").read_bytes()},
    }


def test_only_hash_needs_no_library_and_gives_the_same_cids(tree: Path, library: Library) -> None:
    assert list(add([str(tree)], PLAIN, None)) == list(add([str(tree)], PLAIN, library))


def test_a_directory_has_one_name_for_all_spellings_of_its_path(
    tree: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree / "b")
    for path in (".", "../b/", "../b/.", "../../tree/b"):
        assert names_of(list(add([path], PLAIN, library)))[-1] == "b"
    assert len(library.roots()) == 1


def test_the_old_profile_shows_version_0_cids(tree: Path, library: Library) -> None:
    found = list(add([str(tree)], replace(PLAIN, profile=UNIXFS_V0_2015), library))
    assert all(cids.text(added.cid).startswith("Qm") for added in found)
    assert list(library.roots()) == [found[-1].cid]


def test_progress_reaches_the_total(tree: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "_COUNT_AFTER", 0)
    seen: list[tuple[int, int | None, str]] = []
    list(add([str(tree)], PLAIN, library, lambda *report: seen.append(report)))
    assert seen[-1][:2] == (3 * MIB + 11, 3 * MIB + 11)
    assert [done for done, _total, _path in seen] == sorted(done for done, _total, _path in seen)
    assert {path for _done, _total, path in seen} == {str(tree / "a"), str(tree / "b" / "c")}


def test_a_short_add_does_not_count_the_bytes_first(tree: Path, library: Library) -> None:
    seen: list[int | None] = []
    list(add([str(tree)], PLAIN, library, lambda _done, total, _path: seen.append(total)))
    assert seen[0] is None


def test_standard_input_in_pieces_is_one_file(tmp_path: Path, library: Library) -> None:
    data = Bytes(2 * MIB + 77).read()
    (tmp_path / "file").write_bytes(data)
    with subprocess.Popen(
        [sys.executable, "-c", ADD_STDIN, library.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        for start in range(0, len(data), 99_991):
            process.stdin.write(data[start : start + 99_991])
            process.stdin.flush()
        process.stdin.close()
        printed = process.stdout.read().decode().split()
    expected = list(add([str(tmp_path / "file")], PLAIN, None))[-1].cid
    assert printed == [cids.text(expected)] * 2
    assert content(library, expected) == data


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
