"""The cache folder: its names, its marker, its lock, and the migration of an older layout.

`--cache-dir DIR` names a folder that may hold other things. Ours is one marked subfolder in it:

    DIR/ipfsfuse-cache/     0700
      format                the marker: one line, `ipfsfuse cache 3`
      CACHEDIR.TAG          the standard tag (bford.info/cachedir), by which backups leave the folder out
      lock                  locked by the daemon that uses the folder, as the folder itself is
      daemon.json           the process that uses the folder, and its mountpoint
      control               the control socket
      inode-key             32 random bytes, the key of the inode numbers
      mount-id              the name of this cache at Kubo nodes
      index.sqlite          where blocks are in packs, when they were used, names in the root
      pinned/<CID>          what the user pinned, one JSON file each
      staging/<CID>[.part]  files of more than 64 KiB
      packs/<number>.pack   small blocks
      indexes/              indexes of CAR files that contain none
      log, log.1            the daemon's log

No other module knows these names. Every file is opened through the descriptor of its folder, and symlinks are
never followed. Only files with one of our names are written, replaced or removed; others are left alone.

Concurrency: calls block for a few system calls. Make them at the start, or in a thread.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from ipfsfuse import __version__
from ipfsfuse.errors import FolderInUse, StoreFailed
from ipfsfuse.fileio.files import Closing, Status, stat_files, write_file

log = logging.getLogger(__name__)

NAME = "ipfsfuse-cache"
MIGRATING = ".ipfsfuse-cache.migrating"
"""The folder's name while the files of an older layout are moved into it."""
LAYOUT = 3
MARKER = "ipfsfuse cache"

FORMAT, CACHEDIR_TAG, LOCK, DAEMON, CONTROL = "format", "CACHEDIR.TAG", "lock", "daemon.json", "control"
INODE_KEY, MOUNT_ID, INDEX, LOG, OLD_LOG = "inode-key", "mount-id", "index.sqlite", "log", "log.1"
DAMAGED_INDEX = "index.malformed"
PINNED_FOLDER, STAGING, PACKS, INDEXES, NAMES, PINS = "pinned", "staging", "packs", "indexes", "names", "pins"

FILES = frozenset({
    FORMAT, CACHEDIR_TAG, LOCK, DAEMON, INODE_KEY, MOUNT_ID, INDEX, f"{INDEX}-wal", f"{INDEX}-shm",
    f"{INDEX}-journal", DAMAGED_INDEX, LOG, OLD_LOG,
})  # fmt: skip
FOLDERS = frozenset({PINNED_FOLDER, STAGING, PACKS, INDEXES, NAMES, PINS})
_KINDS = {
    **dict.fromkeys(FILES, stat.S_IFREG), **dict.fromkeys(FOLDERS, stat.S_IFDIR), CONTROL: stat.S_IFSOCK,
}  # fmt: skip
"""The type of each of our names, as in st_mode."""
WRITTEN_IN_PLACE = frozenset({INDEX, f"{INDEX}-wal", LOG})

TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    f"# This file is a cache directory tag created by ipfsfuse {__version__}.\n"
    "# For information about cache directory tags see https://bford.info/cachedir/\n"
)
_TAGGED_BY = re.compile(r"created by ipfsfuse (\S+)\.$", re.MULTILINE)
_TEMPORARY = re.compile(r"\.[A-Za-z0-9.-]{1,200}\.[0-9a-f]{16}\.tmp")
"""The temporary names of `write_file`."""
_MOUNT_ID = re.compile(r"[A-Za-z0-9.-]{1,64}-[0-9a-f]{16}")
KEY_BYTES = 32

