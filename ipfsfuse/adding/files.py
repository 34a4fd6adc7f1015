"""One file's bytes into blocks, hashed in several threads while the next are read.

A `FileImporter` is for one thread. It holds at most `_AHEAD` chunks.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain

from ipfsfuse.dag.builder import NOTHING, Block, Built, FileBuilder, Profile, Sink, Stored, leaf
from ipfsfuse.errors import AddFailed

_AHEAD = 8
_THREADS = min(4, os.cpu_count() or 1)


class FileImporter:
    """Use it as a context manager: its threads end with it."""

    def __init__(self, profile: Profile, sink: Sink, advance: Callable[[int], None]) -> None:
        """`advance` is told of every so many bytes that were read."""
        self._profile = profile
        self._sink = sink
        self._advance = advance
        self._threads = ThreadPoolExecutor(_THREADS, "hash")
        self._exit = ExitStack()

    def __enter__(self) -> "FileImporter":
        self._exit.enter_context(self._threads)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._exit.close()

    def regular(self, fd: int, status: os.stat_result, path: str, stored: Stored) -> Built:
        """An open file that had `status`. Raises AddFailed if it is not the same when all of it was read."""
        built = self._file(self._sized(fd, path, status.st_size), stored)
        after = os.fstat(fd)
        if built.size != status.st_size or (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            change = "grew" if after.st_size > status.st_size else "shrank" if after.st_size < status.st_size else "changed"
            raise AddFailed(f"{path} {change} while it was read: add it again when nobody writes to it")
        return built

    def stream(self, fd: int, path: str) -> Built:
        """All that comes out of a pipe, a terminal or a socket."""
        return self._file(self._unsized(fd, path), NOTHING)

    def _file(self, chunks: Iterator[bytes], stored: Stored) -> Built:
        first = next(chunks, b"")
        second = next(chunks, None)
        if second is None:
            return self._save(leaf(self._profile, first, stored))
        builder = FileBuilder(self._profile, self._sink)
        pending: deque[Future[Block]] = deque()
        for chunk in chain((first, second), chunks):
            pending.append(self._threads.submit(leaf, self._profile, chunk))
            if len(pending) == _AHEAD:
                builder.add(self._save(pending.popleft().result()))
        for block in pending:
            builder.add(self._save(block.result()))
        return builder.finish(stored)

    def _save(self, block: Block) -> Built:
        self._sink(block.built.cid, block.block)
        return block.built

    def _sized(self, fd: int, path: str, size: int) -> Iterator[bytes]:
        """`size` bytes in pieces of the profile's size; fewer if the file ends before. No read is spent on its end."""
        if size == 0 and self._chunk(fd, path, 1):
            raise AddFailed(f"{path} has content but says it is empty, as files of /proc do: add a copy, or pipe it in")
        while size and (chunk := self._chunk(fd, path, min(self._profile.chunk_size, size))):
            size -= len(chunk)
            yield chunk

    def _unsized(self, fd: int, path: str) -> Iterator[bytes]:
        while chunk := self._chunk(fd, path, self._profile.chunk_size):
            yield chunk

    def _chunk(self, fd: int, path: str, length: int) -> bytes:
        """`length` bytes, fewer at the end."""
        try:
            data = os.read(fd, length)
            if 0 < len(data) < length:
                data = _filled(fd, data, length)
        except OSError as exc:
            raise AddFailed(f"{path}: {exc.strerror}") from exc
        self._advance(len(data))
        return data


def _filled(fd: int, data: bytes, length: int) -> bytes:
    """`data` and what follows, up to `length` bytes: a pipe gives 64 KiB at a time."""
    parts, left = [data], length - len(data)
    while left and (part := os.read(fd, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
