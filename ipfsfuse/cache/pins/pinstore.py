"""What outlives a process of the pins: the batches at the node, and the wishes that are not yet done there.

One SQLite database, each call one transaction that is on the disk when it returns. Concurrency: blocks; from any
thread, one call at a time.
"""

import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ipfsfuse.cache.pins.batches import Batch, Batches, Change
from ipfsfuse.cache.pins.owners import MOUNT_FILE, host_name
from ipfsfuse.cache.store.folder import as_store_failed
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, StoreFailed

_SCHEMA = """
CREATE TABLE IF NOT EXISTS batch (shelf TEXT, number INTEGER, members BLOB NOT NULL, PRIMARY KEY (shelf, number));
CREATE TABLE IF NOT EXISTS change (shelf TEXT, cid BLOB, wanted INTEGER NOT NULL, PRIMARY KEY (shelf, cid)) WITHOUT ROWID;
"""


class PinStore:
    """The pins' folder, made where it is not there. Raises StoreFailed, from every method."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "pins.sqlite"
        with as_store_failed(f"the pins' folder {folder} can't be used"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory = self._directory() or self.rename()
        with self._translated():
            try:
                self._connect()
            except sqlite3.OperationalError:  # the disk, not the database
                raise
            except sqlite3.DatabaseError:  # malformed: the node's listing and what is staged tell it again
                self._set_aside()
                self._connect()

    def _connect(self) -> None:
        database = sqlite3.connect(self._path, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL").fetchone()
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(_SCHEMA)
            if database.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("malformed")
        except sqlite3.Error:
            database.close()
            raise
        self._database = database

    def _set_aside(self) -> None:
        with as_store_failed(f"{self._path} can't be replaced"):
            self._path.replace(self._path.with_suffix(".damaged"))
            for end in ("-wal", "-shm"):  # they speak of the old one
                Path(f"{self._path}{end}").unlink(missing_ok=True)

    def _directory(self) -> str:
        try:
            return (self.folder / MOUNT_FILE).read_text().strip()
        except FileNotFoundError:
            return ""

    def rename(self) -> str:
        """Takes a new name for the directory at the node: `<host>-<mount id>`."""
        self.directory = f"{host_name()}-{secrets.token_hex(8)}"
        with as_store_failed(f"the pins' folder {self.folder} can't be used"):
            fresh = self.folder / f"{MOUNT_FILE}.new"
            with fresh.open("w") as file:
                file.write(self.directory + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.folder / MOUNT_FILE)
        return self.directory

    def load(self, shelf: str) -> Batches:
        with self._translated():
            rows = self._database.execute("SELECT number, members FROM batch WHERE shelf = ?", (shelf,)).fetchall()
            wishes = self._database.execute("SELECT cid, wanted FROM change WHERE shelf = ?", (shelf,)).fetchall()
        return Batches((Batch(number, _split(data)) for number, data in rows), (Change(Cid(key), bool(wanted)) for key, wanted in wishes))

    def save(self, shelf: str, changes: Iterable[Change], written: Iterable[Batch] = (), dropped: Iterable[int] = ()) -> None:
        """Batches that came and went, and the wishes that they leave open."""
        changes = list(changes)
        with self._translated(), self._database:
            run = self._database.executemany
            run("DELETE FROM batch WHERE shelf = ? AND number = ?", [(shelf, number) for number in dropped])
            run("INSERT OR REPLACE INTO batch VALUES (?, ?, ?)", [(shelf, batch.number, b"".join(batch.members)) for batch in written])
            run("DELETE FROM change WHERE shelf = ? AND cid = ?", [(shelf, cid) for cid, wanted in changes if wanted is None])
            run("INSERT OR REPLACE INTO change VALUES (?, ?, ?)", [(shelf, cid, wanted) for cid, wanted in changes if wanted is not None])

    def close(self) -> None:
        with self._translated():
            self._database.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise StoreFailed(f"{self._path}: {exc}") from exc


def _split(data: bytes) -> tuple[Cid, ...]:
    """The CIDs that stand one after the other in `data`; nothing of what is no CID."""
    found, at = [], 0
    try:
        while at < len(data):
            cid, at = cids.decode_prefix(data, at)
            found.append(cid)
    except NotACid:
        return ()
    return tuple(found)
