"""Frees the space in a library that no root needs, and merges small packs. All calls block."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.car import Section
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import IpfsFuseError, Malformed, SourceFailed, StoreFailed
from ipfsfuse.sources.local.car_file import CarFile, CarLocation, Found, sections
from ipfsfuse.sources.local.car_writer import CarWriter, SequentialWriter
from ipfsfuse.sources.local.library_folder import (
    LibraryEntry,
    damaged_roots,
    lost_packs,
    new_file,
    pack_names,
    read_roots,
    write_root,
)

Find = Callable[[bytes], Found | None]
"""Where the block of a multihash is in the library."""

WORTHWHILE = 4
"""A pack is rewritten if that frees at least a quarter of it."""

MIN_PACK = 32 << 20
"""Packs of fewer bytes are small."""
MANY = 64
"""So many small packs are merged."""


def compact(folder: Path, find: Find, only: Sequence[str] | None = None) -> None:
    """Frees the space of blocks that no root reaches, in the packs `only` or in all, and merges small packs.
    The caller holds the library's lock, exclusively. Raises StoreFailed, OSError."""
    entries = read_roots(folder)
    if damaged := damaged_roots(folder, entries):
        raise StoreFailed(
            f"the root {damaged[0]} can't be read, and nothing is removed that it may need: add its "
            "content again, or remove this file"
        )
    if lost := lost_packs(folder, entries):
        raise StoreFailed(
            f"the root {lost[0][0]} names the pack {lost[0][1]}, which is not there, and nothing is "
            "removed that it may need: add its content again, or remove this root"
        )
    needed = {pack for entry in entries for pack in entry.packs}
    names = pack_names(folder)
    for name in names - needed:
        (folder / name).unlink(missing_ok=True)
    staying = names & needed
    shrinking = sorted(staying if only is None else staying.intersection(only))
    damaged_packs: list[IpfsFuseError] = []
    if shrinking:
        _rewrite(folder, entries, find, shrinking, damaged_packs)
    _merge_small(folder, entries, damaged_packs)
    if damaged_packs:
        raise damaged_packs[0]


def _rewrite(
    folder: Path,
    entries: Iterable[LibraryEntry],
    find: Find,
    names: Iterable[str],
    damaged: list[IpfsFuseError],
) -> None:
    """Rewrites those of the packs `names` for which it is worthwhile, without the blocks that no root
    reaches. Each keeps its name. Adds the error of each damaged pack to `damaged`, and leaves that pack as
    it is.

    Changes nothing if a block below a root is missing. Raises StoreFailed.
    """
    live = _reachable(entries, find)
    for path in (folder / name for name in names):
        try:
            pack = CarFile(path)
            keep = [found for found in _sections(pack) if cids.multihash(found.cid) in live]
        except (SourceFailed, StoreFailed) as exc:
            damaged.append(exc)
            continue
        kept = sum(found.end - found.start for found in keep)
        total = pack.data_end - pack.sections_offset
        if (total - kept) * WORTHWHILE >= total:
            _write(folder, [(pack, keep)], path)


def _sections(pack: CarFile) -> Iterator[Section]:
    """What lies in a pack. Raises StoreFailed if it is damaged."""
    try:
        yield from sections(pack)
    except Malformed as exc:
        raise StoreFailed(f"{pack.path} is damaged, and was not compacted: {exc}") from exc


def _merge_small(folder: Path, entries: Iterable[LibraryEntry], damaged: list[IpfsFuseError]) -> None:
    """Merges the small packs if there are MANY, but no damaged one: its error is added to `damaged`. The
    library is complete at any moment.

    Raises OSError, SourceFailed."""
    paths = [path for name in pack_names(folder) if (path := folder / name).stat().st_size < MIN_PACK]
    if len(paths) < MANY:
        return
    packs = []
    for path in paths:
        try:
            pack = CarFile(path)
            for _section in _sections(pack):
                pass
            packs.append(pack)
        except (SourceFailed, StoreFailed) as exc:
            damaged.append(exc)
    if len(packs) < MANY:
        return
    merged = _write(folder, [(pack, _sections(pack)) for pack in packs])
    old = {pack.name for pack in packs}
    for entry in entries:
        if not old.isdisjoint(entry.packs):
            write_root(folder, replace(entry, packs=tuple(sorted({*entry.packs, merged} - old))))
    for pack in packs:
        pack.path.unlink()


def _write(
    folder: Path, contents: Iterable[tuple[CarFile, Iterable[Section]]], path: Path | None = None
) -> str:
    """Writes a pack of those sections, which replaces `path` or gets a new name. Returns its name."""
    with new_file(folder, path) as (fd, path):
        writer = CarWriter(SequentialWriter(fd), folder)
        try:
            for pack, keep in contents:
                for found in keep:
                    writer.add(found.cid, pack.read(CarLocation(found.block, found.end - found.block)))
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    return path.name


def _reachable(entries: Iterable[LibraryEntry], find: Find) -> set[bytes]:
    """The multihashes of all blocks below the roots. Raises StoreFailed if one is missing or can't be
    read."""
    walk = BlockWalk((entry.cid for entry in entries), None)
    for cid, _state in walk:
        walk.add(_links(cid, find), None)
    return {cids.multihash(cid) for cid in walk.seen}


def _links(cid: Cid, find: Find) -> list[Cid]:
    if cids.codec(cid) == cids.RAW:
        return []
    try:
        block = cids.inline_or_empty_block(cid)
        if block is None:
            found = find(cids.multihash(cid))
            if found is None:
                raise StoreFailed(f"the library lacks {cids.text(cid)}: add it again; nothing was compacted")
            block = found.file.read(found.location)
            cids.verify(cid, block)
        return nodes.links(cid, block)
    except StoreFailed:
        raise
    except IpfsFuseError as exc:
        raise StoreFailed(f"the library can't be compacted: {exc}") from exc
