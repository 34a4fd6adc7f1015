"""`ipfs://` and `ipns://` for fsspec (https://filesystem-spec.readthedocs.io): read-only, over the same cache
as a mount.

If a mount uses the cache folder, files are read through the mount. If no process uses it, this process does,
in a new thread. If another program uses it, this process has a temporary cache.

Concurrency: any thread. The caller needs no event loop.
"""

import atexit
import inspect
import os
import stat as modes
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import trio
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem  # type: ignore[import-untyped]

from ipfsfuse import client, config, errors
from ipfsfuse.api.filesystem import Entry, File, Kind, Stat, open_filesystem, path_in_mount
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.dag.path import can_hold

T = TypeVar("T")

BLOCK_SIZE = 4 << 20
"""The default size of a file's buffer: four leaves."""
OPEN_SECONDS = 30.0
FILESYSTEM_OPTIONS = frozenset(inspect.signature(open_filesystem).parameters)
OPEN_FILES = 32
"""Files that the file system's thread keeps open, for their readahead."""

_ERRORS: Sequence[tuple[type[errors.IpfsFuseError], type[OSError]]] = (
    (errors.NotFound, FileNotFoundError),
    (errors.NotACid, FileNotFoundError),
    (errors.UsageError, FileNotFoundError),
    (errors.NotADirectory, NotADirectoryError),
    (errors.IsADirectory, IsADirectoryError),
    (errors.NotAllowed, PermissionError),
    (errors.Unavailable, TimeoutError),
    (errors.IpfsFuseError, OSError),
)
"""The exceptions that users of fsspec expect for our errors. The first that fits is used."""


_Backend: TypeAlias = "_OwnThread | _ThroughMount"
"""Gives content. Its paths are `CID/a/b`. `resolve` gives the path of an IPNS name. `ls` gives names with
their attributes, or the roots for an empty path."""


class IpfsFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """`fsspec.filesystem("ipfs")`. Paths are `CID/a/b`. Names are not percent-encoded.

    Options are those of `ipfsfuse.open_filesystem`. They are ignored if a mount uses the cache folder."""

    protocol: str | tuple[str, ...] = "ipfs"
    root_marker = ""
    cachable = True

    def __init__(self, *args: object, **options: Any) -> None:
        super().__init__(*args, **options)
        self._options = {key: value for key, value in options.items() if key in FILESYSTEM_OPTIONS}

    @property
    def _backend(self) -> _Backend:
        """Looked up for each call, since this may be a forked child, or the mount may have ended."""
        return _backend(**self._options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        text = os.fspath(path)
        scheme = cls.protocol if isinstance(cls.protocol, str) else cls.protocol[0]
        for prefix in (f"{scheme}://", f"/{scheme}/", f"{scheme}::"):
            text = text.removeprefix(prefix)
        return text.strip("/")

    def _target(self, path: str) -> str:
        """The path below a CID that `path` stands for."""
        return path

    # -- reading ---------------------------------------------------------------------------------------------

    def info(self, path: str, **_options: object) -> dict[str, Any]:
        stripped = self._strip_protocol(path)
        if not stripped:
            return {"name": "", "size": 0, "type": "directory"}
        with _translated():
            return _info(stripped, self._backend.stat(self._target(stripped)))

    def ls(self, path: str, detail: bool = True, **_options: object) -> list[Any]:
        stripped = self._strip_protocol(path)
        with _translated():
            found = self._listed(stripped)
        return found if detail else [each["name"] for each in found]

    def _listed(self, path: str) -> list[dict[str, Any]]:
        target = self._target(path) if path else ""
        try:
            entries = self._backend.ls(target)
        except errors.NotADirectory:
            return [_info(path, self._backend.stat(target))]
        return [_info(f"{path}/{name}" if path else name, each) for name, each in entries]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_options: object
    ) -> bytes:
        with _translated():
            target = self._target(self._strip_protocol(path))
            size = self._backend.stat(target).size
            first = 0 if start is None else max(start + size if start < 0 else start, 0)
            last = size if end is None else min(end + size if end < 0 else end, size)
            return self._backend.read(target, first, max(first, last))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> "IpfsFile":
        if mode != "rb":
            raise PermissionError(f"{path}: IPFS content is read-only")
        return IpfsFile(self, path, block_size=block_size or BLOCK_SIZE, **options)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end` of a file."""
        with _translated():
            return self._backend.read(self._target(path), start, end)

    def ukey(self, path: str) -> str:
        return str(self.info(path)["cid"])

    def checksum(self, path: str) -> int:
        return int.from_bytes(self.ukey(path).encode()[-16:])

    # -- changing: never -------------------------------------------------------------------------------------

    def _refuse(self, path: object = "", *_args: object, **_options: object) -> Any:
        raise PermissionError(f"{path}: IPFS content is read-only")

    mkdir = makedirs = rmdir = rm_file = _rm = rm = cp_file = mv = touch = pipe_file = put_file = _refuse


class IpnsFileSystem(IpfsFileSystem):
    """`fsspec.filesystem("ipns")`. Paths are `NAME/a/b`. A name is that of a key, or a domain. It is resolved
    again after its time to live."""

    protocol = "ipns"

    def _target(self, path: str) -> str:
        name, slash, rest = path.partition("/")
        return f"{self._backend.resolve(name)}{slash}{rest}"

    def _listed(self, path: str) -> list[dict[str, Any]]:
        return super()._listed(path) if path else []  # there is no list of all names


class IpfsFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """An open file, which fsspec buffers."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return bytes(self.fs.read_range(self.path, start, min(end, self.size)))


def _info(path: str, of: Stat) -> dict[str, Any]:
    return {
        "name": path,
        "size": of.size,
        "type": {"symlink": "link"}.get(of.kind, of.kind),
        "cid": of.cid,
        "mode": of.mode,
        "mtime": of.mtime_ns / 1e9,
    }


@contextmanager
def _translated() -> Iterator[None]:
    """Raises our errors as exceptions of Python."""
    try:
        yield
    except errors.IpfsFuseError as exc:
        raise next(known for ours, known in _ERRORS if isinstance(exc, ours))(str(exc)) from exc


# -- where content comes from --------------------------------------------------------------------------------

_lock = threading.Lock()
_open: dict[tuple[int, str], _Backend] = {}
"""By process and options: `ipfs` and `ipns` share one."""


def _backend(**options: Any) -> _Backend:
    """The backend for these options. An open one is reused if it is still usable. Raises OSError."""
    key = os.getpid(), repr(sorted(options.items()))
    with _lock, _translated():
        found = _open.get(key)
        if found is None or not found.is_usable():
            found = _open[key] = _open_backend(options)
        return found


def _open_backend(options: dict[str, Any]) -> _Backend:
    cache_dir = config.cache_dir(options.get("cache_dir"))
    if options.get("isolated") or cache_folder.is_free(cache_dir):
        with suppress(errors.StoreFailed):  # another process was quicker
            return _OwnThread(options)
    announced = cache_folder.announced(cache_dir)
    if announced is not None and os.path.isabs(announced[1]) and os.path.ismount(announced[1]):
        return _ThroughMount(Path(announced[1]), cache_folder.socket_path(cache_dir))
    return _OwnThread({**options, "isolated": True})


class _OwnThread:
    """A file system in a new thread of this process, with a trio loop."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Raises the errors of `open_filesystem`."""
        self._options = options
        self._opened: Future[None] = Future()
        self._files: dict[str, File] = {}
        self._thread = threading.Thread(target=self._run, name="ipfsfuse", daemon=True)
        self._thread.start()
        self._opened.result()
        atexit.register(self._close)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:
            if not self._opened.done():
                self._opened.set_exception(exc)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._end = trio.Event()
        async with open_filesystem(**self._options) as self._fs:
            self._opened.set_result(None)
            await self._end.wait()

    def is_usable(self) -> bool:
        return self._thread.is_alive()

    def _call(self, call: Callable[..., Awaitable[T]], *args: Any) -> T:
        return trio.from_thread.run(call, *args, trio_token=self._token)

    def resolve(self, name: str) -> str:
        return self._call(self._fs.resolve, f"/ipns/{name}").removeprefix("/ipfs/")

    def stat(self, path: str) -> Stat:
        return self._call(self._fs.stat, f"/ipfs/{path}")

    def ls(self, path: str) -> Sequence[tuple[str, Stat]]:
        return self._call(self._ls, path)

    async def _ls(self, path: str) -> Sequence[tuple[str, Stat]]:
        if not path:
            return [(cid, await self._fs.stat(cid)) for cid in await self._fs.roots()]
        entries = await self._fs.ls(f"/ipfs/{path}")
        found: dict[str, Stat] = {}

        async def look(entry: Entry) -> None:
            if entry.size is not None:
                found[entry.name] = Stat(entry.cid, "file", entry.size, 0o444, 0)
                return
            with suppress(errors.IpfsFuseError):  # one bad child never spoils a listing
                found[entry.name] = await self._fs.stat(entry.cid, follow_symlinks=False)

        for at in range(0, len(entries), 64):
            async with trio.open_nursery() as nursery:
                for entry in entries[at : at + 64]:
                    nursery.start_soon(look, entry)
        return [(entry.name, found[entry.name]) for entry in entries if entry.name in found]

    def read(self, path: str, start: int, end: int) -> bytes:
        return self._call(self._read, path, start, end)

    async def _read(self, path: str, start: int, end: int) -> bytes:
        file = self._files.pop(path, None) or await self._fs.open(f"/ipfs/{path}")
        try:
            return await file.read(start, max(0, end - start))
        finally:
            other = self._files.pop(path, None)  # opened by a read at the same time
            self._files[path] = file  # keeps its readahead for the next read
            oldest = list(self._files)[:-OPEN_FILES]
            for each in filter(None, [other, *map(self._files.pop, oldest)]):
                await each.aclose()

    def _close(self) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._end.set)
        self._thread.join(10)


class _ThroughMount:
    """The mount that uses the cache folder."""

    def __init__(self, mountpoint: Path, control: Path) -> None:
        self._mountpoint, self._control = mountpoint, control
        self._device = os.stat(mountpoint).st_dev
        self._names: dict[str, tuple[str, float]] = {}

    def is_usable(self) -> bool:
        """Whether the mount still exists. Otherwise the files at its mountpoint are not IPFS content."""
        with suppress(OSError):
            return os.stat(self._mountpoint).st_dev == self._device
        return False

    def resolve(self, name: str) -> str:
        path, until = self._names.get(name, ("", 0.0))
        if until <= time.monotonic():
            answer = client.call(self._control, "resolve", name=name, timeout=OPEN_SECONDS + 5)
            path = str(answer["path"]).removeprefix("/ipfs/")
            self._names[name] = path, time.monotonic() + float(answer["seconds"])
        return path

    def _at(self, path: str) -> str:
        """The place of `path` in the mount. Raises NotFound for a path that would leave the mount, NotAllowed
        if a symlink leads out of the root."""
        stored = path.encode("utf-8", "surrogateescape")
        if not all(map(can_hold, stored.split(b"/"))):
            raise errors.NotFound(f"{path} is not a path below a CID")
        return path_in_mount(self._mountpoint, os.fsdecode(stored))

    def stat(self, path: str) -> Stat:
        return self._stat(self._at(path))

    def _stat(self, at: str) -> Stat:
        """The attributes of the file `at`. A symlink is not followed."""
        info = os.lstat(at)
        is_directory = modes.S_ISDIR(info.st_mode)
        cid = os.getxattr(at, "ipfs.cid", follow_symlinks=False).decode()
        size = 0 if is_directory else info.st_size
        kind: Kind = "directory" if is_directory else "symlink" if modes.S_ISLNK(info.st_mode) else "file"
        return Stat(cid, kind, size, modes.S_IMODE(info.st_mode), info.st_mtime_ns)

    def ls(self, path: str) -> Sequence[tuple[str, Stat]]:
        at = self._at(path) if path else str(self._mountpoint)
        try:
            names = os.listdir(at)
        except NotADirectoryError as exc:
            raise errors.NotADirectory(f"{path} is not a directory") from exc
        found: list[tuple[str, Stat]] = []
        for name in names:
            with suppress(OSError):  # one bad child never spoils a listing
                found.append((name, self._stat(os.path.join(at, name))))
        return found

    def read(self, path: str, start: int, end: int) -> bytes:
        with open(self._at(path), "rb", buffering=0) as file:
            pieces: list[bytes] = []
            while start < end and (piece := os.pread(file.fileno(), end - start, start)):
                pieces.append(piece)
                start += len(piece)
            return b"".join(pieces)