LOCK_SECONDS = 0.5
"""How long to wait for a lock: a process that only checks it (`is_free`) holds it for a moment."""
MAX_SMALL = 1 << 16
"""The most bytes that are read of a small file of ours."""
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_SUBFOLDER_YET = NO_SPACE | {errno.ENOENT}
"""Errors after which a subfolder may be made later: no space is left, or our folder is missing."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def as_store_failed(doing: str) -> Iterator[None]:
    """Turns OSError into StoreFailed with the message "`doing`: reason"."""
    try:
        yield
    except OSError as exc:
        raise StoreFailed(f"{doing}: {exc.strerror or exc}") from exc


def inside(cache_dir: Path) -> Path:
    """Our folder in `cache_dir`."""
    return cache_dir / NAME


def socket_path(cache_dir: Path) -> Path:
    """The control socket of the mount that uses `cache_dir`."""
    return inside(cache_dir) / CONTROL


# -- files in an open folder ---------------------------------------------------------------------------------


def read_file(folder: int, name: str, most: int = MAX_SMALL) -> bytes:
    """The first `most` bytes of a regular file. Raises OSError, also for a symlink or anything else that is
    not a regular file."""
    with Closing(os.open(name, _READ, dir_fd=folder)) as file:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.pread(file, min(info.st_size, most), 0)


def remove_file(folder: int, name: str) -> None:
    """Removes a file, which may be missing, and syncs the folder."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
        os.fsync(folder)


STATUS_TOGETHER = 500
"""Files of which one call reads the status. Each call releases Python's lock and must wait for it again."""


class Subfolder:
    """A folder in our folder. It is created if it is missing; on a full disk, as soon as there is room."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, and StoreFailed if `path` is not a folder that only we may write."""
        self.path = path
        with _full_disk(f"{path} can't be made", NO_SUBFOLDER_YET):
            _ = self.fd

    @cached_property
    def fd(self) -> int:
        """Its descriptor. It names the same folder even if that is moved or replaced. Raises OSError,
        StoreFailed."""
        path = self.path
        with Closing(os.open(path.parent, _DIRECTORY)) as parent:
            mark(parent)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path.name, 0o700, dir_fd=parent)
            _check(parent, path.name, stat.S_IFDIR, path)
            return os.open(path.name, _DIRECTORY, dir_fd=parent)

    def is_made(self) -> bool:
        return "fd" in vars(self)

    def names(self) -> Iterator[str]:
        """The names in it; none while the folder can't be created."""
        if self.is_made():
            with os.scandir(self.fd) as items:
                for item in items:
                    yield item.name

    def stat(self, name: str) -> os.stat_result:
        """The status of `name`, without following a symlink. Raises OSError."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def each_status(self) -> Iterator[tuple[str, Status]]:
        """The names in it and their status, read in parts. Leaves out names that vanish meanwhile. Raises
        OSError."""
        names = self.names()
        while some := list(islice(names, STATUS_TOGETHER)):
            for name, status in zip(some, stat_files(self.fd, some), strict=True):
                if status is not None:
                    yield name, status

    def open(self, name: str, flags: int) -> int:
        """Opens a file without following a symlink. Raises OSError."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def close(self) -> None:
        if self.is_made():
            os.close(self.fd)
            del self.fd


def is_our_own(info: os.stat_result | Status) -> bool:
    """Whether it is a regular file of ours with one name, so that writing it changes nothing elsewhere."""
    return stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_uid == os.geteuid()


