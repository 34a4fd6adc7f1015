"""`ipfsfuse get`: a copy of a file or a directory, without a mount.

Where a mount uses the cache folder, it is read through that mount, which has a cache and sources of its own.
Else the sources are opened, and what is fetched is kept in the cache folder as a mount would keep it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import trio

from ipfsfuse.api.filesystem import Filesystem, open_filesystem
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import Progress
from ipfsfuse.cli.mounting import source
from ipfsfuse.dag import path as paths
from ipfsfuse.errors import StoreFailed, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources import defaults
from ipfsfuse.units import human

PIECE = 4 << 20


def get(arguments: argparse.Namespace) -> int:
    parsed = paths.parse(arguments.path)
    name = bytes(parsed).rpartition(b"/")[2]
    target = Path(arguments.output or os.fsdecode(name))
    if target.is_dir() and arguments.output:
        target /= os.fsdecode(name)
    if os.path.lexists(target):
        raise UsageError(f"{target} exists already: name another place with -o")
    mount = _mount(arguments)
    with Progress("getting") as progress:
        done = _Got(progress)
        try:
            if mount is None:
                trio.run(_get, arguments, target, done)
            else:
                _copy(mount / os.fsdecode(bytes(parsed).removeprefix(b"/ipfs/")), target, done)
        except OSError as exc:
            raise StoreFailed(f"{exc.filename or target}: {exc.strerror}") from exc
    if arguments.json:
        console.values({"path": str(target), "files": done.files, "bytes": done.bytes})
    else:
        console.line(f"got {target}, {done.files} files, {human(done.bytes)}")
    return 0


class _Got:
    """Counts what was written."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.files = self.bytes = 0

    def add(self, count: int) -> None:
        self.bytes += count
        self._progress({"done": self.bytes})


def _mount(arguments: argparse.Namespace) -> Path | None:
    """The mountpoint of the mount that uses the cache folder; None where there is none, or where sources
    were named."""
    folder = folders.cache_dir(arguments.cache_dir)
    if arguments.sources or cache_folder.is_free(folder):
        return None
    said = cache_folder.announced(folder)
    return None if said is None or not os.path.isabs(said[1]) else Path(said[1])


def _copy(path: Path, target: Path, done: _Got) -> None:
    """Nothing that exists is written to: a name that comes twice can't lead out of `target`."""
    if path.is_symlink():
        target.symlink_to(os.readlink(path))
    elif path.is_dir():
        target.mkdir()
        for name in os.listdir(path):
            _copy(path / name, target / name, done)
    else:
        with path.open("rb") as file, target.open("xb") as out:
            while piece := file.read(PIECE):
                out.write(piece)
                done.add(len(piece))
        done.files += 1


def _sources(arguments: argparse.Namespace) -> Sequence[str]:
    return [source(text) for text in defaults.chosen(arguments.sources)]


async def _write(filesystem: Filesystem, path: str, out: BinaryIO, done: _Got) -> None:
    async with await filesystem.open(path) as file:
        place = 0
        while piece := await file.read(place, PIECE):
            await threads.run_sync(out.write, piece)
            place += len(piece)
            done.add(len(piece))


async def _get(arguments: argparse.Namespace, target: Path, done: _Got) -> None:
    async with open_filesystem(
        sources=_sources(arguments),
        cache_dir=folders.cache_dir(arguments.cache_dir),
        library=folders.library(arguments.library),
        isolated=bool(arguments.sources),
    ) as filesystem:
        await _get_tree(filesystem, str(paths.parse(arguments.path)), target, done)


async def _get_tree(filesystem: Filesystem, path: str, target: Path, done: _Got) -> None:
    found = await filesystem.stat(path, follow_symlinks=False)
    if found.kind == "symlink":
        await threads.run_sync(target.symlink_to, await filesystem.readlink(path))
    elif found.kind == "directory":
        await threads.run_sync(target.mkdir)
        for entry in await filesystem.ls(path):
            if paths.can_hold(os.fsencode(entry.name)):
                await _get_tree(filesystem, f"/ipfs/{entry.cid}", target / entry.name, done)
    else:
        with target.open("xb") as out:
            await _write(filesystem, path, out, done)
        done.files += 1
