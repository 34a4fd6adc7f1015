"""Reads content by path, for trio programs, without a mount. It uses a cache folder and sources.

    async with ipfsfuse.open_filesystem() as fs:
        for entry in await fs.ls("/ipfs/CID"):
            print(entry.name)
        async with await fs.open("/ipfs/CID/file") as file:
            data = await file.read(0, 100)

A path is `/ipfs/CID/...`, `CID/...` or `/ipns/NAME/...`. In a URL (`ipfs://`, `ipns://`) names are
percent-encoded. Symlinks on the way are followed if they are relative and stay below the root.

Concurrency: any number of tasks of the trio loop in which the file system was opened.
"""

import os
import stat as modes
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import trio

from ipfsfuse import config, content
from ipfsfuse.cache.store.folder import isolated_folder, lock_folder
from ipfsfuse.config import GIB, ContentConfig
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import traversal
from ipfsfuse.dag.nodes import Directory, Node, Shard, Symlink
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.errors import IsADirectory, NotADirectory, NotAllowed, NotFound
from ipfsfuse.fileio import threads
from ipfsfuse.sources import defaults
from ipfsfuse.sources.base import request_of
from ipfsfuse.vfs.open_file import BufferBudget, OpenFile
from ipfsfuse.vfs.tree import Tree, attributes_of

MAX_SYMLINKS = 40
"""The most symlinks that are followed for one path, as in Linux."""
READ_BYTES = 16 << 20
"""Bytes that are read by one call."""

Kind = Literal["file", "directory", "symlink"]


@dataclass(frozen=True, slots=True)
class Stat:
    """The attributes of a file, a directory or a symlink."""

    cid: str
    kind: Kind
    size: int
    """Bytes of a file's content or a symlink's target; 0 for a directory."""
    mode: int
    """Permission bits as stored, else 0444, or 0555 for a directory."""
    mtime_ns: int
    """As stored, in nanoseconds since 1970; else 0."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a directory."""

    name: str
    """Bytes that are not UTF-8 are surrogates, as in `os.fsdecode`."""
    cid: str
    size: int | None
    """Content bytes of a file in one raw block, as its link claims; None if only its block has the size."""


class File:
    """An open file. Close it with `aclose`, or use `async with`."""

    def __init__(self, file: OpenFile, size: int, cid: str, deadline: float) -> None:
        self.size = size
        self.cid = cid
        self._file, self._deadline = file, deadline

    async def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """`size` verified bytes from `offset` on (None: all), or fewer at the end of the file.

        Raises Unavailable if no source gave a block in time, WrongBlock, Malformed; ValueError for a negative
        number."""
        if offset < 0 or (size is not None and size < 0):
            raise ValueError("offset and size can't be negative")
        end = self.size if size is None else min(offset + size, self.size)
        pieces: list[bytes] = []
        while offset < end:
            with request_of(None, trio.current_time() + self._deadline):
                piece = bytes(await self._file.read(offset, min(READ_BYTES, end - offset)))
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def aclose(self) -> None:
        """Closes the file and ends its readahead."""
        self._file.close()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._file.close()