def report_strays(path: Path, names: Sequence[str]) -> None:
    """Logs names in a folder of ours that are not ours."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        log.warning("%s%s: not made by ipfsfuse, left alone", path / min(names), more)


_KIND_NAMES = {stat.S_IFDIR: "folder", stat.S_IFREG: "regular file", stat.S_IFSOCK: "socket"}


def _check(folder: int, name: str, kind: int, path: Path) -> os.stat_result:
    """The status of `name`. Raises OSError, and StoreFailed unless it has that type and only we may write
    it."""
    info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        raise StoreFailed(f"{path} is a symbolic link: remove it, or give another --cache-dir")
    if stat.S_IFMT(info.st_mode) != kind:
        raise StoreFailed(
            f"{path} is not a {_KIND_NAMES[kind]}: move it elsewhere, or give another --cache-dir"
        )
    if info.st_uid != os.geteuid():
        raise StoreFailed(
            f"{path} belongs to another user: remove it, or give --cache-dir a folder of your own"
        )
    if info.st_mode & 0o022:
        to_do = "700" if stat.S_ISDIR(info.st_mode) else "600"
        raise StoreFailed(f"{path} may be written by others: run chmod {to_do} {path}")
    return info


# -- the lock ------------------------------------------------------------------------------------------------


class CacheFolder:
    """Our folder, locked for this process. Made by `lock_folder`."""

    def __init__(self, path: Path, fd: int, lock: int) -> None:
        self.path = path
        """DIR/ipfsfuse-cache."""
        self._fd, self._lock = fd, lock
        """Descriptors of the folder and of its lock file; -1 if the disk is too full for it."""
        self._announced: tuple[int, str] | None = None

    @property
    def control(self) -> Path:
        return self.path / CONTROL

    @property
    def indexes(self) -> Path:
        return self.path / INDEXES

    def announce(self, pid: int, mountpoint: str) -> None:
        """Writes who uses the folder. A second daemon shows that when it is refused. Raises StoreFailed."""
        self._announced = pid, mountpoint
        self._write(
            DAEMON, json.dumps({"pid": pid, "mountpoint": mountpoint}).encode() + b"\n", lasting=False
        )

    def inode_key(self) -> bytes:
        """The key of the inode numbers, 32 bytes. Makes a new one if it is missing or damaged. Raises
        StoreFailed."""
        with contextlib.suppress(OSError):
            key = read_file(self._fd, INODE_KEY)
            if len(key) == KEY_BYTES:
                return key
            log.warning("%s is damaged: inode numbers are new from now on", self.path / INODE_KEY)
        key = secrets.token_bytes(KEY_BYTES)
        self._write(INODE_KEY, key)
        return key

    def remake(self) -> None:
        """Creates the folder again if it was deleted, so that the control socket is there again. Raises
        StoreFailed."""
        if self._fd >= 0 and os.fstat(self._fd).st_nlink:
            if not self._is_in_place():
                raise StoreFailed(f"{self.path} was moved away: this mount can't be asked until it is back")
            return
        with as_store_failed(f"the cache folder {self.path} can't be made"):
            fd, lock = _open_and_lock(self.path.parent)
        self.release()
        self._fd, self._lock = fd, lock
        if self._announced is not None:
            self.announce(*self._announced)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(DAEMON, dir_fd=self._fd)
            os.close(self._fd)
        if self._lock >= 0:
            os.close(self._lock)
        self._fd = self._lock = -1

    def _write(self, name: str, data: bytes, lasting: bool = True) -> None:
        """Writes a file. A full disk is only logged. Raises StoreFailed."""
        with (
            as_store_failed(f"{self.path / name} can't be written"),
            _full_disk(f"{self.path / name} can't be written"),
        ):
            if self._fd >= 0:
                write_file(self._fd, name, data, lasting)


def is_mount_id(name: str) -> bool:
    """Whether `name` is `<host>-<16 hexadecimal digits>`. No other text becomes part of a path at a node."""
    return _MOUNT_ID.fullmatch(name) is not None


@contextlib.contextmanager
def _full_disk(what: str, numbers: Collection[int] = NO_SPACE) -> Iterator[None]:
    """Logs a full disk instead of raising."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise
        log.warning("%s: %s", what, exc.strerror)


@contextlib.contextmanager
def lock_folder(cache_dir: Path) -> Iterator[CacheFolder]:
    """Locks our folder in `cache_dir`. Creates it if it is missing; migrates an older layout.

    Raises StoreFailed if another process uses the folder (the message names it), and if others may write it.
    On a full disk the folder may be missing: then nothing is cached, and `CacheFolder.remake` creates it when
    there is room."""
    folder = CacheFolder(inside(cache_dir), -1, -1)
    with _full_disk(f"the cache folder {folder.path} can't be made; reads go on without the cache"):
        folder = CacheFolder(folder.path, *_open_and_lock(cache_dir))
    try:
        yield folder
    finally:
        folder.release()


