"""Whole files are read and replaced, and many files are examined by one call."""

import os
from pathlib import Path

import pytest

from ipfsfuse.fileio.files import read_file, replace_text, stat_files


def test_read_file_gives_none_for_a_large_file_or_one_that_is_not_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(8))
    names = ["absent", "file", "link", "folder", "pipe", "large", "absent/below", "file"]
    found = [read_file(str(tmp_path / name), 7) for name in names]
    assert found == [None, b"content", None, None, None, None, None, b"content"]


def test_replace_text_follows_no_link_and_leaves_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "page").symlink_to("secret")
    replace_text(tmp_path / "page", "\u00e4")
    assert (tmp_path / "page").read_text() == "\u00e4"
    assert (tmp_path / "secret").read_text() == "secret"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page", "secret"]


def test_stat_files_says_of_each_file_what_lstat_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    (tmp_path / "ünïcode").write_bytes(b"")
    os.link(tmp_path / "ünïcode", tmp_path / os.fsdecode(b"not utf-8 \xff"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    names = [*os.listdir(tmp_path), "missing"]
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = list(stat_files(folder, names))
        with pytest.raises(NotADirectoryError):
            list(stat_files(folder, ["file/below"]))
    finally:
        os.close(folder)
    assert found.pop() is None
    for name, status in zip(names, found, strict=False):
        info = (tmp_path / name).lstat()
        assert status is not None
        assert status[:5] == (info.st_mode, info.st_nlink, info.st_uid, info.st_size, info.st_blocks)
        assert status.st_mtime == pytest.approx(info.st_mtime, abs=1e-6)
