"""A cache folder for one mount's life: a folder of a random name in the temporary folder, gone afterwards.

What a `kill -9` left is removed by the next start: the folders of this user that no living process has
locked. A folder is locked right after it was made, and looked at again once it is locked: one that was
removed in between is made anew.

Concurrency: blocks; call it at the start.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ipfsfuse.cache.store.folder import as_store_failed

TRIES = 100
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def isolated_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder below `parent` (by default the temporary folder), for `folder.locked`. Raises
    StoreFailed."""
    parent = parent or Path(tempfile.gettempdir())
    with as_store_failed(f"no isolated folder can be made in {parent}"):
        temporary = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _sweep(temporary)
            path, fd = _make(parent, temporary)
        except BaseException:
            os.close(temporary)
            raise
    try:
        yield path
    finally:
        shutil.rmtree(path.name, ignore_errors=True, dir_fd=temporary)
        os.close(fd)
        os.close(temporary)


def _prefix() -> str:
    return f"ipfsfuse-isolated-{os.geteuid()}-"


def _make(parent: Path, temporary: int) -> tuple[Path, int]:
    """A new folder, and the descriptor that keeps it locked. Raises OSError."""
    for _ in range(TRIES):
        path = Path(tempfile.mkdtemp(prefix=_prefix(), dir=parent))
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            fd = os.open(path.name, _DIRECTORY, dir_fd=temporary)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(
                    os.fstat(fd), os.stat(path.name, dir_fd=temporary, follow_symlinks=False)
                ):
                    return path, fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    raise OSError(0, f"{TRIES} folders were removed as soon as they were made")


def _sweep(temporary: int) -> None:
    """Removes the folders of this user that nobody has locked. What is not exactly such a folder is left
    alone."""
    pattern = re.compile(re.escape(_prefix()) + r"[a-z0-9_]{8}")
    for name in os.listdir(temporary):
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError):
                fd = os.open(name, _DIRECTORY, dir_fd=temporary)
                try:
                    info = os.fstat(fd)
                    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) != 0o700:
                        continue
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(info, os.stat(name, dir_fd=temporary, follow_symlinks=False)):
                        shutil.rmtree(name, ignore_errors=True, dir_fd=temporary)
                finally:
                    os.close(fd)
