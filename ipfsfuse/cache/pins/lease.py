"""The name of a cache folder at Kubo nodes, and the lease that says which mount a folder of pins belongs to.

Each cache folder has a unique name, its mount-id. The folder of that name at a node records what is pinned
there. It contains a lease: the cache folder, its machine, and the time of the last renewal. The pins are
stale if the cache folder no longer exists or has another mount-id. Only a process that sees the same files
can check that: on the same machine, in the same boot and mount namespace. Other processes of that machine
must also wait for a day without a renewal, because copies of a machine, and containers of one image, have the
same machine-id.

Concurrency: calls block for a few system calls, and may be made in any thread.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import socket
import stat
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.fileio.files import Closing, read_file, write_file

log = logging.getLogger(__name__)

BOOT = "/proc/sys/kernel/random/boot_id"
RENEW = 3600.0
"""Seconds after which a running mount renews its lease."""
SILENT = 24 * RENEW
"""Seconds without a renewal after which a mount that can't be seen from here counts as ended."""
LEASE_VERSION = 1
MAX_PATH = 4096
MAX_TIME = 1 << 63
"""Seconds since 1970, beyond any clock's time."""


class MountId:
    """The name of a cache folder at nodes. It is stored in the folder's file `mount-id`. Made by `open`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self._changing = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Reads the name of `folder`. If it has none, or an invalid one, makes a new one.

        In earlier versions a folder had a name for each node, in `pins/<hash of the node>/mount`. The first
        of these names is used on. The pins under the others are released later, like those of a cache folder
        that no longer exists."""
        path = folder / cache_folder.MOUNT_ID
        name = _read_name(path)
        if name is None:
            if os.path.lexists(path):
                log.warning("%s does not hold the name of a mount: it is replaced", path)
            old_names = _old_names(folder)
            for old in [old for old, old_name in old_names.items() if old_name is None]:
                log.warning("%s does not hold the name of a mount: it is not used", old / "mount")
            name = next(filter(None, old_names.values()), None) or _new_name()
            _write_name(path, name)
        if _read_name(path) == name:
            _remove_old_names(folder)
        return cls(folder, name)

    def change(self, old: str) -> None:
        """Makes a new name if the name is still `old`, which another mount uses."""
        with self._changing:
            if self.name == old:
                self.name = _new_name()
                _write_name(self.folder / cache_folder.MOUNT_ID, self.name)


@dataclass(frozen=True, slots=True)
class Lease:
    """The content of the file `lease` at a node: JSON with these keys."""

    version: int
    machine: str
    """A hash of the machine-id, which itself is secret."""
    boot: str
    namespace: str
    """The mount namespace; "" if it is not known."""
    folder: str
    """The path of the cache folder in that namespace."""
    inode: str
    """Device and inode number of the cache folder, which are unique in this boot."""
    renewed: int
    """The time of the last renewal, in seconds since 1970. A running mount renews it every `RENEW`
    seconds."""
    resting: bool = False
    """Whether the mount has ended normally. Its pins are kept for its next start."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The lease of this process, which has locked the cache folder `folder`."""
        inode = ""
        with suppress(OSError):
            info = folder.stat()
            inode = f"{info.st_dev}:{info.st_ino}"
        path = str(folder.absolute())
        machine = _hash(_read("/etc/machine-id") or socket.gethostname())
        return cls(LEASE_VERSION, machine, _read(BOOT), _namespace(), path, inode, int(time.time()))

    @classmethod
    def parse(cls, data: bytes | None) -> Self | None:
        """Parses what `encode` of this or a later version wrote; None for anything else.

        Earlier versions wrote a file `owner`. It named a folder inside the cache folder, one for each node,
        and no namespace."""
        try:
            found = json.loads(data or b"")
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict):
            return None
        if "signed" in found:
            renamed = {"renewed": found["signed"], "resting": found.get("stopped")}
            found |= {"version": 0, "namespace": "", "inode": "", **renamed}
        values: dict[str, Any] = {field.name: found.get(field.name) for field in fields(cls)}
        if any(type(value) is not _KINDS.get(name, str) for name, value in values.items()):
            return None
        lease = cls(**values)
        if lease.version < 0 or not 0 <= lease.renewed < MAX_TIME or not _is_path(lease.folder):
            return None
        if lease.version == 0:
            lease = replace(lease, machine=_hash(lease.machine), folder=str(Path(lease.folder).parent.parent))
        return lease

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def renew(self, *, resting: bool = False) -> Self:
        return replace(self, renewed=int(time.time()), resting=resting)

    def may_be_claimed(self, by: "Lease", name: str) -> bool:
        """Whether the process with the lease `by`, whose cache folder has this name, may use the folder at
        the node.

        False if this lease may belong to another running mount: one with a copy of the cache folder, or with
        the original of it."""
        if self._same_boot(by):
            if self.inode and self.inode == by.inode:
                return True  # it is the same cache folder, which that process has locked
            if self.version == 0 and self.folder in (by.folder, str(Path(by.folder).parent)):
                return True  # it is the same cache folder before its migration
            if self.namespace and self.namespace == by.namespace:
                return self.folder == by.folder or not _has_name(Path(self.folder), name)  # moved, not copied
        return self.resting or self.is_silent()

    def is_stale(self, by: "Lease", name: str) -> bool:
        """Whether the pins under this lease are no longer needed, as far as the process with the lease `by`
        can see.

        `name` is the folder's name at the node. The process itself has another name."""
        if self.machine != by.machine:
            return False
        if self.folder != by.folder and _has_name(Path(self.folder), name):
            return False
        seen = self._same_boot(by) and self.namespace != "" and self.namespace == by.namespace
        return seen or self.is_silent()

    def is_silent(self) -> bool:
        """Whether the last renewal is so old that the mount must have ended. A time far in the future comes
        from a wrong clock, and counts the same."""
        return abs(time.time() - self.renewed) > SILENT

    def _same_boot(self, other: "Lease") -> bool:
        return self.machine == other.machine and self.boot != "" and self.boot == other.boot


