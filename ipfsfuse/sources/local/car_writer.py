"""Writes a CAR file: the header and the sections as they come, and for version 2 the index and the frame.

The calls block, and are for one thread at a time. Memory is bounded: blocks wait in at most 16 MiB of
buffers, and index records are sorted in some 25 MB, with the rest in a temporary file without a name.
"""

import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fileio.buffers import in_huge_pages
from ipfsfuse.fileio.files import Direct, write_all
from ipfsfuse.structures import Buffer

_MAX_HELD = 250_000
_READ = 64 << 10

Key = tuple[int, int]
"""(hash function, width of a record)."""


class SequentialWriter:
    """Fills an empty file from its beginning on, with `Direct`. A thread writes one buffer while the next is
    filled. For one thread at a time."""

    BUFFER = 8 << 20
    """Bytes that are written together, and half of the memory that a writer uses."""

    def __init__(self, file: int) -> None:
        """The caller closes `file`, after `close`."""
        self._file = file
        self._direct = Direct()
        self._thread = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None
        self._buffer, self._next = in_huge_pages(self.BUFFER), in_huge_pages(self.BUFFER)
        self._filled = 0
        self._offset = 0
        """Where the buffer begins in the file."""

    def write(self, data: Buffer) -> None:
        """Raises OSError, also that of an earlier write."""
        while len(data) >= (room := self.BUFFER - self._filled):
            self._buffer[self._filled :] = data[:room]
            data = memoryview(data)[room:]
            self._send()
        end = self._filled + len(data)
        self._buffer[self._filled : end] = data
        self._filled = end

    def writelines(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self.write(line)

    def _send(self) -> None:
        """Begins to write the buffer, which is full."""
        self._wait()
        try:
            self._writing = self._thread.submit(self._write, self._buffer, self._offset)
        except RuntimeError:  # no thread can be started
            self._thread.shutdown(cancel_futures=True)
            self._write(self._buffer, self._offset)
        self._buffer, self._next = self._next, self._buffer
        self._filled, self._offset = 0, self._offset + self.BUFFER

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, buffer: memoryview, offset: int) -> None:
        self._direct.write(self._file, [buffer], offset)
        # For dirty pages, this advice only starts the write to the disk: it drops none of them.
        os.posix_fadvise(self._file, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def finish(self, start: bytes = b"") -> None:
        """Writes the rest, then `start` over the file's first bytes. Returns when all is on the disk. Raises
        OSError."""
        self._wait()
        write_all(self._file, self._buffer[: self._filled], self._offset)
        write_all(self._file, start, 0)
        os.fsync(self._file)

    def close(self) -> None:
        """Waits for the thread. Without `finish`, the file is incomplete."""
        self._thread.shutdown(cancel_futures=True)


class RecordSorter:
    """Collects (multihash, offset) pairs and writes them as a MultihashIndexSorted. A context manager, which
    removes its temporary file at the end."""

    def __init__(self, folder: Path, max_held: int = _MAX_HELD) -> None:
        """More than `max_held` records are kept in a temporary file in `folder`."""
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
        code, digest = multihashes.split(multihash)
        key = code, len(digest) + 8
        self._held.setdefault(key, []).append(car.index_record(digest, offset))
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

    def write(self, out: SequentialWriter | BinaryIO) -> None:
        """The whole index. Raises OSError."""
        widths: dict[int, list[int]] = {}
        for code, width in sorted(self._records):
            widths.setdefault(code, []).append(width)
        out.write(car.index_head(len(widths)))
        for code, of_code in widths.items():
            out.write(car.index_code_head(code, len(of_code)))
            for width in of_code:
                out.write(car.index_bucket_head(width, self._records[code, width]))
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


class CarWriter:
    """Fills the empty file of `out`. It is a CAR after `finish`. All methods raise OSError."""

    def __init__(
        self, out: SequentialWriter | BinaryIO, scratch: Path, roots: Sequence[Cid] = (), indexed: bool = True
    ) -> None:
        """Takes `out` over, but not its descriptor. Writes version 2 if `indexed`, which needs a
        SequentialWriter; else version 1. `scratch` is the folder for the temporary file of a very large
        index."""
        self._out = out
        self._sorter = RecordSorter(scratch)
        self._indexed = indexed
        header = car.encode_header(roots)
        self._out.write(bytes(car.V2_BYTES if indexed else 0) + header)
        self._end = len(header)

    @property
    def size(self) -> int:
        """Bytes of CAR data so far."""
        return self._end

    def add(self, cid: Cid, block: Buffer) -> None:
        head = car.section_head(cid, len(block))
        self._out.write(head)
        self._out.write(block)
        if self._indexed:
            self._sorter.add(cids.multihash(cid), self._end)
        self._end += len(head) + len(block)

    def finish(self) -> None:
        """Completes the CAR. A file is on the disk then."""
        with self._sorter, closing(self._out):
            header = b""
            if self._indexed:
                self._sorter.write(self._out)
                header = car.encode_v2(car.V2Header(car.V2_BYTES, self._end, car.V2_BYTES + self._end))
            if isinstance(self._out, SequentialWriter):
                self._out.finish(header)
            else:
                self._out.flush()

    def abandon(self) -> None:
        """Closes without completing the file."""
        with self._sorter, suppress(OSError):
            self._out.close()
