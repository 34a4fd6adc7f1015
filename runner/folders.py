"""The runner's own folder in the user's cache: made 0700, and used only while it is ours alone."""

import os
import stat
from pathlib import Path

from ipfsfuse.errors import StoreFailed


def cache_home() -> str:
    """The user's cache folder. A relative XDG_CACHE_HOME is ignored, as the XDG specification has it, and as the mount does."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), ".cache")


def private(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/ipfsfuse-run/parts...`, made where missing. Raises StoreFailed if it can't be, or is not ours alone."""
    path = Path(cache_home(), "ipfsfuse-run")
    if not path.is_absolute():
        raise StoreFailed("there is no home folder to put things in: set HOME or XDG_CACHE_HOME")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in ("", *parts):
            path = path / part
            path.mkdir(mode=0o700, exist_ok=True)
            check(os.lstat(path), path)
    except OSError as exc:
        raise StoreFailed(f"the folder {path} can't be used: {exc.strerror}") from exc
    return path


def check(found: os.stat_result, path: Path) -> None:
    """Raises StoreFailed if others own or may write what `found` describes."""
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise StoreFailed(f"the folder {path} must be yours alone (mode 0700): remove it, or set XDG_CACHE_HOME")
