"""Small blocks on disk: directories, interior nodes, links, files of up to 64 KiB.

They lie one behind the other in packs, files of about 1 MiB that are written once and leave whole; the index
says where. (In SQLite rows of their own they would be written twice, and pages that hold one row and a half
cost up to 1.8 times the bytes.) A pack is a sequence of CAR sections (varint length, CID, block), so that
what was written in the moment before a crash, or all of it where the index is lost, is found by reading the
packs.

Concurrency: the event loop's, but for the functions under "in a thread". Appending is the store's business,
one at a time. Rows wait in `pending` and are written behind the reads.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.cache.store.folder import Subfolder, is_our_own
from ipfsfuse.cache.store.index import Index, Statements
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid
from ipfsfuse.fileio.files import write_all

PACK = ".pack"
_NAME = re.compile(r"([1-9][0-9]{0,17})\.pack")
MAX_OPEN = 64
"""Packs kept open for reading."""
_HEAD = 160
"""Bytes that hold the length and the CID of a section: no allowed digest is longer than 128."""


class Place(NamedTuple):
    pack: int
    at: int
    size: int


class PackSet:
    """Packs that are filled one after the other."""

    def __init__(self) -> None:
        self.packs: list[int] = []

    @property
    def pack(self) -> int:
        """The one being filled, 0 where there is none yet."""
        return self.packs[-1] if self.packs else 0


class Section(NamedTuple):
    """One block as it lies in a pack."""

    cid: Cid
    data: bytes
    head: int
    """Where in `data` the block begins."""


def section(cid: Cid, block: bytes) -> Section:
    head = varint.put(len(cid) + len(block)) + cid
    return Section(cid, head + block, len(head))


class Packs:
    def __init__(self, path: Path, index: Index, limit: int) -> None:
        """`limit`: bytes after which a new pack is begun. Raises StoreFailed, OSError."""
        self.folder = Subfolder(path)
        self._index = index
        self.limit = limit
        self._files: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        """Bytes written of each pack that is there."""
        self.last = 0
        """The highest number in use."""
        self.pending: dict[bytes, Place | None] = {}
        """What the index does not say yet; None for what it shall forget."""
        self._unindexed: set[int] = set()
        self._gone: list[tuple[bytes, int]] = []
        self._gone_packs: list[tuple[int]] = []

    # -- on the event loop -----------------------------------------------------------------------------------

    def find(self, key: bytes) -> Place | None:
        """Where the block of a multihash lies. Raises what the index raises."""
        place = self.pending.get(key)
        if place is None and key not in self.pending:
            row = self._index.row("SELECT pack, at, size FROM blocks WHERE key = ?", (key,))
            place = Place(*row) if row is not None and all(type(number) is int for number in row) else None
        if place is None or not 0 <= place.at <= place.at + place.size <= self.sizes.get(place.pack, -1):
            return None  # evicted; or a bit turned in the row, for SQLite has no checksums
        return place

    def read(self, place: Place) -> bytes:
        """What is stored at `place`: unproved. Raises OSError."""
        file = self._files.get(place.pack)
        if file is None:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            file = self._files[place.pack] = self.open(place.pack, os.O_RDONLY)
        return os.pread(file, place.size, place.at)

    def choose(self, packs: "PackSet", size: int) -> int:
        """The pack of `packs` that the next `size` bytes go to."""
        held = self.sizes.get(packs.pack)
        if held is None or held + size > self.limit:
            self.last += 1
            packs.packs.append(self.last)
        return packs.pack

    def note(self, pack: int, at: int, sections: Iterable[Section]) -> None:
        """`sections` were written to `pack`, one behind the other, the first of them at `at`."""
        for cid, data, head in sections:
            self.pending[cids.multihash(cid)] = Place(pack, at + head, len(data) - head)
            at += len(data)
        self.sizes[pack] = at
        self._unindexed.add(pack)

    def forget(self, key: bytes) -> None:
        """The index shall not find `key` any more."""
        self.pending[key] = None

    def unindexed_in(self, pack: int) -> list[bytes]:
        """The multihashes of what lies in `pack` and is not in the index yet."""
        return [key for key, place in self.pending.items() if place is not None and place.pack == pack]

    def close_pack(self, pack: int) -> None:
        """Before it is removed."""
        self.sizes.pop(pack, None)
        if (file := self._files.pop(pack, None)) is not None:
            os.close(file)
        for key in self.unindexed_in(pack):
            del self.pending[key]
        self._gone_packs.append((pack,))

    def drop_empty(self, pack: int) -> None:
        """Removes the file of a pack that holds nothing: what an append that failed may have left."""
        if not self.sizes.get(pack):
            self.sizes.pop(pack, None)
            with contextlib.suppress(OSError):
                self.folder.unlink(_name(pack))

    def forget_all(self, pack: int, held: Iterable[Cid]) -> None:
        """`pack`, which held these, was removed."""
        self._gone += [(cids.multihash(cid), pack) for cid in held]

    def unwritten(self) -> tuple[dict[bytes, Place | None], Statements]:
        """What is pending, and the statements that write it."""
        batch = dict(self.pending)
        places = [(key, *place) for key, place in batch.items() if place is not None]
        gone = [(key,) for key, place in batch.items() if place is None]
        sizes = [(pack, self.sizes[pack]) for pack in self._unindexed if pack in self.sizes]
        forgotten, packs = self._gone, self._gone_packs
        self._unindexed.clear()
        self._gone, self._gone_packs = [], []
        return batch, [
            ("DELETE FROM blocks WHERE key = ? AND pack = ?", forgotten),
            ("DELETE FROM packs WHERE pack = ?", packs),
            ("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", places),
            ("DELETE FROM blocks WHERE key = ?", gone),
            ("INSERT OR REPLACE INTO packs VALUES (?, ?)", sizes),
        ]

    def written(self, batch: dict[bytes, Place | None]) -> None:
        """`batch` is in the index now."""
        for key, place in batch.items():
            if self.pending.get(key, batch) is place:
                del self.pending[key]

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    # -- in a thread -----------------------------------------------------------------------------------------

    def read_apart(self, place: Place) -> bytes:
        """As `read`, without the files kept open, which are the event loop's."""
        file = self.open(place.pack, os.O_RDONLY)
        try:
            return os.pread(file, place.size, place.at)
        finally:
            os.close(file)

    def path(self, pack: int) -> Path:
        """For messages."""
        return self.folder.path / _name(pack)

    def open(self, pack: int, flags: int) -> int:
        """A descriptor of a pack. Raises OSError."""
        return self.folder.open(_name(pack), flags)

    def write(self, pack: int, at: int, data: bytes) -> None:
        """Appends sections. Small ones are written on the event loop: into the page cache, 10 us."""
        file = self.open(pack, os.O_WRONLY | os.O_CREAT)
        try:
            write_all(file, data, at)
        finally:
            os.close(file)

    def scan(self) -> list[tuple[int, os.stat_result]]:
        """The packs that an earlier run left. Links that have the name of a pack are removed; strays are left
        alone."""
        found, strays = [], []
        for name in self.folder.names():
            matched, info = _NAME.fullmatch(name), self.folder.stat(name)
            if matched is None or stat.S_ISDIR(info.st_mode):
                strays.append(name)
            elif is_our_own(info):
                found.append((int(matched[1]), info))
            else:
                self.folder.unlink(name)
        self.folder.report_strays(strays)
        return sorted(found)

    def sections(self, pack: int, start: int = 0) -> Iterator[tuple[Cid, Place]]:
        """(CID, place) of what `pack` holds from `start`, as far as it can be read."""
        with (
            contextlib.suppress(OSError, Malformed, NotACid),
            open(self.open(pack, os.O_RDONLY), "rb", buffering=0) as file,
        ):
            end, at = os.fstat(file.fileno()).st_size, start
            while at < end:
                head = os.pread(file.fileno(), _HEAD, at)
                length, behind = varint.get(head, 0)
                cid, block = cids.decode_prefix(head, behind)
                size = length - (block - behind)
                if size < 0 or at + block + size > end:
                    return
                yield cid, Place(pack, at + block, size)
                at += block + size

    def remove(self, pack: int) -> tuple[list[Cid], int]:
        """Deletes the file; returns what it held, as far as that could be read, and how far that was."""
        held, end = [], 0
        for cid, place in self.sections(pack):
            held.append(cid)
            end = place.at + place.size
        with contextlib.suppress(FileNotFoundError):
            self.folder.unlink(_name(pack))
        return held, end


