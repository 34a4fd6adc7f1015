"""The guest's streams when the runner has a part in them: bounded, digested, kept for a record.

Blocking; used by the one thread of the runner's own process.
"""

import hashlib
import os
import sys
from typing import BinaryIO, NamedTuple

from runner.supervise import OutputFull, Sink

_CHUNK = 1 << 20


class Digest(NamedTuple):
    """What passed through a stream."""

    sha256: str
    size: int


def carried(file: int) -> Sink:
    """Writes all to the descriptor `file`."""

    def sink(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]

    return sink


def bounded(through: Sink, bound: int | None) -> Sink:
    """Passes `bound` bytes on to `through`, None for all; raises OutputFull behind them."""
    if bound is None:
        return through
    left = bound

    def sink(data: bytes) -> None:
        nonlocal left
        through(data[:left])
        if len(data) > left:
            raise OutputFull(f"the guest wrote more than max-stdout={bound} bytes")
        left -= len(data)

    return sink


class Digested:
    """Digests what passes to `through`; None keeps it from going anywhere."""

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


def spooled_stdin() -> BinaryIO:
    """All of standard input in a file without a name, at its start; nothing of a terminal, which has no end."""
    import tempfile

    spool = tempfile.TemporaryFile()  # noqa: SIM115 # the caller's
    if sys.stdin is not None and not sys.stdin.isatty():
        while data := os.read(0, _CHUNK):
            spool.write(data)
    spool.seek(0)
    return spool


def digest_of(file: BinaryIO) -> Digest:
    """Of all that `file` holds; leaves it at its start."""
    file.seek(0)
    whole = Digested(None)
    while data := file.read(_CHUNK):
        whole(data)
    file.seek(0)
    return whole.digest()
