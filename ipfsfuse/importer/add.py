"""`ipfsfuse add`: adds local files and folders to the library, with the same CIDs as `ipfs add`.

Blocking, for one thread. Any number of adds may run at once, in any number of processes. The library changes
only when everything has been added, so an add that ends early leaves nothing.
"""

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import (
    NO_ATTRIBUTES,
    UNIXFS_V1_2025,
    Block,
    Built,
    FileBuilder,
    Profile,
    Sink,
    Stored,
    directory,
    leaf,
    symlink,
)
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import AddFailed, UsageError
from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.files import Closing
from ipfsfuse.sources.local.library import Library, NewRoot
from ipfsfuse.structures import Buffer

# -- walking local files -------------------------------------------------------------------------------------

_MAX_OPEN = 128
"""Directories that are open at a time. Those above them are opened again by `..`."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


class EnterFolder(NamedTuple):
    """A directory. Its entries follow, sorted by name, and then its LeaveFolder."""

    path: str
    name: bytes
    status: os.stat_result


class LeaveFolder(NamedTuple):
    """The end of the directory that was entered last."""


class LocalFile(NamedTuple):
    path: str
    name: bytes
    fd: int
    """Open until the walk continues; -1 in a walk without contents."""
    status: os.stat_result


class LocalSymlink(NamedTuple):
    path: str
    name: bytes
    target: bytes
    status: os.stat_result


Event = EnterFolder | LeaveFolder | LocalFile | LocalSymlink


@dataclass(slots=True)
class _Open:
    """A directory that is being walked."""

    fd: int
    """-1 while it is closed."""
    path: str
    identity: tuple[int, int]
    names: Iterator[str]
    regular: frozenset[str]
    """Those names that are regular files according to the folder."""


class naming:  # noqa: N801 - used like a function; one of contextlib's takes as long as the system call in it
    """A context manager that turns OSError into AddFailed, which names the path."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            raise AddFailed(f"{self._path}: {error.strerror}") from error


def walk(path: str, name: str, hidden: bool, contents: bool = True) -> Iterator[Event]:
    """Walks `path`, whose name is `name`, and everything below it. Names below it that begin with a dot are
    left out unless `hidden`. Without `contents`, no file is opened. Raises AddFailed."""
    stack: list[_Open] = []
    try:
        yield from _visit(path, path, name, None, hidden, contents, stack)
        while stack:
            top = stack[-1]
            child = next(top.names, None)
            if child is None:
                _pop(stack)
                yield LeaveFolder()
            elif contents and child in top.regular:  # a short cut for nearly all names
                yield from _regular(f"{top.path}/{child}", child, child, top.fd)
            else:
                below = os.path.join(top.path, child)
                yield from _visit(below, child, child, top.fd, hidden, contents, stack)
    finally:
        for opened in stack:
            if opened.fd >= 0:
                os.close(opened.fd)