_KINDS: dict[str, type] = {"version": int, "renewed": int, "resting": bool}


def host_name() -> str:
    """This host's name, with only characters that are safe in a path."""
    return re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())[:64].strip(".") or "host"


def _new_name() -> str:
    return f"{host_name()}-{secrets.token_hex(8)}"


def _has_name(folder: Path, name: str) -> bool:
    """Whether the cache folder has the mount-id `name`. True if we may not look, and if a running mount's
    folder has lost its mount-id."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        if name in (_read_name(folder / cache_folder.MOUNT_ID), *_old_names(folder).values()):
            return True
        # in an older layout the cache folder is the --cache-dir itself
        return not cache_folder.is_free(folder.parent if folder.name == cache_folder.NAME else folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _read_name(path: Path) -> str | None:
    """The name in a file; None if there is none. Follows no symlink."""
    text = (read_file(str(path), 100) or b"").decode("ascii", "replace").removesuffix("\n")
    return text if cache_folder.is_mount_id(text) else None


def _write_name(path: Path, name: str) -> None:
    """Stores the name. If that fails, the next start makes another name and writes its pins again."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with Closing(os.open(path.parent, flags)) as folder:
            write_file(folder, path.name, f"{name}\n".encode())
    except OSError as exc:
        message = "%s can't be written, so that pins at nodes begin anew at the next start: %s"
        log.warning(message, path, exc.strerror or exc)


# -- what earlier versions left ------------------------------------------------------------------------------

_OLD_FILES = ("mount", "mount.new", "pins.sqlite", "pins.sqlite-wal", "pins.sqlite-shm", "pins.damaged")


def _old_names(folder: Path) -> dict[Path, str | None]:
    """The real folders among `pins/<hash of a node>`, and the name in the file `mount` of each."""
    pins = folder / "pins"
    try:
        entries = [] if pins.is_symlink() else sorted(os.scandir(pins), key=lambda entry: entry.name)
        found = [pins / entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return {}
    return {old: _read_name(old / "mount") for old in found if re.fullmatch("[0-9a-f]{16}", old.name)}


def _remove_old_names(folder: Path) -> None:
    """Removes the files for pins of earlier versions, and nothing else."""
    for old in _old_names(folder):
        with suppress(OSError):
            for name in _OLD_FILES:
                (old / name).unlink(missing_ok=True)
            old.rmdir()
    with suppress(OSError):
        (folder / "pins").rmdir()


# -- this process --------------------------------------------------------------------------------------------


def _hash(machine: str) -> str:
    return hashlib.sha256(b"ipfsfuse " + machine.encode(errors="replace")).hexdigest()[:32]


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/mnt")
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _is_path(text: str) -> bool:
    try:
        return len(os.fsencode(text)) <= MAX_PATH and os.path.isabs(text) and "\0" not in text
    except UnicodeEncodeError:
        return False
