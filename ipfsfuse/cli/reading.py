"""`get`, `cat`, `export` and `push`: read content without a mount.

If a mount uses the cache folder, `get` reads through that mount. Otherwise it opens the sources, and keeps
fetched content in the cache folder, like a mount. `cat`, `export` and `push` read from the sources, and ask a
running mount for missing blocks. The mount that uses the cache folder resolves IPNS names, or else the
sources do.
"""

import argparse
import base64
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio

from ipfsfuse import client
from ipfsfuse.api.filesystem import Filesystem, open_filesystem, path_in_mount
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import ProgressBar
from ipfsfuse.cli.mounting import header_files, source
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import path as paths
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import IpfsPath, cid_alone
from ipfsfuse.errors import DaemonFailed, StoreFailed, Unavailable, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.importer import export as exporting
from ipfsfuse.importer import push as pushing
from ipfsfuse.importer.export import GetBlock
from ipfsfuse.sources import defaults
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.settings import HttpSettings
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import OpenSettings, open_sources, parse_source, with_headers
from ipfsfuse.units import human

READ_BYTES = 4 << 20
BLOCK_DEADLINE = 30.0
"""Seconds for one block."""


# -- sources and names ---------------------------------------------------------------------------------------


def _given(arguments: argparse.Namespace) -> Sequence[str]:
    """The sources on the command line. Sources of a configuration are left out, since a mount has them
    too."""
    return arguments.sources if arguments.origins["from"] == "argument" else ()


def _sources(arguments: argparse.Namespace) -> Sequence[str]:
    return [source(text) for text in defaults.chosen(arguments.sources)]


def open_settings(
    arguments: argparse.Namespace, indexing: ProgressBar | None = None, node: Sequence[str] = ()
) -> OpenSettings:
    """The settings for the sources, and for the `node` that gets content. Makes the folder for indexes if
    there are CAR files."""
    sources = [*_sources(arguments), *node]
    cache_dir = folders.cache_dir(arguments.cache_dir)
    return OpenSettings(
        folders.library(arguments.library),
        cache_folder.indexes(cache_dir) if any(map(os.path.exists, arguments.sources or ())) else cache_dir,
        with_headers(HttpSettings(), header_files(arguments, sources), sources),
        progress=indexing.of_file if indexing is not None else None,
        routers=tuple(arguments.routers or ()),
        allow_private_providers=arguments.allow_private_providers,
    )


def _mount(arguments: argparse.Namespace) -> Path | None:
    """The mountpoint of the mount that uses the cache folder. None if there is none, or if the command line
    names sources."""
    folder = folders.cache_dir(arguments.cache_dir)
    if _given(arguments) or cache_folder.is_free(folder):
        return None
    daemon = cache_folder.announced(folder)
    return None if daemon is None or not os.path.isabs(daemon[1]) else Path(daemon[1])


def _filesystem(arguments: argparse.Namespace, *, isolated: bool) -> AbstractAsyncContextManager[Filesystem]:
    sources = _sources(arguments)
    return open_filesystem(
        sources=sources,
        cache_dir=folders.cache_dir(arguments.cache_dir),
        library=folders.library(arguments.library),
        isolated=isolated,
        dns=arguments.dns,
        routers=tuple(arguments.routers or ()),
        header_files=dict(header_files(arguments, sources)),
        allow_private_providers=arguments.allow_private_providers,
    )


async def _path(arguments: argparse.Namespace, text: str) -> IpfsPath:
    """The path in `text`, with its IPNS name resolved. Raises NotACid, NotFound, Unavailable, UsageError."""
    named = paths.split_ipns(text)
    if named is None:
        return paths.parse(text)
    cache_dir = folders.cache_dir(arguments.cache_dir)
    if _mount(arguments) is None:
        free = not _given(arguments) and cache_folder.is_free(cache_dir)
        async with _filesystem(arguments, isolated=not free) as filesystem:
            return paths.parse(await filesystem.resolve(text))
    control = cache_folder.socket_path(cache_dir)
    ask = partial(client.call, control, "resolve", name=named[0])
    found = paths.parse(str((await threads.run_sync(ask, abandon_on_cancel=True))["path"]))
    return IpfsPath(found.root, found.names + named[1])


# -- `get` ---------------------------------------------------------------------------------------------------


