"""Files that do not depend on the index: one for each pin, and the newest IPNS record of each name.

    pinned/<CID>    {"cid": ..., "bytes": ..., "files": [CIDs of staging files], "packs": [numbers], "pinned":
    ISO time, "crc32": of the rest}
    names/<name>    the encoded record

Concurrency: calls block until the disk is synced, so make them in a thread, except at the start. One process
uses the folder.
"""

import contextlib
import json
import logging
import os
import re
import sqlite3
import stat
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from ipfsfuse.cache.budget import Key
from ipfsfuse.cache.store.folder import (
    NAMES,
    Subfolder,
    as_store_failed,
    is_our_own,
    read_file,
    remove_file,
    report_strays,
)
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, StoreFailed
from ipfsfuse.fileio.files import write_file

log = logging.getLogger(__name__)

# -- pins ----------------------------------------------------------------------------------------------------

MAX_PINS_FILE = 1 << 30
"""Bytes of one file, enough for about ten million staging files."""
MAX_SIZE = 1 << 63
"""Bytes, more than any disk has."""


@dataclass(frozen=True, slots=True)
class PinRecord:
    size: int
    """Bytes on disk when it was pinned."""
    keys: frozenset[Key] | None
    """The staging files and packs that it pins; None if they are not known."""


class PinRecords:
    """The user's pins. A pin's file is written when the pin is complete, and is synced to disk before success
    is reported. If its content is damaged, its name still says what is pinned: the staging files and packs
    are then found by walking the DAG (`cache.pinned`)."""

    def __init__(self, path: Path) -> None:
        """Raises StoreFailed, OSError."""
        self.folder = Subfolder(path)
        self._unsaved: dict[Cid, PinRecord] = {}

    def load(self) -> dict[Cid, PinRecord]:
        """All pins, by their canonical CIDs. Raises OSError."""
        found = dict(self._unsaved)
        strays = []
        for name in self.folder.names():
            cid, info = _cid(name), self.folder.stat(name)
            if cid is None or stat.S_ISDIR(info.st_mode):
                if not name.startswith(".") or not name.endswith(".tmp"):
                    strays.append(name)
                elif is_our_own(info):  # the daemon was killed while it wrote the file
                    self.folder.unlink(name)
            else:
                found[cid] = self._read(name)
        report_strays(self.folder.path, strays)
        return found

    def _read(self, name: str) -> PinRecord:
        try:
            values = json.loads(read_file(self.folder.fd, name, MAX_PINS_FILE))
            check = values.pop("crc32", None)
            if check not in (None, _check(values)):
                raise ValueError("its checksum is wrong")
            size = int(values["bytes"])
            if not 0 <= size < MAX_SIZE:
                raise ValueError("its size is none that a pin can have")
            if "files" not in values and "packs" not in values:
                return PinRecord(size, None)
            files = [cids.canonical(cids.parse(str(text))) for text in values["files"]]
            return PinRecord(size, frozenset([*files, *map(int, values["packs"])]))
        except (
            OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError, NotACid,
        ) as exc:  # fmt: skip
            log.warning(
                "%s is damaged (%s): what belongs to that pin is looked for", self.folder.path / name, exc
            )
            return PinRecord(0, None)

    def write(self, cid: Cid, record: PinRecord) -> None:
        """Writes the record of a pin. Raises StoreFailed; then the old record is unchanged."""
        values: dict[str, object] = {"cid": cids.text(cid), "bytes": record.size}
        if record.keys is not None:
            values["files"] = sorted(cids.text(key) for key in record.keys if not isinstance(key, int))
            values["packs"] = sorted(key for key in record.keys if isinstance(key, int))
        values["pinned"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        values["crc32"] = _check(values)
        with as_store_failed(f"the pin of {cids.text(cid)} can't be written"):
            write_file(self.folder.fd, cids.text(cid), json.dumps(values).encode() + b"\n")

    def remove(self, cid: Cid) -> None:
        """Raises StoreFailed."""
        with as_store_failed(f"the pin of {cids.text(cid)} can't be removed"):
            remove_file(self.folder.fd, cids.text(cid))

    def take_over(self, database: sqlite3.Connection) -> None:
        """Writes records of the pins that version 2 of the index has. They stay in memory too until all are
        written, for the case of a full disk."""
        keys: dict[bytes, set[Key]] = {}
        for pin, name in database.execute("SELECT pin, key FROM pinned"):
            try:
                keys.setdefault(pin, set()).add(
                    int(name) if name.isdecimal() else cids.canonical(cids.parse(name))
                )
            except (NotACid, TypeError, ValueError, AttributeError):
                log.warning("one thing that is pinned is not known any more: a row of the index is damaged")
        for pin, size in database.execute("SELECT cid, bytes FROM pins").fetchall():
            try:
                cid = cids.canonical(cids.decode(pin))
                self._unsaved[cid] = PinRecord(int(size), frozenset(keys[pin]) if pin in keys else None)
            except (NotACid, TypeError, ValueError):
                log.warning("one pin is not known any more: a row of the index is damaged")
        for cid, record in self._unsaved.items():
            self.write(cid, record)
        self._unsaved.clear()


def _check(values: object) -> str:
    """The checksum of all else in a record. A CID with a turned bit is another CID. Records that an older
    version wrote have none."""
    return f"{zlib.crc32(json.dumps(values).encode()):08x}"


def _cid(name: str) -> Cid | None:
    """The canonical CID whose usual spelling is `name`; None for any other name."""
    try:
        cid = cids.parse(name)
    except NotACid:
        return None
    return cid if cids.text(cid) == name and cids.canonical(cid) == cid else None


# -- IPNS records --------------------------------------------------------------------------------------------

MAX_NAME_RECORDS = 1024
"""The most records that are kept, which take 4 to 12 MiB. The one that was used longest ago is removed
first."""
_NAME = re.compile(r"[a-z0-9]{1,200}")


class NameRecords:
    """The newest record of each name that was ever seen. It is kept across restarts, so that no source can
    pass off an older one later. The reader verifies it."""

    def __init__(self, folder: Path) -> None:
        """`folder` is our cache folder. Raises StoreFailed."""
        with as_store_failed(f"{folder / NAMES} can't be used"):
            self._folder = Subfolder(folder / NAMES)

    def get(self, name: str) -> bytes | None:
        with contextlib.suppress(OSError, StoreFailed):
            fd = self._folder.fd
            data = read_file(fd, name)
            with contextlib.suppress(OSError):
                os.utime(name, dir_fd=fd, follow_symlinks=False)
            return data
        return None

    def put(self, name: str, data: bytes) -> None:
        """Writes `data` and syncs it to disk. Raises StoreFailed."""
        with as_store_failed(f"the record of {name} can't be kept"):
            write_file(self._folder.fd, name, data)
            self._make_room()

    def names(self) -> list[str]:
        """The names that have a record."""
        return [name for name in self._folder.names() if _NAME.fullmatch(name)]

    def close(self) -> None:
        self._folder.close()

    def _make_room(self) -> None:
        names = self.names()
        if len(names) > MAX_NAME_RECORDS:
            used = sorted((self._folder.stat(name).st_mtime_ns, name) for name in names)
            for _time, name in used[: len(names) - MAX_NAME_RECORDS]:
                self._folder.unlink(name)
