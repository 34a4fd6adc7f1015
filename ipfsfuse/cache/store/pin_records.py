"""What the user pinned: one file for each pin, which no damage to the index touches.

    pinned/<CID>    {"cid": ..., "bytes": ..., "files": [CIDs of staging files], "packs": [numbers], "pinned":
    ISO time}

A file is written when its pin is complete, and is on the disk when that is said. Where its content is
damaged, its name still tells what is pinned; what belongs to it is then found by walking the DAG
(`cache.pinned`).

Concurrency: calls block for a sync of the disk, and belong in a thread, but for those of the start.
"""

import json
import logging
import sqlite3
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ipfsfuse.cache.budget import Key
from ipfsfuse.cache.store.folder import (
    Subfolder,
    as_store_failed,
    is_our_own,
    read_file,
    remove_file,
    write_file,
)
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
"""Of one file: some ten million staging files."""
MAX_SIZE = 1 << 63
"""Bytes that no disk has."""


@dataclass(frozen=True, slots=True)
class PinRecord:
    size: int
    """Bytes on disk when it was pinned."""
    keys: frozenset[Key] | None
    """The staging files and packs that it keeps; None where that is not known."""


class PinRecords:
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
                elif is_our_own(info):  # left by a kill while it was written
                    self.folder.unlink(name)
            else:
                found[cid] = self._read(name)
        self.folder.report_strays(strays)
        return found

    def _read(self, name: str) -> PinRecord:
        try:
            values = json.loads(read_file(self.folder.fd, name, MAX_BYTES))
            size = int(values["bytes"])
            if not 0 <= size < MAX_SIZE:
                raise ValueError("its size is none that a pin can have")
            if "files" not in values and "packs" not in values:
                return PinRecord(size, None)
            files = [cids.canonical(cids.parse(str(text))) for text in values["files"]]
            return PinRecord(size, frozenset([*files, *map(int, values["packs"])]))
        except (
            OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError, NotACid,
        ) as exc:  # fmt: skip
            log.warning(
                "%s is damaged (%s): what belongs to that pin is looked for", self.folder.path / name, exc
            )
            return PinRecord(0, None)

    def write(self, cid: Cid, size: int, keys: Collection[Key] | None) -> None:
        """`keys`: None where they are not known. Raises StoreFailed, with the old state kept."""
        values: dict[str, object] = {"cid": cids.text(cid), "bytes": size}
        if keys is not None:
            values["files"] = sorted(cids.text(key) for key in keys if not isinstance(key, int))
            values["packs"] = sorted(key for key in keys if isinstance(key, int))
        values["pinned"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with as_store_failed(f"the pin of {cids.text(cid)} can't be written"):
            write_file(self.folder.fd, cids.text(cid), json.dumps(values).encode() + b"\n")

    def remove(self, cid: Cid) -> None:
        """Raises StoreFailed."""
        with as_store_failed(f"the pin of {cids.text(cid)} can't be removed"):
            remove_file(self.folder.fd, cids.text(cid))

    def take_over(self, database: sqlite3.Connection) -> None:
        """Pins that an older version kept in the index (version 2). What a full disk does not take is kept in
        memory."""
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
            self.write(cid, record.size, record.keys)
        self._unsaved.clear()


def _cid(name: str) -> Cid | None:
    """The CID of which `name` is the usual spelling; None for any other name."""
    try:
        cid = cids.parse(name)
    except NotACid:
        return None
    return cid if cids.text(cid) == name and cids.canonical(cid) == cid else None