def get(arguments: argparse.Namespace) -> int:
    name = _name(arguments.path)
    target = Path(arguments.output or name)
    if target.is_dir() and arguments.output:
        target /= name
    if os.path.lexists(target):
        raise UsageError(f"{target} exists already: name another place with -o")
    mount = _mount(arguments)
    with ProgressBar("getting") as progress:
        done = _Got(progress)
        try:
            if mount is None:
                trio.run(_get, arguments, target, done)
            else:
                path = os.fsdecode(bytes(trio.run(_path, arguments, arguments.path)))
                source = path_in_mount(mount, path.removeprefix("/ipfs/"), follow=False)
                _copy(Path(source), target, done)
        except OSError as exc:
            raise StoreFailed(f"{exc.filename or target}: {exc.strerror}") from exc
    return console.answer(
        arguments,
        {"path": str(target), "files": done.files, "bytes": done.bytes},
        f"got {target}, {done.files} {'file' if done.files == 1 else 'files'}, {human(done.bytes)}",
    )


def _name(path: str) -> str:
    """The last name of a path; if it has none, its CID or IPNS name."""
    named = paths.split_ipns(path)
    if named is not None:
        return os.fsdecode(named[1][-1]) if named[1] else named[0]
    return os.fsdecode(bytes(paths.parse(path)).rpartition(b"/")[2])


class _Got:
    """Counts what was written."""

    def __init__(self, progress: ProgressBar) -> None:
        self._progress = progress
        self.files = self.bytes = 0

    def add(self, count: int) -> None:
        self.bytes += count
        self._progress(self.bytes)


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """Writes a new file. Removes it on an error, since a part of it would look like the whole."""
    out = target.open("xb")
    try:
        with out:
            yield out
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _copy(path: Path, target: Path, done: _Got) -> None:
    """Writes only new files and folders, so that a name that comes twice can't lead out of `target`."""
    waiting = [(path, target)]  # a tree may be deeper than Python can call
    while waiting:
        path, target = waiting.pop()
        if path.is_symlink():
            target.symlink_to(os.readlink(path))
        elif path.is_dir():
            target.mkdir()
            waiting += [(path / name, target / name) for name in reversed(os.listdir(path))]
        else:
            with path.open("rb") as file, _new_file(target) as out:
                while piece := file.read(READ_BYTES):
                    out.write(piece)
                    done.add(len(piece))
            done.files += 1


async def _get(arguments: argparse.Namespace, target: Path, done: _Got) -> None:
    async with _filesystem(arguments, isolated=bool(_given(arguments))) as filesystem:
        await _get_tree(filesystem, await filesystem.resolve(arguments.path), target, done)


async def _get_tree(filesystem: Filesystem, path: str, target: Path, done: _Got) -> None:
    waiting = [(path, target)]  # as in `_copy`
    while waiting:
        path, target = waiting.pop()
        found = await filesystem.stat(path, follow_symlinks=False)
        if found.kind == "symlink":
            await threads.run_sync(target.symlink_to, os.fsdecode(_stored(await filesystem.readlink(path))))
        elif found.kind == "directory":
            await threads.run_sync(target.mkdir)
            waiting += [
                (f"/ipfs/{entry.cid}", target / os.fsdecode(_stored(entry.name)))
                for entry in reversed(await filesystem.ls(path))
                if paths.can_hold(_stored(entry.name))
            ]
        else:
            with _new_file(target) as out:
                async with await filesystem.open(path) as file:
                    offset = 0
                    while piece := await file.read(offset, READ_BYTES):
                        await threads.run_sync(out.write, piece)
                        offset += len(piece)
                        done.add(len(piece))
            done.files += 1


def _stored(name: str) -> bytes:
    """The bytes of a name in IPFS. They are used on disk too, whatever the locale's encoding is."""
    return name.encode("utf-8", "surrogateescape")


# -- `cat`, `export` and `push` ------------------------------------------------------------------------------

STANDARD_OUTPUT = "-"


def export(arguments: argparse.Namespace) -> int:
    return trio.run(_export, arguments)


async def _export(arguments: argparse.Namespace) -> int:
    to_stdout = arguments.file == STANDARD_OUTPUT
    if to_stdout:
        _check_standard_output(arguments.v2)
    cid = await _root(arguments)
    with ProgressBar("indexing") as indexing, ProgressBar("exporting") as progress:
        async with _blocks(
            arguments, _sources_beside_mount(arguments), open_settings(arguments, indexing)
        ) as get:
            if to_stdout:
                _end_at_once_by_signals()
                await exporting.export_to_stream(cid, get, sys.stdout.fileno(), progress)
            else:
                size = await exporting.export(cid, get, Path(arguments.file), arguments.v2, progress)
                console.answer(
                    arguments,
                    {"exported": cids.text(cid), "file": arguments.file, "bytes": size},
                    f"exported {cids.text(cid)} to {arguments.file}, {human(size)}",
                )
    return 0


