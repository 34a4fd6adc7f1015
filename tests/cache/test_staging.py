"""Staging files, as worker threads see them."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipfsfuse.cache.store import staging as stagings
from ipfsfuse.cache.store.staging import Extents, Staging, StagingEntry
from tests.cache.standin import Chain, make_file
from tests.cache.test_budget import own_filesystem


@contextlib.contextmanager
def staging_on_own_disk(folder: Path, size: int) -> Iterator[Staging]:
    with own_filesystem(folder, size):
        staging = Staging(folder / "staging")
        try:
            yield staging
        finally:
            staging.folder.close()


@pytest.mark.parametrize("how", ["written", "cloned"])
def test_a_first_write_that_fails_leaves_no_file(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file would be taken for a part of a file by the next start."""
    file, leaves, content = make_file(Chain(), 1 << 20, 1 << 19)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with staging_on_own_disk(tmp_path / "disk", 2 << 20) as staging:
        filler = tmp_path / "disk" / "of-another-program"
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(2 << 20))
        entry = StagingEntry(file.cid, file.size, extents=Extents(), proved=Extents())
        if how == "written":
            grown, error = staging.write(entry, 0, [content[: 1 << 19]])
            assert (grown, error and error.errno) == (0, errno.ENOSPC)
        else:  # a file system that a test mounts can't share extents
            monkeypatch.setattr(staging, "_share_each", lambda _copy, _leaves, _files: 1)
            monkeypatch.setattr(stagings, "share_extents", full)
            with pytest.raises(OSError, match="No space"):
                staging.clone(entry, leaves[:1], ["block"])
        assert list(staging.path.iterdir()) == []
        filler.unlink()
        for leaf in leaves:
            part = content[leaf.offset : leaf.offset + leaf.size]
            assert staging.write(entry, leaf.offset, [part]) == (leaf.size, None)
        assert next(staging.path.iterdir()).read_bytes() == content


def test_a_later_write_that_fails_keeps_what_was_written_before(tmp_path: Path) -> None:
    file, leaves, content = make_file(Chain(), 1 << 20, 1 << 19)
    with staging_on_own_disk(tmp_path / "disk", 768 << 10) as staging:
        entry = StagingEntry(file.cid, file.size, extents=Extents(), proved=Extents())
        assert staging.write(entry, 0, [content[: 1 << 19]]) == (1 << 19, None)
        assert isinstance(staging.write(entry, 1 << 19, [content[1 << 19 :]])[1], OSError)
        assert staging.read(entry, leaves[0])[:2] == (content[: 1 << 19], True)


@pytest.mark.parametrize("fails", ["sharing", "reading"])
def test_bytes_that_a_failed_clone_took_are_counted_by_the_next_write(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the budget counts too little."""
    file, leaves, content = make_file(Chain(), 1 << 20, 1 << 19)
    staging = Staging(tmp_path / "staging")
    entry = StagingEntry(file.cid, file.size, extents=Extents(), proved=Extents())
    counted = staging.write(entry, 0, [content[: 1 << 19]])[0]

    def share(_source: int, to: int, size: int, offset: int) -> None:
        os.pwrite(to, content[offset : offset + size // 2], offset)
        if fails == "sharing":
            raise OSError(errno.EIO, "Input/output error")

    def read(*_args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(staging, "_share_each", lambda _copy, _leaves, _files: 1)
    monkeypatch.setattr(stagings, "share_extents", share)
    if fails == "reading":
        monkeypatch.setattr(staging, "_read_into_buffers", read)
    with pytest.raises(OSError, match="Input/output error"):
        staging.clone(entry, leaves[1:], ["block"])
    grown, error = staging.write(entry, 1 << 19, [content[1 << 19 :]])
    assert error is None
    assert counted + grown == next(staging.path.iterdir()).stat().st_blocks * 512


def test_a_file_is_read_while_it_gets_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, leaves, content = make_file(Chain(), 2 << 16)
    staging = Staging(tmp_path / "staging")
    entry = staging.entries[file.cid] = StagingEntry(file.cid, file.size, extents=Extents(), proved=Extents())
    assert staging.write(entry, 0, [content])[1] is None
    read: list[tuple[bytes, bool] | Exception] = []

    def reader() -> None:
        try:
            data, right, _digests = staging.read(entry, leaves[1])
            read.append((data, right))
        except OSError as exc:
            read.append(exc)

    thread = threading.Thread(target=reader)
    rename = os.rename

    def renamed_and_read(old: str, new: str, **folders: int) -> None:
        """Renames the file, and starts the reader before the entry says that the file is renamed."""
        rename(old, new, **folders)
        thread.start()
        thread.join(0.2)  # it may wait for the lock of the entry, which this thread holds

    monkeypatch.setattr(os, "rename", renamed_and_read)
    staging.finish(entry)
    thread.join()
    assert read == [(content[1 << 16 :], True)]
