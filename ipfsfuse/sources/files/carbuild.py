"""Indexes for CAR files that bring none: built once by walking the sections, kept in a folder by the file's
identity.

Blocking. Several processes may build the same index at once: each writes its own temporary file and renames
it. Only the sections' heads are read where blocks are large, and memory is bounded (`carsort`) for a file of
any size.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ipfsfuse.dag import car, hashes
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.car import Section
from ipfsfuse.errors import Malformed, SourceFailed, Unsupported
from ipfsfuse.sources.files.carfile import CarFile, Identity, disk_errors, read_disk
from ipfsfuse.sources.files.carsort import RecordSorter

IndexProgress = Callable[[int, int], None]
"""Called now and then with (bytes passed, bytes in all) while an index is built."""

_SMALL_WINDOW, _LARGE_WINDOW = 4 << 10, 256 << 10
_REPORT_EVERY = 64 << 20
_WHOLE = b"ipfsfuse-index-1\n"
_DAMAGED = b"ipfsfuse-index-1-damaged\n"


def sections(file: CarFile) -> Iterator[Section]:
    """Every whole section, with places in the file. Raises Malformed where it can't go on, behind the last
    whole one."""
    end = min(file.data_end, file.identity.size)
    at = file.sections_offset
    window, start = b"", at
    while at < end:
        if at + car.HEAD_BYTES > start + len(window) and start + len(window) < end:
            size = _SMALL_WINDOW if at >= start + len(window) + _SMALL_WINDOW else _LARGE_WINDOW
            window, start = read_disk(file.fd, at, min(size, end - at)), at
        # a section of no bytes ends a CAR. Source: go-car's ZeroLengthSectionAsEOF
        if window[at - start] == 0:
            if not _only_zeros(file.fd, at, end):
                raise Malformed(f"the CAR has no section at {at}, and something behind that")
            break
        found = car.section(window, at - start, start)
        if found.end > end:
            raise Malformed(f"the CAR is cut short in the section at {at}")
        yield found
        at = found.end
    if end < file.data_end:
        raise Malformed(f"the CAR is cut short: {file.data_end - end} bytes are missing")


def _only_zeros(fd: int, start: int, end: int) -> bool:
    """Whether a file has nothing but zeros from `start` to `end`. Holes are not read."""
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole from here on
                return True
            raise
        piece = read_disk(fd, at, min(_LARGE_WINDOW, end - at)) if at < end else b""
        if piece.count(0) != len(piece):
            return False
        at += len(piece) or end
    return True


def ensure_index(file: CarFile, folder: Path, progress: IndexProgress | None) -> bool:
    """Gives `file` an index: its own, the one kept in `folder`, or a new one there. Raises SourceFailed.

    False if the file is damaged: what is whole before the damage can be read.
    """
    if file.use_own_index():
        return True
    path = folder / "{:x}-{:x}-{}-{}.index".format(*file.identity)
    with disk_errors(f"the index of {file.path} in {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _build(file, path, progress)
            _sweep(folder, path, file.identity)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    head = read_disk(fd, 0, len(_DAMAGED))
    whole = head.startswith(_WHOLE)
    try:
        file.use_index(fd, len(_WHOLE if whole else _DAMAGED))
    except SourceFailed:
        path.unlink(missing_ok=True)  # it is built anew next time
        raise
    return whole


def _build(file: CarFile, path: Path, progress: IndexProgress | None) -> None:
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as out, RecordSorter(path.parent) as sorter:
            whole = _collect(file, sorter, progress)
            out.write(_WHOLE if whole else _DAMAGED)
            sorter.write(out)
            out.flush()
            os.fsync(out.fileno())
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _collect(file: CarFile, sorter: RecordSorter, progress: IndexProgress | None) -> bool:
    """Adds every block that can be asked for. False if the file breaks off."""
    total = min(file.data_end, file.identity.size)
    reported = 0
    try:
        for found in sections(file):
            _add(sorter, found, file.data_offset)
            if progress is not None and (found.end - reported >= _REPORT_EVERY or found.end == total):
                reported = found.end
                progress(found.end, total)
    except Malformed:
        return False
    return True


def _add(sorter: RecordSorter, found: Section, base: int) -> None:
    multihash = cids.multihash(found.cid)
    try:
        hashes.check_allowed(multihash)
    except Unsupported:
        return  # nobody will ask for it
    if hashes.inline(multihash) is None:
        sorter.add(multihash, found.start - base)


def _sweep(folder: Path, keep: Path, identity: Identity) -> None:
    """Removes the indexes of what the same file was before."""
    name = re.compile("{:x}-{:x}-[0-9]+-[0-9]+\\.index".format(*identity))
    for old in folder.iterdir():
        if old != keep and name.fullmatch(old.name) and stat.S_ISREG(old.lstat().st_mode):
            old.unlink(missing_ok=True)
