"""Staging files, as worker threads see them."""

import os
import threading
from pathlib import Path

import pytest

from ipfsfuse.cache.store.staging import Entry, Extents, Staging
from tests.cache.standin import Chain, make_file


def test_a_file_is_read_while_it_gets_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, leaves, content = make_file(Chain(), 2 << 16)
    staging = Staging(tmp_path / "staging")
    entry = staging.entries[file.cid] = Entry(file.cid, file.size, extents=Extents(), proved=Extents())
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
        """The first reader comes after the renaming, before anyone was told of it."""
        rename(old, new, **folders)
        thread.start()
        thread.join(0.2)  # it may wait for what holds the entry: us

    monkeypatch.setattr(os, "rename", renamed_and_read)
    staging.finish(entry)
    thread.join()
    assert read == [(content[1 << 16 :], True)]
