"""`ipfsfuse add`: local files and folders into the library, with the CIDs that `ipfs add` gives.

Blocking, for one thread; several adds at once, in any number of processes, are safe. The library is as it was until
all is there: whatever ends an add early leaves nothing.
"""

import os
import stat
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

from ipfsfuse.adding import tree
from ipfsfuse.adding.files import FileImporter
from ipfsfuse.adding.tree import Enter, Leave, Regular, Symlink
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import NOTHING, UNIXFS_V1_2025, Built, Profile, Sink, Stored, directory, symlink
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import AddFailed, UsageError
from ipfsfuse.sources.files.library import Library
from ipfsfuse.sources.files.librarywriter import NewRoot

STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class AddOptions:
    profile: Profile = UNIXFS_V1_2025
    wrap: bool = False
    """One directory around all PATHs."""
    hidden: bool = False
    """Take names below PATH that begin with a dot too."""
    preserve_mode: bool = False
    preserve_mtime: bool = False
    only_hash: bool = False
    """Only tell the CIDs; the library may be None."""


class Added(NamedTuple):
    """One file, symlink or directory that was added; `name` as `ipfs add` shows it, relative, "" for a wrapping directory."""

    cid: Cid
    name: str
    size: int
    """Bytes of its blocks."""


Steps = Generator[Added, None, tuple[str, Built]]
"""What is done on the way, then the name and the root."""

AddProgress = Callable[[int, int | None, str], None]
"""Called with (bytes read, bytes in all or None where that is not known, the path that is being read)."""


def add(paths: Sequence[str], options: AddOptions, library: Library | None, progress: AddProgress | None = None) -> Generator[Added, None, None]:
    """Adds all `paths` ("-": standard input) and tells each thing as it is done, each root behind all below it.

    The roots are in the library when the iterator has ended; closing it before leaves the library as it was. Raises
    UsageError, AddFailed, StoreFailed.
    """
    _check(paths, options)
    with ExitStack() as exits:
        writer = None
        if not options.only_hash:
            if library is None:
                raise UsageError("a library is needed to add to")
            writer = exits.enter_context(library.open_writer())
        job = _Job(options, writer.put if writer else lambda _cid, _block: None, progress, paths, exits)
        yield from job.run()
        if writer is not None:
            writer.commit(job.roots)
    if library is not None and not options.only_hash:
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
    """What a PATH is called, for `.` and the like too."""
    return os.path.basename(os.path.abspath(path)) or "root"


class _Job:
    """One add while it runs."""

    def __init__(self, options: AddOptions, sink: Sink, progress: AddProgress | None, paths: Sequence[str], exits: ExitStack) -> None:
        self._options = options
        self._sink = sink
        self._profile = options.profile.with_metadata() if options.preserve_mode or options.preserve_mtime else options.profile
        self._paths = paths
        self._progress = progress
        self._total = self._count() if progress else None
        self._done = 0
        self._path = ""
        self._files = exits.enter_context(FileImporter(self._profile, sink, self._advance))
        self.roots: list[NewRoot] = []

    def _count(self) -> int | None:
        """Bytes in all; None where standard input is among them."""
        if STANDARD_INPUT in self._paths:
            return None
        how = tree.Walk(self._options.hidden, contents=False)
        events = (event for path in self._paths for event in tree.walk(path, _name(path), how))
        return sum(event.status.st_size for event in events if isinstance(event, Regular))

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total, self._path)

    def run(self) -> Iterator[Added]:
        top: list[tuple[bytes, Built]] = []
        for path in self._paths:
            name, built = (yield from self._standard_input()) if path == STANDARD_INPUT else (yield from self._tree(path))
            top.append((name.encode(), built))
            if not self._options.wrap:
                self.roots.append(NewRoot(built.cid, name, built.tsize))
        if self._options.wrap:
            built = directory(self._profile, top, NOTHING, self._sink)
            self.roots.append(NewRoot(built.cid, "", built.tsize))
            yield Added(built.cid, "", built.tsize)

    def _standard_input(self) -> Steps:
        self._path = "standard input"
        if sys.stdin is None:  # what Python makes of a descriptor 0 that was closed (`<&-`)
            raise AddFailed("standard input is closed: pipe something in, or name a PATH")
        built = self._files.stream(sys.stdin.fileno(), self._path)
        name = cids.text(built.cid)
        yield Added(built.cid, name, built.tsize)
        return name, built

    def _tree(self, path: str) -> Steps:
        """Everything below one PATH, each directory when all in it is done."""
        open_dirs: list[_Directory] = []
        for event in tree.walk(path, _name(path), tree.Walk(self._options.hidden)):
            if isinstance(event, Enter):
                open_dirs.append(_Directory(event, _joined(open_dirs, event.name), []))
                continue
            if isinstance(event, Leave):
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

    def _single(self, event: Regular | Symlink) -> Built:
        stored = self._stored(event.status)
        if isinstance(event, Symlink):
            return symlink(self._profile, event.target, stored, self._sink)
        self._path = event.path
        return self._files.regular(event.fd, event.status, event.path, stored)

    def _stored(self, status: os.stat_result) -> Stored:
        mode = stat.S_IMODE(status.st_mode) if self._options.preserve_mode else None
        return Stored(mode, status.st_mtime_ns if self._options.preserve_mtime else None)


class _Directory(NamedTuple):
    """A directory that was entered: what is done below it."""

    event: Enter
    shown: str
    children: list[tuple[bytes, Built]]


def _joined(open_dirs: Sequence[_Directory], name: bytes) -> str:
    return f"{open_dirs[-1].shown}/{name.decode()}" if open_dirs else name.decode()
