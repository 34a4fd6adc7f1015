"""What a mount is asked to be, and where its folders lie by default. The command line parses it once into
frozen values, which are not checked again. Imports nothing that takes long."""

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
    """A cache folder and sources: for `serve`, the Python interface, and each mount."""

    cache_dir: Path
    library: Path
    sources: Sequence[str] = ("library",)
    """SOURCE texts in the order to ask."""
    offline: bool = False
    """Only what is staged and the sources that are read in place."""
    budget: int = 10 * GIB
    """Bytes that all of the cache folder may take on disk, in file-system blocks; less where the disk has
    less."""
    reserve: int | None = None
    """Bytes of the cache folder's file system that stay free: 0 for none, None for a twentieth of it, at most
    2 GiB."""
    deadline: float = 30.0
    """Seconds from its begin in which each call is answered."""
    dns: str = "system"
    """Whom DNSLink is asked of: `system`, or the URL of a DNS-over-HTTPS server."""
    routers: Sequence[str] = ()
    """URLs of delegated routers: asked by the source `network` for providers, and for IPNS records."""
    header_files: Sequence[tuple[str, Path]] = ()
    """(URL of a source, the file of HTTP headers for it); "" for the only network source."""
    allow_private_providers: bool = False
    """Whether providers at loopback and private addresses are asked too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig(ContentConfig):
    mountpoint: Path
    """Absolute, symlinks in its parents resolved."""
    allow: "frozenset[Cid] | None" = None
    """Canonical CIDs that may be named in the root; None for all."""
    record: Path | None = None
    """Where the CIDs of every block used are written, as JSON lines; such a mount pushes nothing into the
    page cache."""
    allow_other: bool = False
    passthrough: bool = False
    """Whether the kernel reads staging files that were verified whole itself."""
    isolated: bool = False
    """A cache folder of its own, made for this mount and gone with it."""
    while_held: bool = False
    """End when the last control connection that holds the mount is gone."""
    pins: str = "kubo"
    """`kubo`: hold what is staged at the Kubo nodes among the sources; `none`."""
    ipns: Path | None = None
    """Where names are shown as symlinks into the mount. Absolute, as `mountpoint`."""
    uid: int | None = None
    """The owner that everything is shown with; None for the user who mounts."""
    gid: int | None = None
    umask: int = 0
    """Permission bits that are taken from every file."""
    max_fetch: int | None = None
    """Bytes that may be fetched, of all sources together; None for any number."""
    bwlimit: int | None = None
    """Bytes a second that are fetched, of all sources together."""
    user: User | None = None
    """Whose rights the daemon keeps once it is started by root, and whose mount it is."""
    confined: bool = True
    """Whether the daemon gives up new privileges, and by landlock the files that it does not need."""


# -- where folders lie by default ----------------------------------------------------------------------------


def cache_dir(given: str | Path | None) -> Path:
    """The cache folder: as given, IPFSFUSE_CACHE_DIR, else ipfsfuse in XDG_CACHE_HOME or ~/.cache."""
    return absolute(
        given or os.environ.get("IPFSFUSE_CACHE_DIR") or xdg("XDG_CACHE_HOME", ".cache") / "ipfsfuse"
    )


def library(given: str | Path | None) -> Path:
    """The library: as given, IPFSFUSE_LIBRARY, else ipfsfuse/library in XDG_DATA_HOME or ~/.local/share."""
    return absolute(
        given
        or os.environ.get("IPFSFUSE_LIBRARY")
        or xdg("XDG_DATA_HOME", ".local/share") / "ipfsfuse" / "library"
    )


def xdg(variable: str, fallback: str) -> Path:
    """A base folder of the XDG specification, which says that a relative path is to be ignored. `fallback`
    lies in the home folder."""
    folder = os.environ.get(variable, "")
    if os.path.isabs(folder):
        return Path(folder)
    return home(f"HOME or {variable}") / fallback


def home(variables: str = "HOME") -> Path:
    """The home folder. Raises UsageError where there is none, and says to set one of `variables`."""
    try:
        return Path.home()
    except RuntimeError as exc:
        raise UsageError(f"there is no home folder to put things in: set {variables}") from exc


def absolute(path: str | Path) -> Path:
    """Symlinks resolved."""
    return Path(os.path.realpath(path))
