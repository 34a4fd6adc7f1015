"""Where the cache folder and the library lie unless it is said. Imports nothing that takes long."""

import os
from pathlib import Path

from ipfsfuse.errors import UsageError


def cache_dir(given: str | None) -> Path:
    """The cache folder: as given, IPFSFUSE_CACHE_DIR, else ipfsfuse in XDG_CACHE_HOME or ~/.cache."""
    return absolute(
        given or os.environ.get("IPFSFUSE_CACHE_DIR") or xdg("XDG_CACHE_HOME", ".cache") / "ipfsfuse"
    )


def library(given: str | None) -> Path:
    """The library: as given, IPFSFUSE_LIBRARY, else ipfsfuse/library in XDG_DATA_HOME or ~/.local/share."""
    return absolute(
        given
        or os.environ.get("IPFSFUSE_LIBRARY")
        or xdg("XDG_DATA_HOME", ".local/share") / "ipfsfuse" / "library"
    )


def xdg(variable: str, fallback: str) -> Path:
    folder = os.environ.get(variable, "")
    if os.path.isabs(folder):  # the XDG specification: a relative path is to be ignored
        return Path(folder)
    try:
        return Path.home() / fallback
    except RuntimeError as exc:
        raise UsageError(f"there is no home folder to put things in: set HOME or {variable}") from exc


def absolute(path: str | Path) -> Path:
    """Symlinks resolved."""
    return Path(os.path.realpath(path))
