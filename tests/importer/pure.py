"""Builds the DAG of a tree from its description, without files: for trees that are too large for a disk."""

import stat
from functools import cache

from ipfsfuse.dag.builder import NO_ATTRIBUTES, Built, FileBuilder, Profile, Stored, directory, leaf, symlink
from ipfsfuse.dag.cid import Cid
from tests.importer.trees import Bytes, Case, Entry, To


def drop(_cid: Cid, _block: bytes) -> None:
    pass


@cache
def zeros(profile: Profile, size: int) -> Built:
    return leaf(profile, bytes(size)).built


def build(case: Case) -> Cid:
    kept_mode, kept_mtime = "--preserve-mode" in case.options, "--preserve-mtime" in case.options
    profile = case.profile.with_metadata() if kept_mode or kept_mtime else case.profile
    hidden = "-H" in case.options

    def stored(entry: Entry) -> Stored:
        mode = (
            None if isinstance(entry, To) or entry.mode is None or not kept_mode else stat.S_IMODE(entry.mode)
        )
        return Stored(mode, entry.mtime if kept_mtime else None)

    def one(entry: Entry) -> Built:
        if isinstance(entry, To):
            return symlink(profile, entry.target.encode(), stored(entry), drop)
        if isinstance(entry, Bytes):
            return file(profile, entry, stored(entry))
        children = [
            (name.encode(), one(child))
            for name, child in entry.entries.items()
            if hidden or not name.startswith(".")
        ]
        return directory(profile, children, stored(entry), drop)

    top = [(name.encode(), one(entry)) for name, entry in case.top.items()]
    return directory(profile, top, NO_ATTRIBUTES, drop).cid if "-w" in case.options else top[-1][1].cid


def file(profile: Profile, entry: Bytes, stored: Stored) -> Built:
    if entry.size <= profile.chunk_size:
        return leaf(profile, entry.read(), stored).built
    builder = FileBuilder(profile, drop)
    data = b"" if entry.seed is None else entry.read()
    for start in range(0, entry.size, profile.chunk_size):
        length = min(profile.chunk_size, entry.size - start)
        builder.add(
            zeros(profile, length)
            if entry.seed is None
            else leaf(profile, data[start : start + length]).built
        )
    return builder.finish(stored)
