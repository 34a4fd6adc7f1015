"""The index: the cache's SQLite database. It says where small blocks are, when things were used, and which
names were opened in the root.

It is in WAL mode, so that the event loop reads (8 us a row) while a worker thread writes. SQLite's VFS
`unix-excl` keeps the index of the WAL in the process's memory, for all its connections. So there is no `-shm`
file, whose truncation by anyone would end the process with SIGBUS (https://sqlite.org/vfs.html). Only one
process uses a cache folder anyway.

A malformed database is renamed and a new one is begun. Its rows are read again from the packs, except for the
names. The user's pins are not in it (`cache.pinned`). A database of an older version is migrated; one of a
newer version is refused. If the disk is too full to open one, the index is kept in memory.

Concurrency: call `row` and `rows` on the event loop, `write` in one worker thread at a time, `count_blocks`
and `keys_in` in any thread.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ipfsfuse import __version__
from ipfsfuse.cache.store.folder import DAMAGED_INDEX, NO_SUBFOLDER_YET, as_store_failed, written_by
from ipfsfuse.errors import NotACid, StoreFailed
from ipfsfuse.fileio.files import Closing

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks (
    key BLOB PRIMARY KEY, pack INTEGER NOT NULL, at INTEGER NOT NULL, size INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS packs (pack INTEGER PRIMARY KEY, indexed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS uses (
    key PRIMARY KEY, last REAL NOT NULL, frequent INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS roots (at INTEGER PRIMARY KEY, cid BLOB UNIQUE NOT NULL, spelling TEXT NOT NULL);
"""
SCHEMA_VERSION = 3
"""PRAGMA user_version. A change of the schema raises it, and adds a migration."""
Migration = Callable[[sqlite3.Connection], None]
"""Migrates from one version to the next, in the transaction that raises the version."""
_CHECKPOINT = 128
"""Pages of 4 KiB after which the WAL is copied into the database. So the WAL has about half a MiB, or a
sixteenth of the budget."""


_PARAMETERS = 500
"""The most parameters of a statement."""
_ASKED = 64
"""Keys that one statement looks up."""
_PLACES = f"SELECT key, pack, at, size FROM blocks WHERE key IN ({','.join('?' * _ASKED)})"
Statements = Sequence[tuple[str, Sequence[Sequence[Any]]]]
"""(SQL, argument lists) of one transaction."""


