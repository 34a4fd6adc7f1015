"""Older layouts and versions of the cache folder are migrated, even if the first starts are killed at any
moment."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.folder import lock_folder
from ipfsfuse.cache.store.index import SCHEMA_VERSION
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import StoreFailed
from tests.cache.standin import Chain, random_bytes
from tests.cache.test_folder import contents, end, holder
from tests.cache.test_keeping import directory, file_node, read_all, tree

BUDGET = 16 << 20

# The schemas as the older versions wrote them.
VERSION_1 = """
CREATE TABLE blocks (key BLOB PRIMARY KEY, pack INTEGER NOT NULL, at INTEGER NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE packs (pack INTEGER PRIMARY KEY, indexed INTEGER NOT NULL);
CREATE TABLE uses (name TEXT PRIMARY KEY, last REAL NOT NULL, frequent INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (cid BLOB PRIMARY KEY, spelling TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE pins (cid BLOB PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE pinned (pin BLOB, key BLOB, PRIMARY KEY (pin, key)) WITHOUT ROWID;
"""
VERSION_2 = """
CREATE TABLE blocks (key BLOB PRIMARY KEY, pack INTEGER NOT NULL, at INTEGER NOT NULL, size INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE packs (pack INTEGER PRIMARY KEY, indexed INTEGER NOT NULL);
CREATE TABLE uses (key PRIMARY KEY, last REAL NOT NULL, frequent INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE roots (at INTEGER PRIMARY KEY, cid BLOB UNIQUE NOT NULL, spelling TEXT NOT NULL);
CREATE TABLE pins (cid BLOB PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE pinned (pin BLOB, key TEXT, PRIMARY KEY (pin, key)) WITHOUT ROWID;
"""


class Used:
    """A cache in which one tree is pinned, another was read, and a name was opened. `chain` has all
    blocks."""

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir
        self.chain = Chain()
        self.pinned, self.other = tree(self.chain, 2, seed=100), tree(self.chain, 1, seed=300)

        async def main(path: Path) -> None:
            async with PinsetCache.open(path, self.chain, BUDGET) as cache:
                await read_all(cache, self.pinned, pin=True)
                await read_all(cache, self.other)
                cache.names.note(self.other, "as-it-was-spelled")

        with lock_folder(cache_dir) as held:
            trio.run(main, held.path)

    @property
    def ours(self) -> Path:
        return self.cache_dir / "ipfsfuse-cache"

    def check(self, names: bool = True) -> None:
        """Checks that all of it is there without a request to the sources, and that what is pinned stays when
        the rest is evicted."""
        self.look(names)
        self.look(names, evict=True)

    def look(self, names: bool = True, evict: bool = False) -> None:
        chain = Chain()

        async def main(path: Path) -> None:
            async with PinsetCache.open(path, chain, BUDGET) as cache:
                await cache.store.blocks.packs_indexed.wait()
                assert list(cache.pinned.roots) == [self.pinned]
                assert cache.statistics().pinned > 2 << 20
                assert cache.statistics().pinned_lost == 0
                await read_all(cache, self.pinned)
                await read_all(cache, self.other)
                assert chain.asked == []
                named = dict(cache.named_roots())
                assert named.get(self.other) == ("as-it-was-spelled" if names else None)
                if evict:
                    await cache.store.evict()
                    await read_all(cache, self.pinned)
                    assert chain.asked == []

        with lock_folder(self.cache_dir) as held:
            trio.run(main, held.path)

    def as_version(self, number: int) -> None:
        """Writes the index anew as an older version had it."""
        (record,) = (self.ours / "pinned").iterdir()
        pin = json.loads(record.read_text())
        record.unlink()
        (self.ours / "pinned").rmdir()
        path = self.ours / "index.sqlite"
        with closing(sqlite3.connect(path)) as database:
            rows = {
                name: database.execute(f"SELECT * FROM {name}").fetchall()
                for name in ("blocks", "packs", "roots")
            }
        path.unlink()
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(VERSION_1 if number == 1 else VERSION_2)
            database.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", rows["blocks"])
            database.executemany("INSERT INTO packs VALUES (?, ?)", rows["packs"])
            database.executemany(
                "INSERT INTO roots (cid, spelling) VALUES (?, ?)", [row[1:] for row in rows["roots"]]
            )
            database.execute("INSERT INTO pins VALUES (?, ?)", (self.pinned, pin["bytes"]))
            keys = [*pin["files"], *map(str, pin["packs"])]
            database.executemany("INSERT INTO pinned VALUES (?, ?)", [(self.pinned, cids.parse(key) if number == 1 else key) for key in keys
                                                                      if number == 2 or not key.isdecimal()])  # fmt: skip
            database.execute(f"PRAGMA user_version = {number}")

    def as_layout_2(self) -> None:
        """Moves everything to where layout 2 had it."""
        self.as_version(2)
        for old, new in {
            "staging": "files",
            "packs": "packs",
            "index.sqlite": "index.sqlite",
            "lock": "lock",
        }.items():
            (self.ours / old).rename(self.cache_dir / new)
        for left in self.ours.iterdir():
            left.unlink()
        self.ours.rmdir()
        (self.cache_dir / "daemon.json").write_text('{"pid": 1, "mountpoint": "/mnt/gone"}')
        (self.cache_dir / "daemon.log").write_text("said before\n")
        (self.cache_dir / "indexes").mkdir()
        (self.cache_dir / "indexes" / "fe01-1a2b-300-17.index").write_text("an index")
        node = self.cache_dir / "pins" / ("0" * 16)
        node.mkdir(parents=True)
        (node / "mount").write_text("old-host-0123456789abcdef\n")


@pytest.fixture
def used(tmp_path: Path) -> Used:
    return Used(tmp_path / "cache")


@pytest.mark.parametrize("number", [1, 2])
def test_an_older_index_is_migrated_with_all_its_content(used: Used, number: int) -> None:
    used.as_version(number)
    used.check()
    with closing(sqlite3.connect(used.ours / "index.sqlite")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        assert tables == {"blocks", "packs", "uses", "roots"}


@pytest.mark.logs("which no ipfsfuse has written")
def test_an_index_of_a_version_that_never_existed_is_replaced(used: Used) -> None:
    with closing(sqlite3.connect(used.ours / "index.sqlite")) as database:
        database.execute("PRAGMA user_version = -7")
    used.check(names=False)


def test_the_older_layout_is_moved_into_the_marked_folder(used: Used) -> None:
    used.as_layout_2()
    used.check()
    assert [path.name for path in used.cache_dir.iterdir()] == ["ipfsfuse-cache"]
    assert (used.ours / "log").read_text() == "said before\n"
    assert (used.ours / "mount-id").read_text() == "old-host-0123456789abcdef\n"
    assert (used.ours / "indexes" / "fe01-1a2b-300-17.index").read_text() == "an index"


KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.folder import lock_folder
from tests.cache.standin import Chain
import trio

async def main(path):
    async with PinsetCache.open(path, Chain(), 16 << 20):
        pass

def start(cache_dir, left):
    "Starts a process that is killed after `left` changes of the disk, and returns how it ended."
    child = os.fork()
    if not child:
        def each(event, arguments):
            nonlocal left
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
            changes = changes or (event == "open" and arguments[2] & (os.O_CREAT | os.O_TRUNC))
            if changes or event.startswith("sqlite3.connect/handle"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(each)
        with lock_folder(cache_dir) as held:
            trio.run(main, held.path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

cache_dir = Path(sys.argv[1])
if sys.argv[2:]:
    for left in map(int, sys.argv[2:]):
        start(cache_dir, left)
else:
    killed, ended = 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        copy = Path(f"{cache_dir}.{killed}")
        subprocess.run(["cp", "-a", str(cache_dir), str(copy)], check=True)
        ended = start(copy, killed)
        killed += 1
    sys.exit(ended)
"""


def killed_starts(cache_dir: Path, *after: int) -> None:
    """Starts processes that are killed, one for each number in `after`, after so many changes of the disk.
    Without `after`: copies the folder to `cache_dir.0`, `.1` ..., and starts a process in each copy that is
    killed after 0, 1 ... changes, until one ends without a kill."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", KILLED, str(cache_dir), *map(str, after)], env=environment, check=True
    )


def test_the_next_start_completes_a_migration_that_was_killed_between_any_two_steps(used: Used) -> None:
    used.as_layout_2()
    cache_dir = used.cache_dir
    killed_starts(cache_dir)
    copies = list(cache_dir.parent.glob("cache.*"))
    assert len(copies) > 15
    for used.cache_dir in copies:
        used.look()
        assert [path.name for path in used.cache_dir.iterdir()] == ["ipfsfuse-cache"]


def test_a_migration_survives_several_kills_in_a_row(used: Used) -> None:
    used.as_layout_2()
    killed_starts(used.cache_dir, 2, 2, 1, 3, 0, 2)
    used.check()


def test_the_older_layout_is_not_moved_while_its_daemon_lives(used: Used) -> None:
    used.as_layout_2()
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print(flush=True); "
        "sys.stdin.read()"
    )
    old = subprocess.Popen(
        [sys.executable, "-c", script, str(used.cache_dir / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert old.stdout is not None
    old.stdout.readline()
    before = contents(used.cache_dir)
    try:
        with (
            pytest.raises(StoreFailed, match="in use by process 1, mounted at /mnt/gone"),
            lock_folder(used.cache_dir),
        ):
            pass
        assert contents(used.cache_dir) == before
    finally:
        old.communicate()
    used.check()


@pytest.mark.parametrize(
    "stranger",
    ["notes.txt", "files/holiday.jpg", "packs/pack.zip", "index.sqlite -> elsewhere", "files -> elsewhere"],
)
def test_an_older_layout_with_something_else_in_it_is_refused_and_left_alone(
    tmp_path: Path, used: Used, stranger: str
) -> None:
    used.as_layout_2()
    name, _arrow, target = stranger.partition(" -> ")
    path = used.cache_dir / name
    if target:
        path.rename(tmp_path / target)
        path.symlink_to(tmp_path / target)
    else:
        path.write_text("precious")
    before = contents(tmp_path)
    todo = f"holds {name}, which is not part of it: move that elsewhere, or give another --cache-dir"
    with pytest.raises(StoreFailed, match=todo), lock_folder(used.cache_dir):
        pass
    assert contents(tmp_path) == before


def test_two_starts_at_once_move_the_older_layout_once(used: Used) -> None:
    used.as_layout_2()
    both = [holder("locked", used.cache_dir) for _ in range(2)]
    held = [process for process, where in both if where]
    assert len(held) == 1
    for process, _where in both:
        end(process)
    used.check()


# -- pins outlive the index ----------------------------------------------------------------------------------


def damage(used: Used, how: str) -> None:
    index = used.ours / "index.sqlite"
    if how == "deleted":
        for path in used.ours.glob("index.sqlite*"):
            path.unlink()
    elif how == "overwritten":
        index.write_bytes(index.read_bytes()[:100] + random_bytes(index.stat().st_size - 100, 1))
    else:
        index.write_bytes(b"")


@pytest.mark.logs("is damaged", "wrong bytes in the cache")
@pytest.mark.parametrize("record", ["whole", "garbage", "empty", "of another form"])
@pytest.mark.parametrize("how", ["deleted", "overwritten", "empty"])
def test_pins_survive_the_loss_of_the_index(used: Used, how: str, record: str) -> None:
    """The budget is so small that everything else is evicted at once."""
    damage(used, how)
    (pin,) = (used.ours / "pinned").iterdir()
    if record != "whole":
        pin.write_bytes(
            {"garbage": b"\xff\x00{{", "empty": b"", "of another form": b'["bytes", {"files": 3}]'}[record]
        )
    chain = Chain()

    async def main(path: Path) -> None:
        async with PinsetCache.open(path, chain, 4 << 20) as cache:
            for seed in range(40):  # more than the budget, perhaps before it is known what is pinned
                await cache.reader.block(chain.add(random_bytes(60_000, seed)))
                file = chain.add(random_bytes(200_000, 1000 + seed))
                await cache.reader.block(file)
            with trio.fail_after(20):
                while b'"packs"' not in pin.read_bytes():  # noqa: ASYNC110
                    await trio.sleep(0.01)
                await cache.store.blocks.packs_indexed.wait()
            chain.asked.clear()
            await read_all(cache, used.pinned)
            assert chain.asked == []
            assert cache.statistics().pinned_lost == 0
            for seed in range(100):
                await cache.reader.block(chain.add(random_bytes(60_000, 5000 + seed)))
            chain.asked.clear()
            await read_all(cache, used.pinned)
            assert chain.asked == []
            assert cache.statistics().evictions > 0
            await cache.pinned.unpin(used.pinned)
        assert not pin.exists()

    with lock_folder(used.cache_dir) as held:
        trio.run(main, held.path)


@pytest.mark.logs("of the pin .* are not in the cache any more", "is damaged", "wrong bytes")
@pytest.mark.parametrize("record", ["whole", "garbage"])
@pytest.mark.parametrize("kind", ["staging", "packs"])
def test_missing_content_of_a_pin_is_reported_and_fetched_when_it_is_used(
    used: Used, kind: str, record: str
) -> None:
    (pin,) = (used.ours / "pinned").iterdir()
    content = json.loads(pin.read_text())
    damage(used, "deleted")
    if record == "garbage":
        pin.write_bytes(b"garbage")
    if kind == "staging":
        (used.ours / kind / content["files"][0]).unlink()
    else:
        for pack in (used.ours / kind).iterdir():
            pack.unlink()

    async def main(path: Path) -> None:
        async with PinsetCache.open(path, used.chain, BUDGET) as cache:
            with trio.fail_after(20):
                while cache.statistics().pinned_lost == 0:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert list(cache.pinned.roots) == [used.pinned]
            used.chain.asked.clear()
            await read_all(cache, used.pinned)
            assert used.chain.asked
            await read_all(cache, used.pinned, pin=True)
            assert cache.statistics().pinned_lost == 0

    with lock_folder(used.cache_dir) as held:
        trio.run(main, held.path)


def test_a_pin_whose_record_can_not_be_written_fails(used: Used) -> None:
    """Its content is already in the cache, but the folder of the records can't be written to."""
    other = directory(used.chain, {"again": file_node(used.chain, 1 << 20, 100)})
    pinned = used.ours / "pinned"

    async def main(path: Path) -> None:
        async with PinsetCache.open(path, used.chain, BUDGET) as cache:
            before = cache.statistics().pinned
            cache.store.pin_records.folder.close()
            pinned.rename(used.ours / "moved")
            pinned.write_text("no folder")
            with pytest.raises(StoreFailed, match="is not a folder"):
                await read_all(cache, other, pin=True)
            assert (list(cache.pinned.roots), cache.statistics().pinned) == ([used.pinned], before)
            pinned.unlink()
            (used.ours / "moved").rename(pinned)
            await read_all(cache, other, pin=True)
            assert set(cache.pinned.roots) == {used.pinned, other}

    with lock_folder(used.cache_dir) as held:
        trio.run(main, held.path)
    assert {path.name for path in pinned.iterdir()} == {cids.text(used.pinned), cids.text(other)}


@pytest.mark.logs("is damaged")
def test_a_pinned_file_of_one_block_is_found_by_its_file_name_if_its_record_is_damaged(
    tmp_path: Path,
) -> None:
    chain = Chain()
    lone = chain.add(random_bytes(100_000, 5))

    async def main(path: Path) -> None:
        async with PinsetCache.open(path, chain, BUDGET) as cache, cache.pinned.pin(lone) as pinning:
            await pinning.file(FileRef(lone, 100_000))
            await cache.reader.block(lone)
        (path / "index.sqlite").unlink()
        (path / "pinned" / cids.text(lone)).write_text("{}")
        chain.asked.clear()
        async with PinsetCache.open(path, chain, BUDGET) as cache:
            await cache.store.blocks.packs_indexed.wait()
            await cache.store.evict()
            await cache.reader.block(lone)
            assert chain.asked == []

    (tmp_path / "cache").mkdir()
    trio.run(main, tmp_path / "cache")
