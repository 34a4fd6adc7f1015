"""One file's bytes into blocks, hashed in several threads while the next are read.

A `FileImporter` is for one thread. It holds at most `_AHEAD` chunks.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain

from ipfsfuse.adding.tree import naming
from ipfsfuse.dag.build import NOTHING, Block, Built, FileBuilder, Profile, Sink, Stored, leaf
from ipfsfuse.errors import AddFailed

_AHEAD = 8
_THREADS = min(4, os.cpu_count() or 1)
_STREAM_READ = 1 << 20


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
        built = self._file(self._chunks(fd, path, status.st_size), stored)
        after = os.fstat(fd)
        if built.size != status.st_size or (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            change = "grew" if after.st_size > status.st_size else "shrank" if after.st_size < status.st_size else "changed"
            raise AddFailed(f"{path} {change} while it was read: add it again when nobody writes to it")
        return built

    def stream(self, fd: int, path: str) -> Built:
        """All that comes out of a pipe, a terminal or a socket."""
        return self._file(self._chunks(fd, path, None), NOTHING)

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

    def _chunks(self, fd: int, path: str, size: int | None) -> Iterator[bytes]:
        """The content in pieces of the profile's size. At most a byte more than `size` is read."""
        left = size
        while chunk := self._chunk(fd, path, self._profile.chunk_size if left is None else min(self._profile.chunk_size, left + 1)):
            if left is not None:
                left -= len(chunk)
                if left < 0:
                    raise AddFailed(f"{path} grew while it was read: add it again when nobody writes to it")
            yield chunk

    def _chunk(self, fd: int, path: str, length: int) -> bytes:
        """`length` bytes, fewer at the end."""
        parts: list[bytes] = []
        while length:
            with naming(path):
                part = os.read(fd, min(length, _STREAM_READ))
            if not part:
                break
            self._advance(len(part))
            parts.append(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
