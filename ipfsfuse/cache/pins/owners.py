"""Whose pins at a node these are, and whether their owner is proved dead.

A mount leaves a record beside its pins: machine, boot, process, and when it was signed. A process is dead if its machine
has no such process, or one of that number which began at another time. Another boot alone proves nothing: copies of one
machine, or containers of one image on several hosts, share what names a machine; but a day without a new signature does.
Another machine, another name space of processes, and anything that can't be seen prove nothing.

Pure but for /proc and /etc/machine-id. Concurrency: calls read a few small files and may be made anywhere.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

MOUNT_FILE = "mount"
"""In the pins' folder: the name of its directory at the node."""
BOOT = "/proc/sys/kernel/random/boot_id"
RENEW = 3600.0
"""Seconds after which a living mount signs its record anew."""
SILENT = 24 * RENEW
"""Seconds of silence after which an owner of another boot counts as dead."""


@dataclass(frozen=True, slots=True)
class Owner:
    machine: str
    boot: str
    processes: str
    """The name space of process numbers."""
    pid: int
    started: int
    """Clock ticks after the boot (proc(5), stat, field 22)."""
    folder: str
    """Where the mount keeps its side of the pins."""
    stopped: bool = False
    """It ended as it should, and what it holds awaits its next start."""
    signed: int = 0
    """When it said so last, in seconds since 1970: at least every `RENEW` while it lives."""

    @classmethod
    def this_process(cls, folder: Path) -> Self:
        pid = os.getpid()
        started = int((_fields(pid) or ["0"] * 20)[19])
        boot = _read(BOOT)
        return cls(_machine(), boot, _processes(), pid, started, str(folder.absolute()), signed=int(time.time()))

    @classmethod
    def parse(cls, data: bytes | None) -> Self | None:
        """What `encode` wrote; None for anything else, of an owner about whom nothing is known: others may write there."""
        try:
            owner = cls(**json.loads(data or b""))
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = {"pid": int, "started": int, "stopped": bool, "signed": int}
        right = all(type(value) is kinds.get(name, str) for name, value in asdict(owner).items())
        return owner if right and 0 < owner.pid < 1 << 31 else None

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def now(self) -> Self:
        """The same owner, alive."""
        return replace(self, signed=int(time.time()))

    def at_rest(self) -> Self:
        return replace(self.now(), stopped=True)

    def proved_dead(self) -> bool:
        if self.machine != _machine():
            return False
        if self.boot != _read(BOOT):  # an earlier boot, or a copy of this machine that runs beside it
            return time.time() - self.signed > SILENT
        if self.processes != _processes():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is another user's
            pass
        fields = _fields(self.pid)
        return bool(fields) and (fields[0] in "ZX" or int(fields[19]) != self.started)  # a zombie has ended, but for its parent

    def still_keeps(self, name: str) -> bool:
        """Whether the owner's folder is there and speaks of `name`; True where we may not look."""
        try:
            return (Path(self.folder) / MOUNT_FILE).read_text().strip() == name
        except PermissionError:
            return True
        except (OSError, ValueError):
            return False


def host_name() -> str:
    """This host's name, in characters that a path takes as they are."""
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-.") else "-" for letter in socket.gethostname())
    return name[:64].strip(".") or "host"


def _machine() -> str:
    return _read("/etc/machine-id") or socket.gethostname()


def _processes() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _fields(pid: int) -> list[str]:
    """What /proc/PID/stat tells, from the state on; nothing where there is no such process, or we may not see it."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields if len(fields) > 19 else []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
