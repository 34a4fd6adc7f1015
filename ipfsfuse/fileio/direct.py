"""Whether what is staged is written past the page cache (O_DIRECT), and read back so.

Through it, 1 MiB costs 0.2 ms of CPU where the machine has free pages at hand and up to 2 ms where a virtual
machine must be given them first, and then writing back; past it 0.08 ms. The mount's own page cache has the
bytes anyway. But a write past it lasts until the disk has them: where that takes long, the page cache is
used, so that a slow disk slows no reader down before that is full, and keeps what it holds.

Concurrency: worker threads. Two at a time may miscount the calls that are left to wait, which costs nothing
but speed.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Sequence

from ipfsfuse.fileio.buffers import is_aligned
from ipfsfuse.fileio.calls import write_parts

ALIGNED = 4096
"""What addresses, offsets and sizes must be multiples of, for any disk."""
SLOW = 5e-9
"""Seconds for a byte, of the last calls on average: of a single one the wait for a processor may be most. 200
MB/s."""
TURN = 0.005
"""Seconds that do not count: so long a thread may wait for Python's lock after a call."""
WEIGHT = 1 / 8
"""Of the last call in that average."""
WAIT = 64
"""Calls through the page cache where that is slow, before the next one past it."""


class Direct:
    def __init__(self) -> None:
        self._wait = 0
        self._pace = 0.0
        self._offered = True
        """False once the file system took none."""

    def write(self, file: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
        """`parts` at `offset` of an open file, one way or the other. Raises OSError."""
        if not self._past(write_parts, file, parts, offset):
            write_parts(file, parts, offset)

    def read(self, file: int, parts: Sequence[memoryview], offset: int) -> None:
        """Fills `parts`, as far as the file goes, from `offset` on. Raises OSError."""
        if not self._past(os.preadv, file, parts, offset):
            os.preadv(file, parts, offset)

    def _past(
        self, call: Callable[..., object], file: int, parts: Sequence[bytes | memoryview], offset: int
    ) -> bool:
        """Whether `call` did its work past the page cache."""
        if not self._offered or not _fits(parts, offset):
            return False
        if self._wait:
            self._wait -= 1
            return False
        flags, start = fcntl.fcntl(file, fcntl.F_GETFL), time.monotonic()
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
            call(file, parts, offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            self._offered = False
            return False
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)
        pace = (time.monotonic() - start - TURN) / sum(map(len, parts))
        self._pace += WEIGHT * (max(pace, 0.0) - self._pace)
        if self._pace > SLOW:
            self._wait, self._pace = WAIT, SLOW  # the next one decides
        return True


def _fits(parts: Sequence[bytes | memoryview], offset: int) -> bool:
    return offset % ALIGNED == 0 and all(
        isinstance(part, memoryview) and is_aligned(part, ALIGNED) for part in parts
    )