def announced(cache_dir: Path) -> tuple[int, str] | None:
    """(pid, mountpoint) that a daemon announced for the folder, even if it has ended; None if none did."""
    return _announced_in(inside(cache_dir))


def _announced_in(folder: Path) -> tuple[int, str] | None:
    try:
        with Closing(os.open(folder, _DIRECTORY)) as fd:
            announced = json.loads(read_file(fd, DAEMON))
        return int(announced["pid"]), str(announced["mountpoint"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None


def is_free(cache_dir: Path) -> bool:
    """Whether it is certain that no process uses the folder."""
    try:
        with Closing(os.open(inside(cache_dir), _DIRECTORY)) as fd:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(fd, fcntl.LOCK_UN)
            with Closing(os.open(LOCK, _READ, dir_fd=fd)) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:  # it is locked, or can't be checked
        return False
    return True


def indexes(cache_dir: Path) -> Path:
    """The folder for indexes of CAR files, for a command that runs without a mount. Raises StoreFailed."""
    if not inside(cache_dir).exists():
        with lock_folder(cache_dir):
            pass
    return inside(cache_dir) / INDEXES


def examine(cache_dir: Path) -> None:
    """Raises StoreFailed if `lock_folder` would refuse the folder because of its content. Changes nothing."""
    with (
        as_store_failed(f"the cache folder {cache_dir} can't be used"),
        contextlib.suppress(FileNotFoundError),
        Closing(_open_parent(cache_dir)) as parent,
    ):
        try:
            _check(parent, NAME, stat.S_IFDIR, inside(cache_dir))
            with Closing(os.open(NAME, _DIRECTORY, dir_fd=parent)) as fd:
                _check_marker(fd, inside(cache_dir))
                _check_names(fd, inside(cache_dir))
        except FileNotFoundError:
            _is_older_layout(parent, cache_dir)


# -- opening -------------------------------------------------------------------------------------------------


def _open_and_lock(cache_dir: Path) -> tuple[int, int]:
    """Descriptors of our folder and its lock file, both locked. Raises StoreFailed, and OSError only for a
    full disk."""
    path = inside(cache_dir)
    try:
        cache_dir.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            cache_dir.mkdir(mode=0o700)
        with Closing(_open_parent(cache_dir)) as parent:
            fd = _open_locked(partial(_open_folder, parent, cache_dir), parent, NAME, cache_dir)
        try:
            _accept(fd, path)
            lock = -1
            with _full_disk(f"{path / LOCK} can't be made"):
                # it counts on file systems that can't lock folders (NFS), and `is_free` checks it
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                lock = _open_locked(partial(os.open, LOCK, flags, 0o600, dir_fd=fd), fd, LOCK, cache_dir)
            return fd, lock
        except BaseException:
            os.close(fd)
            raise
    except OSError as exc:
        if exc.errno in NO_SPACE:
            raise
        raise StoreFailed(f"the cache folder {path} can't be used: {exc.strerror or exc}") from exc


def _open_parent(cache_dir: Path) -> int:
    """Opens the folder `cache_dir`. It may be root's and contain other things, but no other user may write
    it."""
    try:
        fd = os.open(cache_dir, _DIRECTORY)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR):
            raise StoreFailed(
                f"the cache folder {cache_dir} is not a folder: give another --cache-dir"
            ) from exc
        raise
    try:
        info = os.fstat(fd)
        if info.st_uid not in (0, os.geteuid()):
            raise StoreFailed(
                f"the cache folder {cache_dir} belongs to another user: give --cache-dir a folder of your own"
            )
        if info.st_mode & 0o022:
            raise StoreFailed(
                f"the cache folder {cache_dir} may be written by others: run chmod go-w {cache_dir}"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_folder(parent: int, cache_dir: Path) -> int:
    """Opens our folder in `parent`. Creates or migrates it if it is missing. Raises StoreFailed, OSError."""
    while True:
        try:
            _check(parent, NAME, stat.S_IFDIR, inside(cache_dir))
            return os.open(NAME, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if _exists(parent, MIGRATING) or _is_older_layout(parent, cache_dir):
                return _migrate(parent, cache_dir)
            with contextlib.suppress(FileExistsError):
                os.mkdir(NAME, 0o700, dir_fd=parent)
                os.fsync(parent)


def _open_locked(open_it: Callable[[], int], folder: int, name: str, cache_dir: Path) -> int:
    """Opens `name` in `folder` by `open_it` and locks it. Opens it again if the name was given to something
    else before it was locked."""
    while True:
        fd = open_it()
        try:
            _flock(fd, cache_dir)
            if _is_at(fd, folder, name):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, folder: int, name: str) -> bool:
    """Whether the open file `fd` is the one that `name` leads to."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _flock(fd: int, cache_dir: Path, holder: Path | None = None) -> None:
    """Locks a file or folder. Raises FolderInUse, which names the process that has locked it."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as exc:
            if time.monotonic() > until:
                raise FolderInUse(_in_use(cache_dir, holder or inside(cache_dir))) from exc
        except OSError as exc:
            if exc.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK):
                raise
            return  # NFS can't lock folders: there only the lock file counts
        time.sleep(LOCK_SECONDS / 50)


def _in_use(cache_dir: Path, holder: Path) -> str:
    daemon = _announced_in(holder)
    if daemon is None:
        return f"{cache_dir} is in use by another daemon: give this one its own --cache-dir"
    if not os.path.isabs(daemon[1]):  # `ipfsfuse serve`, which has no mount
        return f"{cache_dir} is in use by process {daemon[0]}, {daemon[1]}: give this one its own --cache-dir"
    holder_is = f"process {daemon[0]}, mounted at {daemon[1]}"
    return f"{cache_dir} is in use by {holder_is}: use that mount, or give this one its own --cache-dir"


def _accept(fd: int, path: Path) -> None:
    """Checks that everything with one of our names in the locked folder is ours, and writes the marker.
    Raises StoreFailed, OSError."""
    _check_marker(fd, path)
    strays = _check_names(fd, path)
    for name in [name for name in strays if _TEMPORARY.fullmatch(name)]:
        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISREG(info.st_mode):
            os.unlink(name, dir_fd=fd)
            strays.remove(name)
    report_strays(path, strays)
    with _full_disk(f"{path / FORMAT} can't be written"):
        mark(fd)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(DAEMON, dir_fd=fd)


def _check_marker(fd: int, path: Path) -> None:
    """Raises StoreFailed if the folder is not marked as ours, or has another layout."""
    try:
        _check(fd, FORMAT, stat.S_IFREG, path / FORMAT)
    except FileNotFoundError:
        others = [
            name for name in os.listdir(fd) if name not in (LOCK, CONTROL) and not _TEMPORARY.fullmatch(name)
        ]
        if others:
            raise StoreFailed(
                f"{path} holds {min(others)} but no marker file {FORMAT}, so it may not be ipfsfuse's: "
                "move it elsewhere, or give another --cache-dir"
            ) from None
        return
    name, _space, number = read_file(fd, FORMAT)[:100].decode("ascii", "replace").strip().rpartition(" ")
    if name != MARKER or not number.isdecimal():
        raise StoreFailed(
            f"{path / FORMAT} is not a marker of ipfsfuse: move {path} elsewhere, or give another --cache-dir"
        )
    if int(number) != LAYOUT:
        raise StoreFailed(
            f"{path} has layout {number}, and ipfsfuse {__version__} knows layout {LAYOUT}: "
            f"use {written_by(fd)}, or give another --cache-dir"
        )


def written_by(fd: int) -> str:
    """The version of ipfsfuse that used the folder last, according to its tag."""
    try:
        found = _TAGGED_BY.search(read_file(fd, CACHEDIR_TAG).decode("ascii", "replace"))
    except OSError:
        found = None
    return f"ipfsfuse {found[1][:40]}" if found else "the ipfsfuse that made it"


def _check_names(fd: int, path: Path) -> list[str]:
    """Returns the names that are not ours. Raises StoreFailed if one of our names has another type or
    owner."""
    strays = []
    for name in os.listdir(fd):
        if name not in _KINDS:
            strays.append(name)
            continue
        with contextlib.suppress(FileNotFoundError):
            info = _check(fd, name, _KINDS[name], path / name)
            if name in WRITTEN_IN_PLACE and not is_our_own(info):
                raise StoreFailed(f"{path / name} is a hard link to a file that has other names: remove it")
    return strays


def mark(fd: int) -> None:
    """Writes the marker if it is missing. Raises OSError."""
    if not _exists(fd, FORMAT):
        write_file(fd, FORMAT, f"{MARKER} {LAYOUT}\n".encode())


def tag(path: Path) -> None:
    """Writes the tag, by which backups leave the folder out, and which names our version. Errors are
    ignored."""
    with contextlib.suppress(OSError), Closing(os.open(path, _DIRECTORY)) as fd:
        if not _exists(fd, CACHEDIR_TAG) or read_file(fd, CACHEDIR_TAG) != TAG_TEXT.encode():
            write_file(fd, CACHEDIR_TAG, TAG_TEXT.encode(), lasting=False)


# -- the layout before the marked folder ---------------------------------------------------------------------

_MOVED = {
    "files": STAGING, "packs": PACKS, "indexes": INDEXES, "pins": PINS,
    INDEX: INDEX, f"{INDEX}-wal": f"{INDEX}-wal", DAMAGED_INDEX: DAMAGED_INDEX,
    "daemon.log": LOG, "daemon.log.1": OLD_LOG, "lock": LOCK,
}  # fmt: skip
"""The names of the older layout, and their names now. `lock` is moved last."""
_DROPPED = ("daemon.json", "daemon.new", "control", f"{INDEX}-shm")
"""Names that only a running daemon needed."""
_INNER = {
    "files": re.compile(r"b[a-z2-7]{10,250}(\.part)?"),
    "packs": re.compile(r"[0-9]{1,18}\.pack"),
    "indexes": re.compile(r"[0-9a-f]+-[0-9a-f]+-[0-9]+-[0-9]+\.(index|[0-9a-f]+\.tmp)|tmp[a-z0-9_]{8}"),
    "pins": re.compile(r"[0-9a-f]{16}"),
}
"""The names in its folders."""


def _is_older_layout(parent: int, cache_dir: Path) -> bool:
    """Whether `cache_dir` has the layout of an older ipfsfuse, which made no subfolder of its own.

    Raises StoreFailed if it has, and also contains other files: these must not be moved."""
    names = set(os.listdir(parent)) - {"lost+found"}  # it stays in the root of a file system
    old = names & {*_MOVED, *_DROPPED}
    if "lock" not in names or (old != names and not old & {"files", "packs", INDEX}):
        return False
    strangers = [*sorted(names - old), *_strangers_in(parent, old)]
    if strangers:
        raise StoreFailed(
            f"{cache_dir} is the cache of an older ipfsfuse, "
            f"and holds {strangers[0]}, which is not part of it: "
            "move that elsewhere, or give another --cache-dir"
        )
    return True


def _strangers_in(parent: int, names: set[str]) -> Iterator[str]:
    for name in sorted(names):
        info = os.stat(name, dir_fd=parent, follow_symlinks=False)
        kind = stat.S_IFDIR if name in _INNER else stat.S_IFSOCK if name == "control" else stat.S_IFREG
        if stat.S_IFMT(info.st_mode) != kind or info.st_uid != os.geteuid():
            yield name
        elif name in _INNER:
            with Closing(os.open(name, _DIRECTORY, dir_fd=parent)) as fd:
                yield from (f"{name}/{each}" for each in os.listdir(fd) if not _INNER[name].fullmatch(each))


def _migrate(parent: int, cache_dir: Path) -> int:
    """Moves everything of the older layout into our folder. Returns the folder's descriptor, locked. Raises
    StoreFailed, OSError.

    Until everything is moved, the folder has another name, so that the next start goes on after a crash."""
    with contextlib.ExitStack() as old:
        with contextlib.suppress(FileNotFoundError):
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            lock = old.enter_context(Closing(os.open("lock", flags, dir_fd=parent)))
            _flock(lock, cache_dir, holder=cache_dir)
        with contextlib.suppress(FileExistsError):
            os.mkdir(MIGRATING, 0o700, dir_fd=parent)
        _check(parent, MIGRATING, stat.S_IFDIR, cache_dir / MIGRATING)
        fd = os.open(MIGRATING, _DIRECTORY, dir_fd=parent)
        try:
            _flock(fd, cache_dir)
            if not _is_at(fd, parent, MIGRATING):
                raise StoreFailed(f"{cache_dir} is being brought up to date by another daemon: try again")
            for before, now in _MOVED.items():
                if _exists(parent, before) and not _exists(fd, now):
                    os.rename(before, now, src_dir_fd=parent, dst_dir_fd=fd)
            for name in _DROPPED:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent)
            _migrate_mount_id(fd)
            mark(fd)
            os.fsync(fd)
            os.rename(MIGRATING, NAME, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        except BaseException:
            os.close(fd)
            raise
    log.info("the cache in %s was moved to %s", cache_dir, inside(cache_dir))
    return fd


def _migrate_mount_id(fd: int) -> None:
    """Keeps the name that the cache had at a Kubo node. If it had one for each of several nodes, the first is
    used."""
    if _exists(fd, MOUNT_ID) or not _exists(fd, PINS):
        return
    with contextlib.suppress(OSError), Closing(os.open(PINS, _DIRECTORY, dir_fd=fd)) as pins:
        for each in sorted(os.listdir(pins)):
            with contextlib.suppress(OSError), Closing(os.open(each, _DIRECTORY, dir_fd=pins)) as node:
                name = read_file(node, "mount").decode("ascii", "replace").strip()
                if is_mount_id(name):
                    write_file(fd, MOUNT_ID, name.encode() + b"\n")
                    return


# -- the folder of an isolated mount -------------------------------------------------------------------------

MAKE_TRIES = 100


@contextlib.contextmanager
def isolated_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent` (by default the temporary folder), to be used as `cache_dir`. Removed at the
    end. Raises StoreFailed."""
    parent = parent or Path(tempfile.gettempdir())
    with contextlib.ExitStack() as opened:
        with as_store_failed(f"no isolated folder can be made in {parent}"):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            temporary = opened.enter_context(Closing(os.open(parent, flags)))
            _sweep(temporary)
            path, fd = _make(parent, temporary)
            opened.enter_context(Closing(fd))
        opened.callback(shutil.rmtree, path.name, ignore_errors=True, dir_fd=temporary)
        yield path


def _prefix() -> str:
    return f"ipfsfuse-isolated-{os.geteuid()}-"


def _make(parent: Path, temporary: int) -> tuple[Path, int]:
    """A new folder, and a descriptor that locks it. Raises OSError."""
    for _ in range(MAKE_TRIES):
        path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(path.name, _DIRECTORY, dir_fd=temporary)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, temporary, path.name):
                    return path, fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    raise OSError(0, f"{MAKE_TRIES} folders were removed as soon as they were made")


def _sweep(temporary: int) -> None:
    """Removes isolated folders of this user that no process has locked. Leaves everything else alone."""
    pattern = re.compile(re.escape(_prefix()) + r"[a-z0-9_]{8}")
    for name in filter(pattern.fullmatch, os.listdir(temporary)):
        with contextlib.suppress(OSError), Closing(os.open(name, _DIRECTORY, dir_fd=temporary)) as fd:
            info = os.fstat(fd)
            if info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) == 0o700:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(fd, temporary, name):
                    shutil.rmtree(name, ignore_errors=True, dir_fd=temporary)