def _visit(
    path: str, at: str, name: str, parent: int | None, hidden: bool, contents: bool, stack: list[_Open]
) -> Iterator[Event]:
    """The event of one name, `at` below the descriptor `parent`. A directory is pushed onto the stack."""
    encoded = _encoded(path, name)
    with naming(path):
        status = os.stat(at, dir_fd=parent, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        with naming(path):
            target = os.readlink(os.fsencode(at), dir_fd=parent)
        yield LocalSymlink(path, encoded, target, status)
    elif kind == stat.S_IFDIR:
        stack.append(_open_directory(path, at, parent, hidden))
        if len(stack) > _MAX_OPEN:
            above = stack[-_MAX_OPEN - 1]
            os.close(above.fd)
            above.fd = -1
        yield EnterFolder(path, encoded, status)
    elif kind == stat.S_IFREG and not contents:
        yield LocalFile(path, encoded, -1, status)
    elif kind == stat.S_IFREG:
        yield from _regular(path, at, name, parent)
    else:
        raise _refusal(path, status)


def _regular(path: str, at: str, name: str, parent: int | None) -> Iterator[Event]:
    """The event of a regular file. It may have been replaced since it was listed."""
    encoded = _encoded(path, name)
    with naming(path):
        fd = os.open(at, _FLAGS | os.O_NONBLOCK, dir_fd=parent)
    with Closing(fd):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(path, status)
        yield LocalFile(path, encoded, fd, status)


def _encoded(path: str, name: str) -> bytes:
    encoded = os.fsencode(name)  # the bytes on disk, for any encoding of the locale
    try:
        encoded.decode()
    except UnicodeDecodeError as exc:
        raise AddFailed(f"{os.fsencode(path)!r}: the name is not UTF-8: rename it") from exc
    return encoded


def _refusal(path: str, status: os.stat_result) -> AddFailed:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    return AddFailed(f"{path} is {kind}: only files, directories and symlinks can be added")


def _open_directory(path: str, at: str, parent: int | None, hidden: bool) -> _Open:
    with naming(path):
        fd = os.open(at, _FLAGS | os.O_DIRECTORY, dir_fd=parent)
        try:
            with os.scandir(fd) as found:
                entries = [entry for entry in found if hidden or not entry.name.startswith(".")]
            names = sorted((entry.name for entry in entries), key=os.fsencode)
            regular = frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
    return _Open(fd, path, (status.st_dev, status.st_ino), iter(names), regular)


def _pop(stack: list[_Open]) -> None:
    """Removes and closes the directory on top of the stack, and opens its parent if that is closed."""
    with Closing(stack.pop().fd) as done:
        if stack and stack[-1].fd < 0:
            parent = stack[-1]
            with naming(parent.path):
                parent.fd = os.open("..", _FLAGS | os.O_DIRECTORY, dir_fd=done)
                status = os.fstat(parent.fd)
            if (status.st_dev, status.st_ino) != parent.identity:
                raise AddFailed(f"{parent.path} was moved while it was added")


# -- adding --------------------------------------------------------------------------------------------------

STANDARD_INPUT = "-"

_CHUNKS_AHEAD = 16
"""Chunks that are in memory at a time: some are hashed while the next ones are read."""
_LARGE = 128 << 10
"""Bytes of a chunk that is read into a buffer which was used before. New memory costs less for a smaller
one."""
_COUNT_AFTER = 1.0
"""Seconds after which the bytes in all are counted for the progress, which takes a tenth of the time of
adding them."""
_HASH_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class AddOptions:
    profile: Profile = UNIXFS_V1_2025
    wrap: bool = False
    """Whether to make one directory around all PATHs."""
    hidden: bool = False
    """Whether to add names below PATH that begin with a dot."""
    preserve_mode: bool = False
    preserve_mtime: bool = False


class Added(NamedTuple):
    """A file, symlink or directory that was added. `name` is relative, as `ipfs add` shows it; "" for a
    wrapping directory."""

    cid: Cid
    name: str
    size: int
    """Bytes of its blocks."""


Steps = Generator[Added, None, tuple[str, Built]]
"""Yields each file, symlink and directory that was added. Returns the name and the root."""

AddProgress = Callable[[int, int | None, str], None]
"""Called with (bytes read, bytes in all or None if they are not known yet, the path that is being read)."""


def add(
    paths: Sequence[str], options: AddOptions, library: Library | None, progress: AddProgress | None = None
) -> Generator[Added, None, None]:
    """Adds all `paths` ("-" is standard input). Yields each file, symlink and directory when it is done, a
    directory after everything in it. Without a library, only computes the CIDs.

    The roots are in the library when the iterator has ended. Closing it earlier leaves the library unchanged.
    Raises UsageError, AddFailed, StoreFailed.
    """
    _check(paths, options)
    with ExitStack() as exits:
        writer = None if library is None else exits.enter_context(library.open_writer())
        threads = exits.enter_context(ThreadPoolExecutor(_HASH_THREADS, "hash"))
        job = _Adder(options, writer.put if writer else lambda _cid, _block: None, progress, paths, threads)
        yield from job.run()
        if writer is not None:
            writer.commit(job.roots)
    if library is not None:
        library.tidy()


def _check(paths: Sequence[str], options: AddOptions) -> None:
    if not paths:
        raise UsageError("name at least one PATH to add, or - for standard input")
    names = [_name(path) for path in paths if path != STANDARD_INPUT]
    twice = {name for name in names if names.count(name) > 1}
    if paths.count(STANDARD_INPUT) > 1:
        raise UsageError("standard input can be added once")
    if options.wrap and twice:
        raise UsageError(f"two PATHs are called {min(twice)!r}: one directory can't hold both")


def _name(path: str) -> str:
    """The name of the file at `path`, also for paths such as `.`."""
    return os.path.basename(os.path.abspath(path)) or "root"


class _Adder:
    """One run of `add`. Several threads hash while the next chunks are read."""

    def __init__(
        self,
        options: AddOptions,
        sink: Sink,
        progress: AddProgress | None,
        paths: Sequence[str],
        threads: ThreadPoolExecutor,
    ) -> None:
        self._options = options
        self._sink = sink
        self._profile = (
            options.profile.with_metadata()
            if options.preserve_mode or options.preserve_mtime
            else options.profile
        )
        self._paths = paths
        self._progress = progress
        self._total: int | None = None
        self._counted = False
        self._done = 0
        self._began = time.monotonic()
        self._path = ""
        self._threads = threads
        self.roots: list[NewRoot] = []

    def _count(self) -> int | None:
        """Bytes in all; None if standard input is one of the paths."""
        if STANDARD_INPUT in self._paths:
            return None
        walks = (walk(path, _name(path), self._options.hidden, contents=False) for path in self._paths)
        events = chain.from_iterable(walks)
        return sum(event.status.st_size for event in events if isinstance(event, LocalFile))

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            if not self._counted and time.monotonic() - self._began >= _COUNT_AFTER:
                self._counted = True
                self._total = self._count()
            self._progress(self._done, self._total, self._path)

    def run(self) -> Iterator[Added]:
        top: list[tuple[bytes, Built]] = []
        for path in self._paths:
            name, built = (
                (yield from self._standard_input())
                if path == STANDARD_INPUT
                else (yield from self._tree(path))
            )
            top.append((name.encode(), built))
            if not self._options.wrap:
                self.roots.append(NewRoot(built.cid, name, built.tsize))
        if self._options.wrap:
            built = directory(self._profile, top, NO_ATTRIBUTES, self._sink)
            self.roots.append(NewRoot(built.cid, "", built.tsize))
            yield Added(built.cid, "", built.tsize)

    def _standard_input(self) -> Steps:
        self._path = "standard input"
        if sys.stdin is None:  # Python sets it to None if descriptor 0 was closed (`<&-`)
            raise AddFailed("standard input is closed: pipe something in, or name a PATH")
        built = self._file(self._unsized(sys.stdin.fileno()), NO_ATTRIBUTES)
        name = cids.text(built.cid)
        yield Added(built.cid, name, built.tsize)
        return name, built

    def _tree(self, path: str) -> Steps:
        """Adds one PATH and everything below it."""
        open_dirs: list[_Directory] = []
        for event in walk(path, _name(path), self._options.hidden):
            if isinstance(event, EnterFolder):
                open_dirs.append(_Directory(event, _joined(open_dirs, event.name), []))
                continue
            if isinstance(event, LeaveFolder):
                done = open_dirs.pop()
                name, shown = done.event.name, done.shown
                built = directory(self._profile, done.children, self._stored(done.event.status), self._sink)
            else:
                name, shown = event.name, _joined(open_dirs, event.name)
                built = self._single(event)
            yield Added(built.cid, shown, built.tsize)
            if not open_dirs:
                return shown, built
            open_dirs[-1].children.append((name, built))
        raise AddFailed(f"{path}: nothing was found there")

    def _single(self, event: LocalFile | LocalSymlink) -> Built:
        stored = self._stored(event.status)
        if isinstance(event, LocalSymlink):
            return symlink(self._profile, event.target, stored, self._sink)
        self._path = event.path
        return self._regular(event.fd, event.status, stored)

    def _stored(self, status: os.stat_result) -> Stored:
        mode = stat.S_IMODE(status.st_mode) if self._options.preserve_mode else None
        return Stored(mode, status.st_mtime_ns if self._options.preserve_mtime else None)

    # -- the file at `self._path` ----------------------------------------------------------------------------

    def _regular(self, fd: int, status: os.stat_result, stored: Stored) -> Built:
        """Adds an open file, whose status was `status`. Raises AddFailed if it changed while it was read."""
        built = self._file(self._sized(fd, status.st_size), stored)
        after = os.fstat(fd)
        if built.size != status.st_size or (after.st_size, after.st_mtime_ns) != (
            status.st_size,
            status.st_mtime_ns,
        ):
            change = (
                "grew"
                if after.st_size > status.st_size
                else "shrank"
                if after.st_size < status.st_size
                else "changed"
            )
            raise AddFailed(f"{self._path} {change} while it was read: add it again when nobody writes to it")
        return built

    def _file(self, chunks: Iterator[Buffer], stored: Stored) -> Built:
        first = next(chunks, b"")
        second = next(chunks, None)
        if second is None:
            return self._save(leaf(self._profile, first, stored))
        builder = FileBuilder(self._profile, self._sink)
        pending: deque[Future[Block]] = deque()
        for chunk in chain((first, second), chunks):
            pending.append(self._threads.submit(leaf, self._profile, chunk))
            if len(pending) == _CHUNKS_AHEAD:
                builder.add(self._save(pending.popleft().result()))
        for block in pending:
            builder.add(self._save(block.result()))
        return builder.finish(stored)

    def _save(self, block: Block) -> Built:
        self._sink(block.built.cid, block.block)
        return block.built

    def _sized(self, fd: int, size: int) -> Iterator[Buffer]:
        """`size` bytes in chunks of the profile; fewer if the file ends earlier. Needs no extra read to find
        the end."""
        if size == 0 and self._chunk(fd, 1):
            raise AddFailed(
                f"{self._path} has content but says it is empty, as files of /proc do: add a copy, or pipe "
                "it in"
            )
        while size and (chunk := self._chunk(fd, min(self._profile.chunk_size, size))):
            size -= len(chunk)
            yield chunk

    def _unsized(self, fd: int) -> Iterator[Buffer]:
        """Everything from a pipe, a terminal or a socket, in chunks."""
        while chunk := self._chunk(fd, self._profile.chunk_size):
            yield chunk

    def _chunk(self, fd: int, length: int) -> Buffer:
        """`length` bytes, fewer at the end of the file."""
        try:
            data = _read(fd, length)
        except OSError as exc:
            raise AddFailed(f"{self._path}: {exc.strerror}") from exc
        self._advance(len(data))
        return data


class _Directory(NamedTuple):
    """A directory that was entered, and its children that are added."""

    event: EnterFolder
    shown: str
    children: list[tuple[bytes, Built]]


def _joined(open_dirs: Sequence[_Directory], name: bytes) -> str:
    return f"{open_dirs[-1].shown}/{name.decode()}" if open_dirs else name.decode()


def _read(fd: int, length: int) -> Buffer:
    """`length` bytes, fewer at the end of the file: a pipe delivers 64 KiB at a time."""
    start = os.read(fd, length) if length < _LARGE else b""
    if start and len(start) == length:
        return start
    buffer, count = lend(length), len(start)
    buffer[:count] = start
    while count < length and (more := os.readv(fd, [buffer[count:]])):
        count += more
    return buffer[:count]
