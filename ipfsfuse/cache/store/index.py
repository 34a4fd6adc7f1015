"""The cache's one SQLite database: where small blocks lie, what was used when, names in the root, pins.

WAL, so that the event loop reads (8 us a row) while one worker thread writes. A database that is malformed is set
aside under another name and a new one begun: the packs tell again what it held, but for names and pins.

Concurrency: `row` and `rows` belong to the event loop; `write` to one worker thread at a time; `count_blocks` and
`keys_in` to any.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ipfsfuse.cache.store.hold import as_store_failed
from ipfsfuse.errors import NotACid, StoreFailed

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (key BLOB PRIMARY KEY, pack INTEGER NOT NULL, at INTEGER NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS packs (pack INTEGER PRIMARY KEY, indexed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS uses (key PRIMARY KEY, last REAL NOT NULL, frequent INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS roots (at INTEGER PRIMARY KEY, cid BLOB UNIQUE NOT NULL, spelling TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pins (cid BLOB PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pinned (pin BLOB, key TEXT, PRIMARY KEY (pin, key)) WITHOUT ROWID;
"""
_VERSION = 2
_CHECKPOINT = 128
"""Pages of 4 KiB after which the WAL goes back into the database: it stays near half a MiB, or a sixteenth of the budget."""


Statements = Sequence[tuple[str, Sequence[Sequence[Any]]]]
"""(SQL, argument lists) of one transaction."""


class Damaged(Exception):
    """SQLite says that the database is malformed. Never leaves the cache."""


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:  # full, read-only, gone, I/O error; without a code: text that is no UTF-8
        if getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF == sqlite3.SQLITE_CORRUPT:
            raise Damaged(str(exc)) from exc
        raise StoreFailed(f"{path}: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise Damaged(str(exc)) from exc


class Index:
    def __init__(self, path: Path, budget: int) -> None:
        """Opens or makes the database. Raises StoreFailed where the disk does not let it."""
        self.path = path
        self._checkpoint = max(8, min(_CHECKPOINT, budget // (64 * 1024)))
        self.anew = not path.exists()
        """True where this is a new database: what the packs hold must be read from them."""
        try:
            self._open()
        except Damaged as exc:
            self.replace(str(exc))

    def _open(self) -> None:
        with as_store_failed(f"{self.path} can't be opened"):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with _translated(self.path):
            self._writer = self._connect()
            self._reader = self._connect()
            for connection in (self._writer, self._reader):
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(f"PRAGMA wal_autocheckpoint = {self._checkpoint}")
                connection.execute(f"PRAGMA journal_size_limit = {self._checkpoint * 4096}")
                connection.execute("PRAGMA cache_size = -4096")
            (version,) = self._writer.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise Damaged(f"it is of version {version}, this program writes version {_VERSION}")
            self._writer.executescript(_SCHEMA + f"PRAGMA user_version = {_VERSION};")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5)

    def replace(self, why: str) -> None:
        """Sets the database aside, replacing what was set aside before, and begins a new one."""
        aside = self.path.with_suffix(".malformed")
        log.error("%s is damaged (%s): it is kept as %s, and a new one is begun", self.path, why, aside.name)
        self.close()
        for suffix in ("-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(aside)
        self.anew = True
        self._open()

    def row(self, sql: str, arguments: Sequence[Any] = ()) -> Any:
        """The first row, or None. Raises Damaged or StoreFailed."""
        try:  # the context manager would cost as much as the query
            return self._reader.execute(sql, arguments).fetchone()
        except sqlite3.DatabaseError as exc:
            with _translated(self.path):
                raise exc

    def rows(self, sql: str, read: Callable[..., T]) -> list[T]:
        """`read` of the columns of each row. Raises StoreFailed, and Damaged for values too that `read` can't use: SQLite
        has no checksums, a bit that turned in a row is found here or never."""
        with _translated(self.path):
            rows = self._reader.execute(sql).fetchall()
        try:
            return [read(*row) for row in rows]
        except (NotACid, TypeError, ValueError) as exc:
            raise Damaged(f"a row holds {exc}") from exc

    def count_blocks(self) -> int:
        """Rows that say where a block lies. In any thread: on a connection of its own, for it reads them all (0.2 s for a
        million). Raises Damaged or StoreFailed."""
        with _translated(self.path), contextlib.closing(self._connect()) as connection:
            (count,) = connection.execute("SELECT COUNT(*) FROM blocks").fetchone()
            return int(count)

    def keys_in(self, pack: int) -> list[bytes]:
        """The multihashes of the blocks that lie in `pack`, in their order there. In any thread, as `count_blocks`."""
        with _translated(self.path), contextlib.closing(self._connect()) as connection:
            rows = connection.execute("SELECT key FROM blocks WHERE pack = ? ORDER BY at", (pack,)).fetchall()
            return [key for (key,) in rows if isinstance(key, bytes)]

    def write(self, statements: Statements) -> None:
        """Raises Damaged or StoreFailed, with nothing written."""
        with _translated(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                for sql, arguments in statements:
                    self._writer.executemany(sql, arguments)
                self._writer.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                raise

    def disk(self) -> int:
        """Bytes on disk of the database, its WAL, and what was set aside."""
        total = 0
        for path in (self.path, f"{self.path}-wal", f"{self.path}-shm", self.path.with_suffix(".malformed")):
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(path).st_blocks * 512
        return total

    def close(self) -> None:
        for name in ("_reader", "_writer"):
            connection = getattr(self, name, None)
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
