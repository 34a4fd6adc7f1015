"""Sections of a pack, written anew where they lie: a mended block takes no new room, and stays kept where it was.

Concurrency: everything here blocks, and belongs in a worker thread.
"""

import os
from pathlib import Path

from ipfsfuse.cache.store.blocks import Place, section
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fileio.calls import write_all


def rewrite_block(pack: Path, place: Place, data: bytes, head: int) -> bool:
    """Writes the block of the section `data`, which begins at `head` in it, at `place`. False, with nothing written, where
    another head stands before that place: then it is the place that is wrong. Raises OSError."""
    if place.size != len(data) - head or place.at < head:
        return False
    file = os.open(pack, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(file, head, place.at - head) != data[:head]:
            return False
        write_all(file, memoryview(data)[head:], place.at)
        return True
    finally:
        os.close(file)


def head_before(pack: Path, key: bytes, place: Place) -> tuple[Cid, bool]:
    """The CID of the block with the multihash `key` at `place`, and whether the head before it is as it should be.

    A multihash does not tell the codec: where the head is damaged, it is the one that fewer turned bits account for.
    Raises OSError."""
    file = os.open(pack, os.O_RDONLY | os.O_CLOEXEC)
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
    return min(list(found)[:2], key=found.__getitem__), False  # raw or dag-pb: hardly anything else is asked for


def rewrite_head(pack: Path, cid: Cid, place: Place) -> None:
    """Writes the head of a section whose block was found right at `place`. Raises OSError."""
    head = _head(cid, place)
    file = os.open(pack, os.O_WRONLY | os.O_CLOEXEC)
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
