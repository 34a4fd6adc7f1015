"""The library's commands: `add`, `import`, `rm`, `library`, `fsck --library`, and `export` to CAR files."""

import argparse
import base64
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import trio

from ipfsfuse import client, importer, units
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import Progress
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import path as paths
from ipfsfuse.dag.builder import PROFILES
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import DaemonFailed, Unavailable, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources import defaults
from ipfsfuse.sources.local.library import Library
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import OpenSettings
from ipfsfuse.sources.spec import opened as opened_sources

STANDARD_OUTPUT = "-"
BLOCK_DEADLINE = 30.0
"""Seconds for one block of an export."""


def add(arguments: argparse.Namespace) -> int:
    options = importer.AddOptions(
        profile=PROFILES[arguments.profile],
        wrap=arguments.wrap_with_directory,
        hidden=arguments.hidden,
        preserve_mode=arguments.preserve_mode,
        preserve_mtime=arguments.preserve_mtime,
        only_hash=arguments.only_hash,
    )
    last = None
    with Progress("adding") as progress, _library_to_add_to(arguments) as library:

        def show(done: int, total: int | None, path: str) -> None:
            progress({"done": done, "total": total, "what": path})

        rows = []
        for last in importer.add(arguments.paths, options, library, show):
            rows.append({"cid": cids.text(last.cid), "name": last.name})
            if not arguments.quieter and not arguments.json:
                progress.line(f"added {cids.text(last.cid)} {last.name}".rstrip())
    if arguments.json:
        console.values(rows[-1:] if arguments.quieter else rows)
    elif arguments.quieter and last is not None:
        console.line(cids.text(last.cid))
    return 0


@contextmanager
def _library_to_add_to(arguments: argparse.Namespace) -> Iterator[Library | None]:
    if arguments.only_hash:
        yield None
    else:
        with opened_library(arguments) as library:
            yield library


@contextmanager
def opened_library(arguments: argparse.Namespace) -> Iterator[Library]:
    library = Library(folders.library(arguments.library))
    try:
        yield library
    finally:
        library.close()


def import_cars(arguments: argparse.Namespace) -> int:
    with Progress("importing") as progress, opened_library(arguments) as library:
        for file in arguments.files:
            for root in importer.import_car(Path(file), library, lambda done: progress({"done": done})):
                progress.line(f"imported {cids.text(root.cid)} {root.name}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Hashes what the library or a CAR file holds. 1 where a block is missing or wrong."""
    with ExitStack() as exits:
        progress = exits.enter_context(Progress("checking"))

        def show(done: int) -> None:
            progress({"done": done})

        if arguments.file is not None:
            what, damage = arguments.file, importer.car_damage(Path(arguments.file), show)
        else:
            library = exits.enter_context(opened_library(arguments))
            what, damage = library.folder, importer.library_damage(library, show)
        found = []
        for path, reason in damage:
            found.append({"path": path, "reason": reason})
            if not arguments.json:
                progress.line(f"damaged: {path}: {reason}")
    if arguments.json:
        console.values({"damaged": found})
    elif not found:
        console.line(f"every block of {what} is there and right")
    return 1 if found else 0


def show(arguments: argparse.Namespace) -> int:
    with opened_library(arguments) as library:
        if arguments.compact:
            library.compact()
        entries = library.entries()
    if arguments.json:
        rows = [
            {"cid": cids.text(each.cid), "name": each.name, "size": each.size, "added": each.added}
            for each in entries
        ]
        console.values(rows)
        return 0
    for each in entries:
        added = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.added))
        console.line(f"{cids.text(each.cid)}  {units.human(each.size):>10}  {added}  {each.name}")
    return 0


def remove(arguments: argparse.Namespace) -> int:
    cid = cid_alone(arguments.cid)
    with opened_library(arguments) as library:
        entry = library.remove(cid)
    if arguments.json:
        console.values({"removed": cids.text(entry.cid), "name": entry.name})
    else:
        console.line(f"removed {cids.text(entry.cid)} {entry.name}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    cache_dir = folders.cache_dir(arguments.cache_dir)
    with_cars = any(os.path.exists(source) for source in arguments.sources or ())
    indexes = cache_folder.indexes(cache_dir) if with_cars else cache_dir  # only CAR files need that folder
    return trio.run(_export, arguments, cache_dir, indexes)


async def _export(arguments: argparse.Namespace, cache_dir: Path, indexes: Path) -> int:
    cid, to_stdout = cid_alone(arguments.cid), arguments.file == STANDARD_OUTPUT
    if to_stdout:
        _check_standard_output(arguments.v2)
    with Progress("indexing") as indexing, Progress("exporting") as progress:
        settings = OpenSettings(folders.library(arguments.library), indexes, progress=indexing.of_file)
        async with opened_sources(_sources(arguments.sources), settings) as sources:
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
                    told = {"exported": cids.text(cid), "file": arguments.file, "bytes": size}
                    console.values(told)
                    return 0
                console.line(f"exported {cids.text(cid)} to {arguments.file}, {units.human(size)}")
    return 0


def cat(arguments: argparse.Namespace) -> int:
    cache_dir = folders.cache_dir(arguments.cache_dir)
    with_cars = any(os.path.exists(source) for source in arguments.sources or ())
    indexes = cache_folder.indexes(cache_dir) if with_cars else cache_dir
    return trio.run(_cat, arguments, cache_dir, indexes)


async def _cat(arguments: argparse.Namespace, cache_dir: Path, indexes: Path) -> int:
    path = paths.parse(arguments.path)
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    if arguments.raw and path.names:
        raise UsageError("--raw takes a CID alone: a block has no path")
    settings = OpenSettings(folders.library(arguments.library), indexes)
    async with opened_sources(_sources(arguments.sources), settings) as sources:
        get = _getter(SourcePool(sources), cache_folder.socket_path(cache_dir))
        parts = _block(path.root, get) if arguments.raw else importer.content(path, get)
        async for part in parts:
            await threads.run_sync(sys.stdout.buffer.write, part)
    await threads.run_sync(sys.stdout.buffer.flush)
    return 0


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


def _sources(given: Sequence[str] | None) -> Sequence[str]:
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
