"""`get`, `cat`, `export` and `push`: content without a mount.

`get` reads through the mount that uses the cache folder, if there is one: it has a cache and sources of its
own. Else the sources are opened, and what is fetched is kept in the cache folder as a mount would keep it.
`cat`, `export` and `push` read from the sources, and ask a running mount for what those lack.
"""

import argparse
import base64
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import trio

from ipfsfuse import client, importer
from ipfsfuse.api.filesystem import Filesystem, open_filesystem
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import Progress
from ipfsfuse.cli.mounting import source
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import path as paths
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import DaemonFailed, StoreFailed, Unavailable, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources import defaults
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import OpenSettings, parse_source
from ipfsfuse.sources.spec import opened as opened_sources
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
        console.line(
            f"got {target}, {done.files} {'file' if done.files == 1 else 'files'}, {human(done.bytes)}"
        )
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


# -- `cat`, `export` and `push` ------------------------------------------------------------------------------

STANDARD_OUTPUT = "-"
BLOCK_DEADLINE = 30.0
"""Seconds for one block."""


def export(arguments: argparse.Namespace) -> int:
    return trio.run(_export, arguments, *_cache_and_indexes(arguments))


def _cache_and_indexes(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The cache folder, and the folder for the indexes of CAR files, which is made if there are any."""
    cache_dir = folders.cache_dir(arguments.cache_dir)
    with_cars = any(os.path.exists(source) for source in arguments.sources or ())
    return cache_dir, cache_folder.indexes(cache_dir) if with_cars else cache_dir


async def _export(arguments: argparse.Namespace, cache_dir: Path, indexes: Path) -> int:
    cid, to_stdout = cid_alone(arguments.cid), arguments.file == STANDARD_OUTPUT
    if to_stdout:
        _check_standard_output(arguments.v2)
    with Progress("indexing") as indexing, Progress("exporting") as progress:
        settings = OpenSettings(folders.library(arguments.library), indexes, progress=indexing.of_file)
        async with opened_sources(_library_or(arguments.sources), settings) as sources:
            get = _getter(SourcePool(sources), cache_folder.socket_path(cache_dir))

            def show(_blocks: int, written: int) -> None:
                progress({"done": written})

            if to_stdout:
                # a write that waits for a slow reader can't be cancelled,
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)  # and nothing is left to clean up
                await importer.export_to_stream(cid, get, sys.stdout.fileno(), show)
            else:
                size = await importer.export(cid, get, Path(arguments.file), arguments.v2, show)
                if arguments.json:
                    console.values({"exported": cids.text(cid), "file": arguments.file, "bytes": size})
                    return 0
                console.line(f"exported {cids.text(cid)} to {arguments.file}, {human(size)}")
    return 0


def push(arguments: argparse.Namespace) -> int:
    return trio.run(_push, arguments, *_cache_and_indexes(arguments))


async def _push(arguments: argparse.Namespace, cache_dir: Path, indexes: Path) -> int:
    cid = cid_alone(arguments.cid)
    if parse_source(arguments.to).kind != defaults.KUBO:
        raise UsageError(f"--to {arguments.to}: not a Kubo node; write kubo, or kubo+http://host:port")
    with Progress("indexing") as indexing, Progress("pushing") as progress:
        settings = OpenSettings(folders.library(arguments.library), indexes, progress=indexing.of_file)
        async with (
            opened_sources(_library_or(arguments.sources), settings) as sources,
            opened_sources([arguments.to], settings) as (node,),
        ):
            assert isinstance(node, Kubo)
            get = _getter(SourcePool(sources), cache_folder.socket_path(cache_dir))

            def show(done: int, total: int | None) -> None:
                progress({"done": done, "total": total if total and total >= done else None})

            sent = await importer.push(cid, get, node.rpc(), show)
    if arguments.json:
        console.values({"pushed": cids.text(cid), "to": node.name, "pinned": True} | sent._asdict())
    else:
        console.line(
            f"pushed {cids.text(cid)} to {node.name} and pinned it there: {sent.blocks} blocks sent, "
            f"{human(sent.bytes)}; {sent.present} were there"
        )
    return 0


def cat(arguments: argparse.Namespace) -> int:
    return trio.run(_cat, arguments, *_cache_and_indexes(arguments))


async def _cat(arguments: argparse.Namespace, cache_dir: Path, indexes: Path) -> int:
    path = paths.parse(arguments.path)
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    if arguments.raw and path.names:
        raise UsageError("--raw takes a CID alone: a block has no path")
    settings = OpenSettings(folders.library(arguments.library), indexes)
    async with opened_sources(_library_or(arguments.sources), settings) as sources:
        get = _getter(SourcePool(sources), cache_folder.socket_path(cache_dir))
        parts = _block(path.root, get) if arguments.raw else importer.content(path, get)
        size = 0
        async for part in parts:
            if arguments.json:
                data = base64.b64encode(part).decode("ascii")
                await threads.run_sync(_print_values, {"offset": size, "data": data})
            else:
                await threads.run_sync(sys.stdout.buffer.write, part)
            size += len(part)
    if arguments.json:
        await threads.run_sync(_print_values, {"path": str(path), "bytes": size})
    await threads.run_sync(sys.stdout.buffer.flush)
    return 0


def _print_values(values: Mapping[str, object]) -> None:
    """A line of JSON. It may wait for a slow reader: call it in a thread."""
    console.values(values, indent=None)


async def _block(cid: Cid, get: importer.GetBlock) -> AsyncIterator[bytes]:
    yield await importer.verified(cid, get)


def _check_standard_output(v2: bool) -> None:
    """Raises UsageError where no CAR can go there."""
    if v2:
        raise UsageError("--v2 needs a file: the place of its index is known only at the end")
    if sys.stdout is None:
        raise UsageError("standard output is closed: name a FILE")
    if sys.stdout.isatty():
        raise UsageError("a CAR is not for a terminal: name a FILE, or send it on with | or >")


def _library_or(given: Sequence[str] | None) -> Sequence[str]:
    return defaults.chosen(given) if given else [defaults.LIBRARY]


def _getter(pool: SourcePool, control: Path) -> importer.GetBlock:
    """Gets a block from the sources, else from a running mount, which has a cache and sources of its own."""

    async def get(wanted: Cid) -> bytes:
        try:
            with trio.fail_after(BLOCK_DEADLINE):
                return (await pool.get(wanted)).block
        except (Unavailable, trio.TooSlowError) as exc:
            block = await threads.run_sync(_from_mount, control, wanted, abandon_on_cancel=True)
            if block is None:
                raise Unavailable(
                    f"{cids.text(wanted)} is in no source and no running mount: name one that has it "
                    "with --from"
                ) from exc
            return block

    return get


def _from_mount(control: Path, cid: Cid) -> bytes | None:
    """The block that a running mount has or fetches. None if no mount runs."""
    try:
        return base64.b64decode(client.call(control, "block", cid=cids.text(cid))["data"])
    except DaemonFailed:
        return None