def _name(pack: int) -> str:
    return f"{pack}{PACK}"


# -- repair, in a thread: sections are written anew where they lie, so that a repaired block takes no new room


def rewrite_block(packs: Packs, place: Place, data: bytes, head: int) -> bool:
    """Writes the block of the section `data`, which begins at `head` in it, at `place`. False, with nothing
    written, where another head stands before that place: then it is the place that is wrong. Raises
    OSError."""
    if place.size != len(data) - head or place.at < head:
        return False
    file = packs.open(place.pack, os.O_RDWR)
    try:
        if os.pread(file, head, place.at - head) != data[:head]:
            return False
        write_all(file, memoryview(data)[head:], place.at)
        return True
    finally:
        os.close(file)


def head_before(packs: Packs, key: bytes, place: Place) -> tuple[Cid, bool]:
    """The CID of the block with the multihash `key` at `place`, and whether the head before it is as it
    should be.

    A multihash does not tell the codec: where the head is damaged, it is the one that fewer turned bits
    account for. Raises OSError."""
    file = packs.open(place.pack, os.O_RDONLY)
    try:
        found: dict[Cid, int] = {}
        for cid in (cids.make(codec, key) for codec in cids.CODECS):
            head = _head(cid, place)
            found[cid] = _turned(head, os.pread(file, len(head), max(0, place.at - len(head))))
    finally:
        os.close(file)
    intact = [cid for cid, turned in found.items() if not turned]
    if intact:
        return intact[0], True
    # raw or dag-pb: hardly anything else is asked for
    return min(list(found)[:2], key=found.__getitem__), False


def rewrite_head(packs: Packs, cid: Cid, place: Place) -> None:
    """Writes the head of a section whose block was found right at `place`. Raises OSError."""
    head = _head(cid, place)
    file = packs.open(place.pack, os.O_WRONLY)
    try:
        write_all(file, head, place.at - len(head))
    finally:
        os.close(file)


def _head(cid: Cid, place: Place) -> bytes:
    _cid, data, begins = section(cid, bytes(place.size))
    return data[:begins]


def _turned(one: bytes, other: bytes) -> int:
    """Bits that differ."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()
