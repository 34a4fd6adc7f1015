"""Writing a CAR file: header and sections as they come; for version 2 an index behind them and the frame
before them.

Blocking; for one thread at a time. Memory is flat: blocks are written through, the index is sorted in bounded
memory.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.files.carsort import RecordSorter

_BUFFER = 1 << 20
_SEND_EVERY = 32 << 20


class CarWriter:
    """Fills the empty file `fd`, which stays the caller's: not a CAR before `finish`. All methods raise
    OSError.

    `fd` may be a pipe, too, where `indexed` is false."""

    def __init__(self, fd: int, scratch: Path, roots: Sequence[Cid] = (), indexed: bool = True) -> None:
        """`scratch` is a folder for what of a very large index does not fit into memory. Version 2 if
        `indexed`, else 1."""
        self._out = open(fd, "wb", buffering=_BUFFER, closefd=False)  # noqa: SIM115 - closed by finish and abandon
        self._on_disk = stat.S_ISREG(os.fstat(fd).st_mode)
        self._sorter = RecordSorter(scratch)
        self._indexed = indexed
        header = car.encode_header(roots)
        self._out.write(bytes(car.V2_BYTES if indexed else 0) + header)
        self._end = len(header)
        self._sent = 0
        self.blocks = 0

    @property
    def size(self) -> int:
        """Bytes of CAR data so far."""
        return self._end

    def add(self, cid: Cid, block: bytes) -> None:
        head = car.section_head(cid, len(block))
        self._out.write(head)
        self._out.write(block)
        if self._indexed:
            self._sorter.add(cids.multihash(cid), self._end)
        self._end += len(head) + len(block)
        self.blocks += 1
        if self._on_disk and self._end - self._sent >= _SEND_EVERY:
            self._send()

    def _send(self) -> None:
        """Lets the kernel begin to write to the disk what came since the last time, so that `finish` waits
        for little.

        (That is what this advice does with pages not written yet; it drops none of them.)
        """
        os.posix_fadvise(self._out.fileno(), self._sent, self._end - self._sent, os.POSIX_FADV_DONTNEED)
        self._sent = self._end

    def finish(self) -> None:
        """Completes the file and sees it safely on the disk."""
        with self._sorter, self._out:
            if self._indexed:
                self._sorter.write(self._out)
                self._out.seek(0)
                self._out.write(
                    car.encode_v2(car.V2Header(car.V2_BYTES, self._end, car.V2_BYTES + self._end))
                )
            self._out.flush()
            if self._on_disk:
                os.fsync(self._out.fileno())

    def abandon(self) -> None:
        """Lets go without completing."""
        with self._sorter, suppress(OSError):
            self._out.close()  # writes what it holds, to a file that is going
