"""Where things lie: the cache folder, the library, the mountpoint, the control socket."""

import os
from pathlib import Path

from ipfsfuse import errors
from ipfsfuse.cache.store import folder as cache_folder


def cache_dir(given: str | None) -> Path:
    """The cache folder: as given, IPFSFUSE_CACHE_DIR, else ipfsfuse in XDG_CACHE_HOME or ~/.cache."""
    return _absolute(given or os.environ.get("IPFSFUSE_CACHE_DIR") or _xdg("XDG_CACHE_HOME", ".cache") / "ipfsfuse")


def library(given: str | None) -> Path:
    """The library: as given, IPFSFUSE_LIBRARY, else ipfsfuse/library in XDG_DATA_HOME or ~/.local/share."""
    return _absolute(given or os.environ.get("IPFSFUSE_LIBRARY") or _xdg("XDG_DATA_HOME", ".local/share") / "ipfsfuse" / "library")


def _xdg(variable: str, fallback: str) -> Path:
    folder = os.environ.get(variable, "")
    if os.path.isabs(folder):  # the XDG specification: a relative path is to be ignored
        return Path(folder)
    try:
        return Path.home() / fallback
    except RuntimeError as exc:
        raise errors.UsageError(f"there is no home folder to put things in: set HOME or {variable}") from exc


def _absolute(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def mountpoint(given: str) -> Path:
    """Absolute, symlinks resolved. Asks nothing of the mount itself but its type."""
    return _absolute(given)


def control(given_cache_dir: str | None, mounted_at: str | None) -> Path:
    """The control socket of the mount that the arguments mean. Raises DaemonFailed where `mounted_at` is another."""
    folder = cache_dir(given_cache_dir)
    if mounted_at is not None:
        point, holder = mountpoint(mounted_at), cache_folder.announced(folder)
        if holder is None or Path(holder[1]) != point:
            raise errors.DaemonFailed(f"the mount of {folder} is not at {point}: name its cache folder with --cache-dir")
    return cache_folder.socket_path(folder)
