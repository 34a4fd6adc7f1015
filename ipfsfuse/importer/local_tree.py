"""Walks the local files and folders that are to be added. It follows no symlink, and any depth works.

Blocking; each walk is for one thread. Every name is opened relative to its parent's descriptor. So paths of
any length work, and a directory that is moved meanwhile can't lead to another place.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from ipfsfuse.errors import AddFailed

_MAX_OPEN = 128
"""Directories held open at once. Those above them are opened again by `..`."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


class Enter(NamedTuple):
    """A directory. Its entries follow, sorted by name, and then its Leave."""

    path: str
    name: bytes
    status: os.stat_result


class Leave(NamedTuple):
    """The end of the directory that was entered last."""


class Regular(NamedTuple):
    path: str
    name: bytes
    fd: int
    """Open until the walk continues; -1 in a walk without contents."""
    status: os.stat_result


class Symlink(NamedTuple):
    path: str
    name: bytes
    target: bytes
    status: os.stat_result


Event = Enter | Leave | Regular | Symlink


@dataclass(slots=True)
class _Open:
    """A directory that is being walked."""

    fd: int
    """-1 while it is closed."""
    path: str
    identity: tuple[int, int]
    names: Iterator[str]


@contextmanager
def naming(path: str) -> Iterator[None]:
    """The operating system's errors as AddFailed that names the path."""
    try:
        yield
    except OSError as exc:
        raise AddFailed(f"{path}: {exc.strerror}") from exc


@dataclass(frozen=True, slots=True)
class Walk:
    """How to walk."""

    hidden: bool
    """Also take names below the top that begin with a dot."""
    contents: bool = True
    """Open the files."""


def walk(path: str, name: str, how: Walk) -> Iterator[Event]:
    """All of `path`, called `name`. Raises AddFailed."""
    stack: list[_Open] = []
    try:
        yield from _visit(path, path, name, None, how, stack)
        while stack:
            child = next(stack[-1].names, None)
            if child is None:
                _pop(stack)
                yield Leave()
            else:
                yield from _visit(os.path.join(stack[-1].path, child), child, child, stack[-1].fd, how, stack)
    finally:
        for opened in stack:
            if opened.fd >= 0:
                os.close(opened.fd)


def _visit(
    path: str, at: str, name: str, parent: int | None, how: Walk, stack: list[_Open]
) -> Iterator[Event]:
    """The event of one name, `at` below the descriptor `parent`. A directory is pushed onto the stack."""
    encoded = _encoded(path, name)
    with naming(path):
        status = os.stat(at, dir_fd=parent, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        with naming(path):
            target = os.readlink(os.fsencode(at), dir_fd=parent)
        yield Symlink(path, encoded, target, status)
    elif kind == stat.S_IFDIR:
        opened = _open_directory(path, at, parent, how.hidden)
        stack.append(opened)
        if len(stack) > _MAX_OPEN:
            _close_for_now(stack[-_MAX_OPEN - 1])
        yield Enter(path, encoded, status)
    elif kind == stat.S_IFREG and not how.contents:
        yield Regular(path, encoded, -1, status)
    elif kind == stat.S_IFREG:
        with naming(path):
            fd = os.open(at, _FLAGS | os.O_NONBLOCK, dir_fd=parent)
        try:
            yield Regular(path, encoded, fd, _checked(path, os.fstat(fd)))
        finally:
            os.close(fd)
    else:
        raise _refusal(path, status)


def _encoded(path: str, name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as exc:
        raise AddFailed(f"{os.fsencode(path)!r}: the name is not UTF-8: rename it") from exc


def _checked(path: str, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, status)
    return status


def _refusal(path: str, status: os.stat_result) -> AddFailed:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    return AddFailed(f"{path} is {kind}: only files, directories and symlinks can be added")


def _open_directory(path: str, at: str, parent: int | None, hidden: bool) -> _Open:
    with naming(path):
        fd = os.open(at, _FLAGS | os.O_DIRECTORY, dir_fd=parent)
        try:
            names = sorted(
                (name for name in os.listdir(fd) if hidden or not name.startswith(".")), key=os.fsencode
            )
            status = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
    return _Open(fd, path, (status.st_dev, status.st_ino), iter(names))


def _close_for_now(opened: _Open) -> None:
    os.close(opened.fd)
    opened.fd = -1


def _pop(stack: list[_Open]) -> None:
    """Ends the directory on top of the stack, and makes sure that its parent is open."""
    done = stack.pop()
    try:
        if stack and stack[-1].fd < 0:
            _open_again(stack[-1], done.fd)
    finally:
        os.close(done.fd)


def _open_again(parent: _Open, child: int) -> None:
    with naming(parent.path):
        parent.fd = os.open("..", _FLAGS | os.O_DIRECTORY, dir_fd=child)
        status = os.fstat(parent.fd)
    if (status.st_dev, status.st_ino) != parent.identity:
        raise AddFailed(f"{parent.path} was moved while it was added")
