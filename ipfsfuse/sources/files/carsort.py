"""Index records sorted in bounded memory: some 25 MB, the rest in a temporary file that has no name.

Blocking; for one thread at a time.
"""

import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ipfsfuse.dag import carindex, hashes

_MAX_HELD = 250_000
_READ = 64 << 10

Key = tuple[int, int]
"""(hash function, width of a record)."""


class RecordSorter:
    """Collects (multihash, offset) and writes them as a MultihashIndexSorted. A context manager: its file
    goes with it."""

    def __init__(self, folder: Path, max_held: int = _MAX_HELD) -> None:
        """`folder` is where what does not fit into memory (`max_held` records) goes."""
        self._max_held = max_held
        self._held: dict[Key, list[bytes]] = {}
        self._count = 0
        self._runs: dict[Key, list[tuple[int, int]]] = {}
        self._records: dict[Key, int] = {}
        self._folder = folder
        self._fd = -1
        self._written = 0

    def __enter__(self) -> "RecordSorter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def add(self, multihash: bytes, offset: int) -> None:
        """`offset` is counted from where the CAR data begins. Raises OSError if the disk is full."""
        code, digest = hashes.split(multihash)
        key = code, len(digest) + 8
        self._held.setdefault(key, []).append(carindex.encode_record(digest, offset))
        self._records[key] = self._records.get(key, 0) + 1
        self._count += 1
        if self._count >= self._max_held:
            self._spill()

    def _spill(self) -> None:
        if self._fd < 0:
            self._fd, name = tempfile.mkstemp(dir=self._folder)
            os.unlink(name)
        for key, held in self._held.items():
            held.sort()
            self._runs.setdefault(key, []).append((self._written, len(held)))
            data = memoryview(b"".join(held))
            while data:
                count = os.pwrite(self._fd, data, self._written)
                self._written += count
                data = data[count:]
        self._held.clear()
        self._count = 0

    def write(self, out: BinaryIO) -> None:
        """The whole index. Raises OSError."""
        widths: dict[int, list[int]] = {}
        for code, width in sorted(self._records):
            widths.setdefault(code, []).append(width)
        out.write(carindex.head(len(widths)))
        for code, of_code in widths.items():
            out.write(carindex.code_head(code, len(of_code)))
            for width in of_code:
                out.write(carindex.bucket_head(width, self._records[code, width]))
                out.writelines(self._sorted((code, width)))

    def _sorted(self, key: Key) -> Iterable[bytes]:
        held = sorted(self._held.get(key, ()))
        runs = [_records(self._fd, at, count, key[1]) for at, count in self._runs.get(key, ())]
        return heapq.merge(held, *runs) if runs else held


def _records(fd: int, at: int, count: int, width: int) -> Iterator[bytes]:
    """`count` records of `width` bytes at `at` of a file."""
    step = _READ // width * width
    for start in range(at, at + count * width, step):
        chunk = os.pread(fd, min(step, at + count * width - start), start)
        yield from (chunk[i : i + width] for i in range(0, len(chunk), width))