def _end_at_once_by_signals() -> None:
    """Lets SIGINT and SIGTERM end the process at once: a write that waits for a slow reader can't be
    cancelled, and there is nothing to clean up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def push(arguments: argparse.Namespace) -> int:
    return trio.run(_push, arguments)


async def _push(arguments: argparse.Namespace) -> int:
    if parse_source(arguments.to).kind != defaults.KUBO:
        raise UsageError(f"--to {arguments.to}: not a Kubo node; write kubo, or kubo+http://host:port")
    cid = await _root(arguments)
    with ProgressBar("indexing") as indexing, ProgressBar("pushing") as progress:
        sources = _sources(arguments) if _given(arguments) else [defaults.LIBRARY]
        settings = open_settings(arguments, indexing, [arguments.to])
        async with (
            _blocks(arguments, sources, settings) as get,
            open_sources([arguments.to], settings) as (node,),
        ):
            assert isinstance(node, Kubo)
            sent = await pushing.push(cid, get, node.rpc(), progress)
    return console.answer(
        arguments,
        {"pushed": cids.text(cid), "to": node.name, "pinned": True} | sent._asdict(),
        f"pushed {cids.text(cid)} to {node.name} and pinned it there: {sent.blocks} blocks sent, "
        f"{human(sent.bytes)}; {sent.present} were there",
    )


def cat(arguments: argparse.Namespace) -> int:
    return trio.run(_cat, arguments)


async def _cat(arguments: argparse.Namespace) -> int:
    path = await _path(arguments, arguments.path)
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    if arguments.raw and path.names:
        raise UsageError("--raw takes a CID alone: a block has no path")
    async with _blocks(arguments, _sources_beside_mount(arguments), open_settings(arguments)) as get:
        _end_at_once_by_signals()
        parts = _block(path.root, get) if arguments.raw else exporting.content(path, get)
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
    """Prints a line of JSON. Call it in a thread, since it may wait for a slow reader."""
    console.values(values, indent=None)


async def _block(cid: Cid, get: GetBlock) -> AsyncIterator[bytes]:
    yield await exporting.verified(cid, get)


def _check_standard_output(v2: bool) -> None:
    """Raises UsageError if a CAR can't be written there."""
    if v2:
        raise UsageError("--v2 needs a file: the place of its index is known only at the end")
    if sys.stdout is None:
        raise UsageError("standard output is closed: name a FILE")
    if sys.stdout.isatty():
        raise UsageError("a CAR is not for a terminal: name a FILE, or redirect it with | or >")


async def _root(arguments: argparse.Namespace) -> Cid:
    """The CID in the argument. Raises UsageError for a path below a CID, and the errors of `_path`."""
    if paths.split_ipns(arguments.cid) is None:
        return cid_alone(arguments.cid)
    return cid_alone((await _path(arguments, arguments.cid)).text)


def _sources_beside_mount(arguments: argparse.Namespace) -> Sequence[str]:
    """The sources that are asked before a running mount: the library, since the mount has the other sources.
    If no mount runs, all sources of the configuration."""
    return [defaults.LIBRARY] if _mount(arguments) is not None else _sources(arguments)


@asynccontextmanager
async def _blocks(
    arguments: argparse.Namespace, sources: Sequence[str], settings: OpenSettings
) -> AsyncIterator[GetBlock]:
    """Gets blocks from `sources`, or else from a running mount, which has its own cache and sources."""
    control = cache_folder.socket_path(folders.cache_dir(arguments.cache_dir))
    async with open_sources(sources, settings) as opened:
        pool = SourcePool(opened)

        async def get(wanted: Cid) -> bytes:
            try:
                with trio.fail_after(BLOCK_DEADLINE):
                    return bytes((await pool.get(wanted)).block)
            except (Unavailable, trio.TooSlowError) as exc:
                block = await threads.run_sync(_from_mount, control, wanted, abandon_on_cancel=True)
                if block is None:
                    raise Unavailable(
                        f"{cids.text(wanted)} is in no source and no running mount: name one that has it "
                        "with --from"
                    ) from exc
                return block

        yield get


def _from_mount(control: Path, cid: Cid) -> bytes | None:
    """A block from a running mount, which may fetch it. None if no mount runs."""
    try:
        return base64.b64decode(client.call(control, "block", cid=cids.text(cid))["data"])
    except DaemonFailed:
        return None
