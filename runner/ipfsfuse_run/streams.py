"""The guest's streams when the runner has a part in them: bounded, hashed, kept for a record.

Blocking; used by the one thread of the runner's own process.
"""

import hashlib
import os
import stat
import sys
from typing import BinaryIO, NamedTuple

from ipfsfuse import units
from ipfsfuse_run import limits
from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.supervise import LimitReached, Sink, Streams

_CHUNK = 1 << 20


class Digest(NamedTuple):
    """What passed through a stream."""

    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.sha256} ({self.size} bytes)"


def carried(file: int) -> Sink:
    """Writes all to the descriptor `file`."""

    def sink(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]

    return sink


def bounded(through: Sink, bound: int | None, what: str) -> Sink:
    """Passes `bound` bytes on to `through`, None for all; raises LimitReached behind them. `what` names the
    stream."""
    if bound is None:
        return through
    left = bound

    def sink(data: bytes) -> None:
        nonlocal left
        through(data[:left])
        if len(data) > left:
            message = f"the guest wrote more than max-stdout={units.size_text(bound)} to {what}"
            raise LimitReached("max_stdout", message)
        left -= len(data)

    return sink


def of_guest(given: Limits, writes_files: bool) -> Streams:
    """The streams of a run that keeps none of them: the runner's own where nothing must be counted.

    A regular file is written to by the runner where the guest's process has a limit on the size of files."""
    found: list[Sink | None] = []
    for file, name in ((1, "standard output"), (2, "standard error")):
        apart = given.max_stdout is not None or (writes_files and _is_file(file))
        found.append(bounded(carried(file), given.max_stdout, name) if apart else None)
    return Streams(None, *found)


def _is_file(file: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file).st_mode)
    except OSError:
        return False


class HashingSink:
    """Hashes what passes to `through`; None keeps it from going anywhere."""

    def __init__(self, through: Sink | None) -> None:
        self._through = through
        self._hash = hashlib.sha256()
        self._size = 0

    def __call__(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)
        if self._through is not None:
            self._through(data)

    def digest(self) -> Digest:
        return Digest(self._hash.hexdigest(), self._size)


def spooled_stdin(bound: int | None) -> BinaryIO:
    """All of standard input in a file without a name, at its start; nothing of a terminal, which has no end.

    Raises GuestRefused where it has more than `bound` bytes."""
    import tempfile

    spool = tempfile.TemporaryFile()  # noqa: SIM115 # the caller's
    left = bound
    if sys.stdin is not None and not sys.stdin.isatty():
        while data := os.read(0, _CHUNK):
            if left is not None and len(data) > left:
                raise GuestRefused(
                    f"standard input has more than max-stdin={limits.value_text('max_stdin', bound or 0)}"
                )
            left = None if left is None else left - len(data)
            spool.write(data)
    spool.seek(0)
    return spool


def digest_of(file: BinaryIO) -> Digest:
    """Of all that `file` holds; leaves it at its start."""
    file.seek(0)
    whole = HashingSink(None)
    while data := file.read(_CHUNK):
        whole(data)
    file.seek(0)
    return whole.digest()