class Damaged(Exception):
    """SQLite reports that the database is malformed. Not raised out of the cache."""


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        sqlite3.OperationalError
    ) as exc:  # full, read-only, gone, I/O error; without a code: text that is not UTF-8
        if getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF == sqlite3.SQLITE_CORRUPT:
            raise Damaged(str(exc)) from exc
        raise StoreFailed(f"{path}: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise Damaged(str(exc)) from exc


def _from_1(database: sqlite3.Connection) -> None:
    """Version 1 had other keys for uses and pins, and no order of roots."""
    database.execute("DROP TABLE uses")
    database.execute("DROP TABLE pinned")
    database.execute("CREATE TABLE pinned (pin BLOB, key TEXT, PRIMARY KEY (pin, key)) WITHOUT ROWID")
    database.execute("ALTER TABLE roots RENAME TO old_roots")
    database.execute(
        "CREATE TABLE roots (at INTEGER PRIMARY KEY, cid BLOB UNIQUE NOT NULL, spelling TEXT NOT NULL)"
    )
    database.execute("INSERT INTO roots (cid, spelling) SELECT cid, spelling FROM old_roots")
    database.execute("DROP TABLE old_roots")


def _from_2(take_over_pins: Migration, database: sqlite3.Connection) -> None:
    """Version 2 contained the pins."""
    take_over_pins(database)
    database.execute("DROP TABLE pins")
    database.execute("DROP TABLE pinned")


class Index:
    def __init__(self, path: Path, budget: int, take_over_pins: Migration) -> None:
        """Opens or creates the database. `take_over_pins` reads the pins of version 2, the last that has
        them.

        Raises StoreFailed for a database of a newer version, and for errors of the disk other than that it is
        full."""
        self.path = path
        self._checkpoint = max(8, min(_CHECKPOINT, budget // (64 * 1024)))
        self._migrations: Mapping[int, Migration] = {1: _from_1, 2: partial(_from_2, take_over_pins)}
        self.in_memory = False
        self._counting = threading.Lock()
        self.anew = not path.exists()
        """Whether this is a new database, so that the packs must be read to fill it."""
        try:
            self._open()
        except Damaged as exc:
            self.replace(str(exc))
        except StoreFailed as exc:
            if not _no_space(exc):
                raise
            log.warning("%s; the index is kept in memory until the next start", exc)
            self.close()
            self.anew = self.in_memory = True
            self._open()

    def _open(self) -> None:
        """Opens the database. Closes everything if that fails."""
        if not self.in_memory:
            with as_store_failed(f"{self.path} can't be opened"):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        try:
            self._connect_all()
        except BaseException:
            self.close()
            raise

    def _connect_all(self) -> None:
        with _translated(self.path):
            self._writer = self._connect()
            self._reader = self._writer if self.in_memory else self._connect()
            self._counter = self._writer if self.in_memory else self._connect()
            for connection in (self._writer, self._reader, self._counter):
                connection.execute("PRAGMA journal_mode = WAL").fetchone()
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(f"PRAGMA wal_autocheckpoint = {self._checkpoint}")
                connection.execute(f"PRAGMA journal_size_limit = {self._checkpoint * 4096}")
                connection.execute("PRAGMA cache_size = -4096")
            self._migrate()

    def _migrate(self) -> None:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            with Closing(os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
                writer = written_by(folder)
            raise StoreFailed(
                f"{self.path} has version {version}, and ipfsfuse {__version__} knows version "
                f"{SCHEMA_VERSION}: use {writer}, or give another --cache-dir"
            )
        empty = self._writer.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone() == (0,)
        self.anew = self.anew or empty
        with self._writer:  # commits, or rolls back
            self._writer.execute("BEGIN IMMEDIATE")
            for step in () if empty else range(version, SCHEMA_VERSION):
                if step not in self._migrations:
                    raise Damaged(f"it has version {step}, which no ipfsfuse has written")
                log.info("%s is brought from version %d to version %d", self.path, step, step + 1)
                self._migrations[step](self._writer)
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._writer.execute(statement)
            self._writer.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _connect(self) -> sqlite3.Connection:
        address = (
            ":memory:"
            if self.in_memory
            else f"file:{urllib.parse.quote(os.fsencode(self.path))}?vfs=unix-excl"
        )
        return sqlite3.connect(
            address, uri=not self.in_memory, isolation_level=None, check_same_thread=False, timeout=5
        )

    def replace(self, why: str) -> None:
        """Renames the damaged database, replacing one that was renamed before, and begins a new one."""
        aside = self.path.with_name(DAMAGED_INDEX)
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

    def locate_each(self, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int, int, int]]:
        """(key, pack, at, size) of those of `keys` that are in a pack. Looks up many keys by one statement: a
        statement costs 10 us, and each of many keys 1 to 3. Raises Damaged or StoreFailed."""
        for at in range(0, len(keys), _ASKED):
            some = keys[at : at + _ASKED]
            if len(some) < _ASKED // 4:
                for key in some:
                    row = self.row("SELECT pack, at, size FROM blocks WHERE key = ?", (key,))
                    if row is not None:
                        yield key, *row
            else:  # always the same number of parameters, because SQLite caches the prepared statement
                padded = [*some, *[some[-1]] * (_ASKED - len(some))]
                with _translated(self.path):
                    rows = self._reader.execute(_PLACES, padded).fetchall()
                yield from rows

    def stay_in_memory(self) -> None:
        """Reads what a write changed into the connection's cache, which each write empties. So the next query
        does not wait for the disk. Raises Damaged or StoreFailed."""
        self.row("SELECT 1 FROM blocks WHERE key = ?", (b"",))

    def rows(self, sql: str, read: Callable[..., T]) -> list[T]:
        """Calls `read` with the columns of each row. Raises StoreFailed. Raises Damaged, also for values that
        `read` can't use: SQLite has no checksums, so only here a flipped bit in a row can be noticed."""
        with _translated(self.path):
            rows = self._reader.execute(sql).fetchall()
        try:
            return [read(*row) for row in rows]
        except (NotACid, TypeError, ValueError) as exc:
            raise Damaged(f"a row holds {exc}") from exc

    def _ask(self, sql: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """All rows, on a connection for any thread. Raises Damaged or StoreFailed."""
        with self._counting, _translated(self.path):
            return self._counter.execute(sql, arguments).fetchall()

    def count_blocks(self) -> int:
        """The number of blocks in the index. In any thread: it reads all rows (0.2 s for a million). Raises
        Damaged or StoreFailed."""
        return int(self._ask("SELECT COUNT(*) FROM blocks")[0][0])

    def keys_in(self, pack: int) -> list[bytes]:
        """The multihashes of the blocks in `pack`, in their order there. In any thread. Raises Damaged or
        StoreFailed."""
        rows = self._ask("SELECT key FROM blocks WHERE pack = ? ORDER BY at", (pack,))
        return [key for (key,) in rows if isinstance(key, bytes)]

    def uses(self, keys: Sequence[bytes | int | str]) -> dict[bytes | int | str, tuple[float, bool]]:
        """(last use, whether it was used again) of those of `keys` that were in use at the last unmount. In
        any thread. Raises Damaged or StoreFailed."""
        found: dict[bytes | int | str, tuple[float, bool]] = {}
        for at in range(0, len(keys), _PARAMETERS):
            some = keys[at : at + _PARAMETERS]
            sql = f"SELECT key, last, frequent FROM uses WHERE key IN ({','.join('?' * len(some))})"
            for key, last, frequent in self._ask(sql, some):
                if not isinstance(last, float):  # SQLite has no checksums
                    raise Damaged(f"a row holds {last!r}")
                found[key] = last, bool(frequent)
        return found

    def packs(self) -> dict[int, int]:
        """How many bytes of each pack are indexed. In any thread. Raises Damaged or StoreFailed."""
        rows = self._ask("SELECT pack, indexed FROM packs")
        if not all(isinstance(number, int) for row in rows for number in row):
            raise Damaged("a row holds no number")
        return dict(rows)

    def write(self, statements: Statements) -> None:
        """Executes the statements in one transaction. Raises Damaged or StoreFailed; then nothing is
        written."""
        with _translated(self.path), self._writer:  # commits, or rolls back
            self._writer.execute("BEGIN IMMEDIATE")
            for sql, arguments in statements:
                self._writer.executemany(sql, arguments)

    def has_uses(self) -> bool:
        """Whether there is any row of uses. In any thread. Raises Damaged or StoreFailed."""
        return bool(self._ask("SELECT 1 FROM uses LIMIT 1"))

    def clear_uses(self) -> int:
        """Deletes the rows of uses. Returns how many bytes in the database are free for new rows. Raises
        Damaged or StoreFailed."""
        self.write([("DELETE FROM uses", [()])])
        with _translated(self.path):
            free: int = self._writer.execute("PRAGMA freelist_count").fetchone()[0]
            size: int = self._writer.execute("PRAGMA page_size").fetchone()[0]
        return free * size

    def close(self) -> None:
        for name in ("_reader", "_writer", "_counter"):
            connection = getattr(self, name, None)
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()


def _no_space(exc: StoreFailed) -> bool:
    """Whether the disk is full. SQLite reports that in several ways, for the WAL as "can't open"."""
    cause = exc.__cause__
    if isinstance(cause, OSError):
        return cause.errno in NO_SUBFOLDER_YET
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
    )
