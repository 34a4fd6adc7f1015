"""The configuration of a mount, and the default folders. The command line makes and checks these frozen
values. This module is quick to import."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipfsfuse.errors import UsageError

if TYPE_CHECKING:
    from ipfsfuse.dag.cid import Cid

GIB = 1 << 30


class User(NamedTuple):
    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentConfig:
    """The configuration of a cache folder and sources: for `serve`, the Python interface and mounts."""

    cache_dir: Path
    library: Path
    sources: Sequence[str] = ("library",)
    """The sources as on the command line, in the order to ask them."""
    offline: bool = False
    """Whether only staged content and sources that are read in place are used."""
    budget: int = 10 * GIB
    """Bytes that the whole cache folder may take on disk, in file-system blocks. Less if the disk has
    less."""
    reserve: int | None = None
    """Bytes of the cache folder's file system that stay free. None means a twentieth of it, at most 2 GiB."""
    deadline: float = 30.0
    """Seconds in which each call is answered."""
    dns: str = "system"
    """The server for DNSLink: `system`, or the URL of a DNS-over-HTTPS server."""
    routers: Sequence[str] = ()
    """URLs of delegated routers, for the providers of the source `network` and for IPNS records."""
    header_files: Sequence[tuple[str, Path]] = ()
    """(URL of a source, file with HTTP headers for it); the URL is "" for the only network source."""
    allow_private_providers: bool = False
    """Whether requests go to providers at loopback and private addresses too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig(ContentConfig):
    mountpoint: Path
    """Absolute, with the symlinks of its parents resolved."""
    allow: "frozenset[Cid] | None" = None
    """Canonical CIDs that are allowed in the root; None for all."""
    record: Path | None = None
    """The file for the CIDs of all blocks used, as JSON lines. With it, nothing is stored into the page
    cache that the kernel did not ask for."""
    allow_other: bool = False
    passthrough: bool = False
    """Whether the kernel itself reads staging files that were verified whole."""
    isolated: bool = False
    """Whether the mount has a new cache folder, which is removed with it."""
    while_held: bool = False
    """Whether the mount ends when the last control connection that holds it is closed."""
    pins: str = "kubo"
    """`kubo`: hold staged content at the Kubo nodes among the sources. `none`: hold nothing."""
    ipns: Path | None = None
    """The mountpoint for names, which are symlinks into the mount. Absolute, like `mountpoint`."""
    uid: int | None = None
    """The owner that is shown for everything; None for the user who mounts."""
    gid: int | None = None
    umask: int = 0
    """Permission bits that are removed from every file."""
    max_fetch: int | None = None
    """The most bytes that are fetched from all sources together; None for no limit."""
    bwlimit: int | None = None
    """The most bytes a second that are fetched from all sources together; None for no limit."""
    user: User | None = None
    """The user that a daemon started by root changes to. The mount belongs to this user."""
    confined: bool = True
    """Whether the daemon gives up new privileges and, with landlock, files that it does not need."""


# -- where folders lie by default ----------------------------------------------------------------------------


def cache_dir(given: str | Path | None) -> Path:
    """The cache folder: `given`, or IPFSFUSE_CACHE_DIR, or ipfsfuse in XDG_CACHE_HOME or ~/.cache."""
    return absolute(
        given or os.environ.get("IPFSFUSE_CACHE_DIR") or xdg("XDG_CACHE_HOME", ".cache") / "ipfsfuse"
    )


def library(given: str | Path | None) -> Path:
    """The library: `given`, or IPFSFUSE_LIBRARY, or ipfsfuse/library in XDG_DATA_HOME or ~/.local/share."""
    return absolute(
        given
        or os.environ.get("IPFSFUSE_LIBRARY")
        or xdg("XDG_DATA_HOME", ".local/share") / "ipfsfuse" / "library"
    )


def xdg(variable: str, fallback: str) -> Path:
    """A base folder of the XDG specification: the value of `variable`, unless that is relative, else
    `fallback` in the home folder."""
    folder = os.environ.get(variable, "")
    if os.path.isabs(folder):
        return Path(folder)
    return home(f"HOME or {variable}") / fallback


def home(variables: str = "HOME") -> Path:
    """The home folder. Raises UsageError if there is none. The message says to set one of `variables`."""
    try:
        return Path.home()
    except RuntimeError as exc:
        raise UsageError(f"there is no home folder to put things in: set {variables}") from exc


def absolute(path: str | Path) -> Path:
    """`path` as an absolute path without symlinks."""
    return Path(os.path.realpath(path))
