"""Keeping the library small: packs that no root needs go, packs that are partly unneeded are written anew,
and many small packs become one, since a look-up asks one pack after the other (3 us each) and each costs a
descriptor.

Blocking. All of it under the library's exclusive lock, so never while anything is added.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.car import Section
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, StoreFailed
from ipfsfuse.sources.files import libraryfolder
from ipfsfuse.sources.files.carbuild import sections
from ipfsfuse.sources.files.carfile import CarFile, Place
from ipfsfuse.sources.files.carwriter import CarWriter
from ipfsfuse.sources.files.libraryfolder import Entry
from ipfsfuse.sources.files.packs import Packs

WORTHWHILE = 4
"""A pack is written anew if at least a quarter of it goes."""

SMALL = 32 << 20
"""Packs of fewer bytes than this are brought together..."""
MANY = 64
"""...when there are so many of them."""


def drop_unneeded(folder: Path, entries: Iterable[Entry]) -> set[str]:
    """Removes the packs that no root names. Gives the names of those that stay. Raises OSError."""
    needed = {pack for entry in entries for pack in entry.packs}
    names = libraryfolder.pack_names(folder)
    for name in names - needed:
        (folder / name).unlink(missing_ok=True)
    return names & needed


def rewrite(folder: Path, entries: Iterable[Entry], packs: Packs, names: Iterable[str]) -> None:
    """Writes the packs `names` anew without the blocks that no root reaches, each under its own name, where
    worthwhile.

    Changes nothing at all if a root can't be walked to its end. Raises StoreFailed.
    """
    live = _reachable(entries, packs)
    for name in names:
        _rewrite_one(folder, folder / name, live)


def _rewrite_one(folder: Path, path: Path, live: set[bytes]) -> None:
    pack = CarFile(path)
    keep = [found for found in sections(pack) if cids.multihash(found.cid) in live]
    kept = sum(found.end - found.start for found in keep)
    total = pack.data_end - pack.sections_offset
    if (total - kept) * WORTHWHILE >= total:
        _write(folder, [(pack, keep)], path.name)


def merge_small(folder: Path, entries: Iterable[Entry]) -> None:
    """Makes one pack of all small ones if those are many. Raises OSError, SourceFailed; the library is whole
    at any moment."""
    paths = [
        path for name in libraryfolder.pack_names(folder) if (path := folder / name).stat().st_size < SMALL
    ]
    if len(paths) < MANY:
        return
    packs = [CarFile(path) for path in paths]
    merged = _write(folder, [(pack, sections(pack)) for pack in packs])
    old = {pack.name for pack in packs}
    for entry in entries:
        if not old.isdisjoint(entry.packs):
            libraryfolder.write_root(
                folder, replace(entry, packs=tuple(sorted({*entry.packs, merged} - old)))
            )
    for path in paths:
        path.unlink()


def _write(
    folder: Path, contents: Iterable[tuple[CarFile, Iterable[Section]]], name: str | None = None
) -> str:
    """A new pack of those sections in the place of the pack `name`, or under a name of its own, which is
    returned."""
    temporary, fd = libraryfolder.new_temporary(folder)
    path = temporary.with_suffix(libraryfolder.PACK) if name is None else folder / name
    try:
        writer = CarWriter(fd, folder)
        for pack, keep in contents:
            for found in keep:
                writer.add(found.cid, pack.read(Place(found.block, found.end - found.block)))
        writer.finish()
        os.rename(temporary, path)
        libraryfolder.sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(fd)
    return path.name


def _reachable(entries: Iterable[Entry], packs: Packs) -> set[bytes]:
    """The multihashes of all blocks below the roots. Raises StoreFailed where one is missing or can't be
    read."""
    live: set[bytes] = set()
    for entry in entries:
        waiting = [entry.cid]
        while waiting:
            cid = waiting.pop()
            multihash = cids.multihash(cid)
            if multihash in live or cids.inline(cid) is not None:
                continue
            live.add(multihash)
            waiting += _links(cid, packs)
    return live


def _links(cid: Cid, packs: Packs) -> Iterator[Cid]:
    if cids.codec(cid) != cids.DAG_PB:
        return
    try:
        found = packs.find(cids.multihash(cid))
        if found is None:
            raise StoreFailed(f"the library lacks {cids.text(cid)}: add it again; nothing was compacted")
        block = found.file.read(found.place)
        cids.verify(cid, block)
        links = dagpb.decode(block).links
    except StoreFailed:
        raise
    except IpfsFuseError as exc:
        raise StoreFailed(f"the library can't be compacted: {exc}") from exc
    for link in links:
        yield link.cid