class Filesystem:
    """Made by `open_filesystem`."""

    def __init__(self, opened: content.Content, tree: Tree, deadline: float) -> None:
        self._content, self._tree, self._deadline = opened, tree, deadline
        self._buffer_budget = BufferBudget()

    async def roots(self) -> Sequence[str]:
        """The root CIDs of the library and of the CAR files."""
        return [cids.text(cid) for cid in await threads.run_sync(self._content.pool.roots)]

    async def resolve(self, path: str) -> str:
        """`path` with its IPNS name resolved, as `/ipfs/CID/...`. Raises NotFound, Unavailable, NotACid,
        UsageError."""
        return (await self._content.names.path_of(path)).text

    async def stat(self, path: str, *, follow_symlinks: bool = True) -> Stat:
        """Raises NotFound, NotADirectory, Unavailable, WrongBlock, Malformed, Unsupported."""
        node = await self._node(path, follow_symlinks)
        found = attributes_of(node)
        kind: Kind = "directory" if found.is_directory else "symlink" if modes.S_ISLNK(found.mode) else "file"
        return Stat(cids.text(node.cid), kind, found.size, modes.S_IMODE(found.mode), found.mtime)

    async def ls(self, path: str) -> Sequence[Entry]:
        """The entries of a directory, in its own order. No child is fetched. Raises NotADirectory, and the
        errors of `stat`."""
        node = await self._node(path, follow=True)
        if not isinstance(node, Directory | Shard):
            raise NotADirectory(f"{path} is not a directory")
        found: list[Entry] = []
        cookie = 0
        while True:
            with request_of(None, trio.current_time() + self._deadline):
                page = await self._tree.entries(node.cid, cookie)
            for entry in page.entries:
                attributes = self._tree.claimed_attributes(entry.cid, entry.tsize)
                size = attributes.size if attributes is not None and modes.S_ISREG(attributes.mode) else None
                name = entry.name.decode("utf-8", "surrogateescape")
                found.append(Entry(name, cids.text(entry.cid), size))
                cookie = entry.cookie
            if page.end:
                return found

    async def open(self, path: str) -> File:
        """Opens a file. This fetches the blocks on the way, and no content. Raises IsADirectory, and the
        errors of `stat`."""
        node = await self._node(path, follow=True)
        if isinstance(node, Directory | Shard):
            raise IsADirectory(f"{path} is a directory")
        with request_of(None, trio.current_time() + self._deadline):
            file = await self._tree.file(node.cid)
        return File(
            OpenFile(self._tree, file, self._buffer_budget), file.size, cids.text(file.cid), self._deadline
        )

    async def read_bytes(self, path: str) -> bytes:
        """The whole content of a file."""
        async with await self.open(path) as file:
            return await file.read()

    async def readlink(self, path: str) -> str:
        """The target of a symlink, as stored. Raises NotALink, and the errors of `stat`."""
        node = await self._node(path, follow=False)
        target = await self._tree.readlink(node.cid)
        return target.decode("utf-8", "surrogateescape")

    # -- paths -----------------------------------------------------------------------------------------------

    async def _node(self, text: str, follow: bool) -> Node:
        """The node at the path `text`. Symlinks on the way are followed. A symlink at the end is followed if
        `follow`."""
        path = await self._content.names.path_of(text)
        with request_of(None, trio.current_time() + self._deadline):
            return await self._walk(path, follow)

    async def _walk(self, path: IpfsPath, follow: bool) -> Node:
        ways: list[Node] = [await self._tree.node(path.root)]
        left = list(reversed(path.names))
        links = 0
        while left or (follow and isinstance(ways[-1], Symlink)):
            here = ways[-1]
            if isinstance(here, Symlink):
                links += 1
                if links > MAX_SYMLINKS:
                    raise NotFound(f"{path}: too many symlinks")
                if here.target.startswith(b"/") or len(ways) == 1:
                    raise NotAllowed(f"{path}: a symlink leads out of {cids.text(path.root)}")
                ways.pop()
                left += [name for name in reversed(here.target.split(b"/")) if name not in (b"", b".")]
                continue
            name = left.pop()
            if name == b"..":
                if len(ways) == 1:
                    raise NotAllowed(f"{path}: a symlink leads out of {cids.text(path.root)}")
                ways.pop()
                continue
            if not isinstance(here, Directory | Shard):
                raise NotADirectory(f"{path}: a file was used as a directory")
            link = await traversal.drive(traversal.child(here, name), self._tree.nodes)
            if link is None:
                raise NotFound(f"{path}: no such entry")
            ways.append(await self._tree.node(link.cid))
        return ways[-1]


def path_in_mount(mountpoint: Path, path: str, *, follow: bool = True) -> str:
    """The place of `path`, as CID/a/b, in a mount, with all symlinks resolved (at the end only if `follow`).
    Symlinks may not lead out of the root, to other files of this machine. Raises NotAllowed, OSError."""
    top = os.path.realpath(mountpoint)
    root = path.partition("/")[0]
    parent, name = os.path.split(os.path.join(top, path))
    followed = os.path.join(parent, name) if follow else parent
    missing = None
    try:
        found = os.path.realpath(followed, strict=True)
    except FileNotFoundError as exc:
        found, missing = os.path.realpath(followed), exc
    found = found if follow else os.path.join(found, name)
    if not Path(found).is_relative_to(os.path.join(top, root)):
        raise NotAllowed(f"{path}: a symlink leads out of {root}")
    if missing is not None:
        raise missing
    return found


@asynccontextmanager
async def open_filesystem(
    *,
    sources: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    library: str | Path | None = None,
    isolated: bool = False,
    offline: bool = False,
    budget: int = 10 * GIB,
    deadline: float = 30.0,
    dns: str = "system",
    routers: Sequence[str] = (),
    header_files: Mapping[str, str | Path] | None = None,
    allow_private_providers: bool = False,
) -> AsyncIterator[Filesystem]:
    """Opens a file system for the length of the block.

    `sources` are written as for `ipfsfuse mount --from`, and have the same default. `cache_dir` and `library`
    are those of the commands by default. With `isolated`, a new cache folder is used, and removed at the end.
    `budget` is in bytes. A call without a verified block fails after `deadline` seconds. `header_files` maps
    the URL of a source to a file with HTTP headers for it. Raises StoreFailed if another process uses the
    cache folder, SourceFailed, UsageError."""
    asked = ContentConfig(
        cache_dir=config.cache_dir(cache_dir),
        library=config.library(library),
        sources=defaults.chosen(sources),
        offline=offline,
        budget=budget,
        deadline=deadline,
        dns=dns,
        routers=tuple(routers),
        header_files=tuple((url, Path(path)) for url, path in (header_files or {}).items()),
        allow_private_providers=allow_private_providers,
    )
    failure: Exception | None = None
    async with AsyncExitStack() as stack:
        folder_path = stack.enter_context(isolated_folder()) if isolated else asked.cache_dir
        folder = stack.enter_context(lock_folder(folder_path))
        folder.announce(os.getpid(), "a Python program")
        opened = await stack.enter_async_context(content.open_content(asked, folder))
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        try:
            yield Filesystem(opened, Tree(opened.cache.reader, nursery), deadline)
        except Exception as exc:  # the caller's own exception: the nursery would wrap it in a group
            failure = exc
    if failure is not None:
        raise failure
