"""The runner's own folder in the user's cache: made 0700, and used only while it is ours alone."""

import os
import stat
from pathlib import Path

from ipfsfuse.errors import StoreFailed

_CLOSED = 2
"""Levels that others may not enter: the folder itself, and what lies in it."""


def cache_home() -> str:
    """The user's cache folder. A relative XDG_CACHE_HOME is ignored, as the XDG specification has it, and as
    the mount does."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), ".cache")


def private(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/ipfsfuse-run/parts...`, made where missing.

    Raises StoreFailed where a folder on the way can't be made, is a symlink, or is not ours alone."""
    path = Path(cache_home(), "ipfsfuse-run")
    if not path.is_absolute():
        raise StoreFailed("there is no home folder to put things in: set HOME or XDG_CACHE_HOME")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for depth, part in enumerate(("", *parts)):
            path = path / part
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                pass  # whatever it is: checked next, without following a symlink
            # an earlier version made what lies deeper with mode 0755: nobody else can reach it
            check(os.lstat(path), path, 0o077 if depth < _CLOSED else 0o022)
    except OSError as exc:
        raise StoreFailed(f"the folder {path} can't be used: {exc.strerror}") from exc
    return path


def check(found: os.stat_result, path: Path, closed: int) -> None:
    """Raises StoreFailed if what `found` describes is not a folder, if others own it, or if it has any of the
    modes `closed`."""
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.geteuid()
        or stat.S_IMODE(found.st_mode) & closed
    ):
        raise StoreFailed(
            f"{path} must be a folder of yours alone (mode 0700): remove it, or set XDG_CACHE_HOME to "
            "another folder"
        )
