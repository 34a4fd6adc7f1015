"""What a guest left in its /out: its CID, and how it gets into a CAR file and into the library.

A guest may leave anything, so one walk reads it for all purposes: `ipfsfuse import` takes a CAR file that was
written by that walk.
"""

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ipfsfuse.dag.builder import Built
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import mounts, places
from ipfsfuse_run.growth import NAME_BYTES
from ipfsfuse_run.options import Options
from ipfsfuse_run.record import RecordWriter


class Results(NamedTuple):
    """Results in a CAR file. `files` are their paths and SHA-256."""

    built: Built
    files: Sequence[tuple[str, str]]


class _Level(NamedTuple):
    """A folder of the results that is being read."""

    path: str
    names: list[str]
    children: list[tuple[str, Built]]


def written(writer: RecordWriter, folder: str, bound: int) -> Results:
    """Puts the results in `folder` into a CAR file, with the CID that `ipfsfuse add --hidden` gives them.

    The guest is gone, and what it left may be anything: no symlink is followed, no device or pipe opened, and
    more than `bound` bytes (each name counts NAME_BYTES) are refused. Another guest may have the same folder
    and put symlinks into it meanwhile: what lies elsewhere is refused. Raises StoreFailed."""
    left = bound
    files: list[tuple[str, str]] = []
    top = os.path.realpath(folder)
    stack = [_Level("", _names(top), [])]
    while True:
        level = stack[-1]
        if not level.names:
            stack.pop()
            built = writer.add_folder(level.children)
            if not stack:
                return Results(built, sorted(files))
            stack[-1].children.append((os.path.basename(level.path), built))
            continue
        name = level.names.pop()
        inside = os.path.join(level.path, name)
        path = os.path.join(top, inside)
        try:
            with _place(path) as (fd, opened):
                found = os.fstat(fd)
                left -= NAME_BYTES + (found.st_size if stat.S_ISREG(found.st_mode) else 0)
                if left < 0:
                    raise StoreFailed(f"the results in {folder} are more than max-out={bound} bytes")
                inside.encode()
                if stat.S_ISDIR(found.st_mode):
                    stack.append(_Level(inside, _names(opened), []))
                elif stat.S_ISLNK(found.st_mode):
                    level.children.append((name, writer.add_symlink(os.readlink("", dir_fd=fd))))
                elif stat.S_ISREG(found.st_mode):
                    with open(os.open(opened, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                        hashed = _Hashed(file, found.st_size)
                        level.children.append((name, writer.add_file(hashed)))
                    files.append((inside, hashed.sha256.hexdigest()))
                else:
                    raise StoreFailed(
                        f"{path!r} in the results is neither file, folder nor symlink: it can't be taken"
                    )
        except UnicodeEncodeError as exc:
            raise StoreFailed(f"{inside!r} in the results has a name that is not UTF-8") from exc
        except OSError as exc:
            raise StoreFailed(f"{inside!r} in the results can't be read: {exc.strerror}") from exc


@contextlib.contextmanager
def _place(path: str) -> Iterator[tuple[int, str]]:
    """What lies at `path` itself, with no symlink on the way: a descriptor that only names it, and a path by
    which it can be opened. Raises OSError, StoreFailed."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        opened = f"/proc/self/fd/{fd}"
        if os.readlink(opened) != path:
            raise StoreFailed(f"{path!r} in the results was moved or replaced while it was taken")
        yield fd, opened
    finally:
        os.close(fd)


def _names(folder: str) -> list[str]:
    return sorted(os.listdir(folder), reverse=True)


class _Hashed:
    """A file that is hashed as it is read, and of which no more than `size` bytes are."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self.sha256 = file, size, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        self.sha256.update(data)
        return data


def cid_of(folder: str, bound: int) -> Cid:
    """The CID of the results in `folder`. Raises StoreFailed."""
    with open(os.devnull, "wb") as nowhere:
        return written(RecordWriter(nowhere), folder, bound).built.cid


def add(options: Options, folder: str) -> Cid:
    """Takes the results into the library, and gives their CID. Raises StoreFailed."""
    scratch = places.scratch_folder("add", os.getpid())
    try:
        car = Path(scratch, "results.car")
        with car.open("w+b") as out:
            writer = RecordWriter(out)
            built = written(writer, folder, options.limits.out_bytes).built
            writer.close(built)
        library = [each for each in options.mount_options if each.startswith("--library=")]
        command = [sys.executable, "-P", "-m", "ipfsfuse", "import", *library, str(car)]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=mounts.child_environment(),
            check=False,
        )
        if done.returncode != 0:
            reason = f"\n{done.stderr.strip()}".rpartition("\nipfsfuse: ")[2]
            raise StoreFailed(f"the results can't be taken into the library: {reason}")
        return built.cid
    except OSError as exc:
        raise StoreFailed(f"the results can't be taken into the library: {exc.strerror}") from exc
    finally:
        places.remove_tree(scratch)
