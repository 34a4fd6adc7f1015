"""The cache folder: only one daemon uses it, it is marked as ours, and nothing that is not ours is changed,
in it or beside it."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from ipfsfuse import __version__
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store import folder
from ipfsfuse.cache.store.folder import is_free, lock_folder
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import StoreFailed
from tests.cache.standin import Chain, make_file

BUDGET = 16 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the owner of a file needs root")

HOLDER = """
import contextlib, sys, pathlib
from ipfsfuse.cache.store import folder
with contextlib.ExitStack() as stack:
    where = pathlib.Path(sys.argv[2])
    if sys.argv[1] == "isolated":
        where = stack.enter_context(folder.isolated_folder(where))
    held = stack.enter_context(folder.lock_folder(where))
    if sys.argv[1] == "announced":
        held.announce(12345, "/mnt/there")
    print(where, flush=True)
    sys.stdin.read()
"""


def holder(kind: str, where: Path) -> tuple[subprocess.Popen[str], str]:
    """Starts a process that locks a cache folder, and waits until it has. Returns the process and the
    folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(where)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str], by: signal.Signals | None = None) -> None:
    if by is not None:
        process.send_signal(by)
    process.communicate()


def use(cache_dir: Path) -> None:
    """Locks the folder and opens the cache in it, as a mount does."""

    async def main(held: folder.CacheFolder) -> None:
        async with PinsetCache.open(held.path, Chain(), BUDGET):
            pass

    with lock_folder(cache_dir) as held:
        held.announce(os.getpid(), "/mnt/here")
        assert len(held.inode_key()) == 32
        assert folder.is_mount_id(MountId.open(held.path).name)
        trio.run(main, held)


def refusal(cache_dir: Path) -> str:
    """The message of the refusal. Checks that no file stays open, although the exception is still alive."""
    with pytest.raises(StoreFailed) as raised:
        use(cache_dir)
    assert open_files_below(cache_dir) == []
    return str(raised.value)


def refused(cache_dir: Path) -> str:
    """The message of the refusal. Checks that it is one line that says what to do."""
    line = refusal(cache_dir)
    assert "\n" not in line
    assert any(
        todo in line
        for todo in (
            "give another --cache-dir",
            "run chmod",
            "remove it",
            "of your own",
            "its own --cache-dir",
        )
    ), line
    return line


def open_files_below(path: Path) -> list[str]:
    """The files below `path` that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if Path(name).is_relative_to(path)]


def contents(path: Path) -> dict[str, object]:
    """Everything below `path`, with its content, mode, owner and number of links."""
    found: dict[str, object] = {}
    for each in sorted([path, *path.rglob("*")]):
        info = each.lstat()
        content = os.readlink(each) if each.is_symlink() else each.read_bytes() if each.is_file() else ""
        found[str(each)] = (info.st_mode, info.st_uid, info.st_nlink if each.is_file() else 0, content)
    return found


# -- the lock ------------------------------------------------------------------------------------------------


def test_a_second_daemon_is_refused_with_the_first_ones_pid_and_mountpoint(tmp_path: Path) -> None:
    first, _where = holder("announced", tmp_path / "cache")
    try:
        assert "process 12345, mounted at /mnt/there" in refused(tmp_path / "cache")
        assert not is_free(tmp_path / "cache")
    finally:
        end(first)
    assert is_free(tmp_path / "cache")
    with lock_folder(tmp_path / "cache"):
        assert folder.announced(tmp_path / "cache") is None


@pytest.mark.parametrize("pid", ["1e999", "NaN", "1" + "0" * 5000, "[]", "{}"])
def test_a_malformed_announcement_counts_as_none(tmp_path: Path, pid: str) -> None:
    with lock_folder(tmp_path / "cache") as held:
        (held.path / folder.DAEMON).write_text(f'{{"pid": {pid}, "mountpoint": "/mnt"}}')
        assert folder.announced(tmp_path / "cache") is None


def test_a_second_daemon_is_refused_even_if_the_first_has_not_announced_itself(tmp_path: Path) -> None:
    first, _where = holder("locked", tmp_path / "cache")
    try:
        assert "in use by another daemon" in refused(tmp_path / "cache")
    finally:
        end(first)


@pytest.mark.parametrize("deleted", ["lock", "format", "daemon.json"])
def test_deleting_a_file_of_a_running_daemon_does_not_let_a_second_one_in(
    tmp_path: Path, deleted: str
) -> None:
    first, _where = holder("announced", tmp_path / "cache")
    try:
        (tmp_path / "cache" / "ipfsfuse-cache" / deleted).unlink()
        assert "in use by" in refused(tmp_path / "cache")
        assert not is_free(tmp_path / "cache")
    finally:
        end(first)


def test_a_folder_that_was_moved_away_is_still_in_use_and_a_new_one_is_free(tmp_path: Path) -> None:
    first, _where = holder("announced", tmp_path / "cache")
    try:
        (tmp_path / "moved").mkdir()
        (tmp_path / "cache" / "ipfsfuse-cache").rename(tmp_path / "moved" / "ipfsfuse-cache")
        use(tmp_path / "cache")
        assert "in use by process 12345" in refused(tmp_path / "moved")
    finally:
        end(first)


def test_checking_whether_a_folder_is_free_does_not_keep_a_daemon_out(tmp_path: Path) -> None:
    use(tmp_path / "cache")
    done = threading.Event()

    def check() -> None:
        while not done.is_set():
            is_free(tmp_path / "cache")

    checkers = [threading.Thread(target=check) for _ in range(2)]
    for checker in checkers:
        checker.start()
    try:
        for _ in range(200):
            with lock_folder(tmp_path / "cache"):
                pass
    finally:
        done.set()
        for checker in checkers:
            checker.join()


def test_kill_9_frees_the_folder(tmp_path: Path) -> None:
    first, _where = holder("announced", tmp_path / "cache")
    end(first, signal.SIGKILL)
    assert folder.announced(tmp_path / "cache") == (12345, "/mnt/there")
    with lock_folder(tmp_path / "cache"):
        assert folder.announced(tmp_path / "cache") is None


def test_a_deleted_folder_is_made_again_and_locked_again(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "cache") as held:
        held.announce(os.getpid(), "/mnt/here")
        subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
        assert is_free(tmp_path / "cache")
        held.remake()
        assert folder.announced(tmp_path / "cache") == (os.getpid(), "/mnt/here")
        assert not is_free(tmp_path / "cache")
    use(tmp_path / "cache")


def test_a_folder_that_can_not_be_checked_does_not_count_as_free(tmp_path: Path) -> None:
    assert is_free(tmp_path)
    (tmp_path / "ipfsfuse-cache").symlink_to(tmp_path)
    assert not is_free(tmp_path)


# -- the cache folder, and our subfolder in it ---------------------------------------------------------------


def test_our_folder_is_made_private_and_marked(tmp_path: Path) -> None:
    use(tmp_path / "a" / "cache")
    ours = tmp_path / "a" / "cache" / "ipfsfuse-cache"
    assert [path.stat().st_mode & 0o777 for path in (ours.parent, ours)] == [0o700, 0o700]
    assert (ours / "format").read_text() == "ipfsfuse cache 3\n"
    assert (ours / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert {path.name for path in ours.iterdir()} == {
        "format", "CACHEDIR.TAG", "lock", "inode-key", "mount-id", "index.sqlite", "pinned", "staging", "packs",
    }  # fmt: skip


@pytest.mark.logs("is damaged", "does not hold the name of a mount")
def test_the_key_and_the_name_survive_a_restart_and_are_replaced_if_damaged(tmp_path: Path) -> None:
    def key_and_name() -> tuple[bytes, str]:
        with lock_folder(tmp_path) as held:
            return held.inode_key(), MountId.open(held.path).name

    first = key_and_name()
    assert key_and_name() == first
    for name, wrong in [("inode-key", b"x" * 31), ("mount-id", b"../../elsewhere\xff\n")]:
        (tmp_path / "ipfsfuse-cache" / name).write_bytes(wrong)
    second = key_and_name()
    assert (len(second[0]), second[0] != first[0], second[1] != first[1]) == (32, True, True)
    assert folder.is_mount_id(second[1])
    assert key_and_name() == second


def test_a_folder_that_holds_other_things_is_used_and_they_are_left_alone(tmp_path: Path) -> None:
    cache_dir = tmp_path / "home"
    for below in ("files", "packs", "photos"):
        (cache_dir / below).mkdir(parents=True)
        (cache_dir / below / "1.jpg").write_text(below)
    (cache_dir / "index.sqlite").write_text("mine")
    (cache_dir / "daemon.json").symlink_to("photos/1.jpg")
    before = contents(cache_dir)
    use(cache_dir)
    assert {
        path: found for path, found in contents(cache_dir).items() if "ipfsfuse-cache" not in path
    } == before


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    assert "may be written by others: run chmod" in refused(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@as_root
def test_a_folder_that_others_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    os.chown(tmp_path / "cache", 12345, 12345)
    assert "belongs to another user" in refused(tmp_path / "cache")


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "cache").write_text("")
    else:
        (tmp_path / "cache").symlink_to(tmp_path / ("none" if kind == "link to nothing" else "."))
    assert "is not a folder" in refused(tmp_path / "cache")


# -- planted, damaged, foreign and linked things at every name -----------------------------------------------

NAMES = sorted({*folder.FILES, *folder.FOLDERS, folder.CONTROL})
CONTENT = ["staging/{cid}", "staging/{cid}.part", "packs/1.pack", "pinned/{cid}", "indexes/1-1-1-1.index"]
STRAYS = ["stray", "staging/stray", "packs/stray", "packs/01.pack", "pinned/stray", "pinned/.x.tmp~"]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if that is possible: hundreds of small caches would wait long for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside with a file in it: nothing planted in the cache folder may lead to a change there."""
    outside = tmp_path / "outside"
    (outside / "below").mkdir(parents=True)
    (outside / "precious").write_bytes(b"precious" * 1000)
    (outside / "below" / "1.pack").write_bytes(b"not a pack")
    return outside


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("used") / "cache"
    chain = Chain()
    file, leaves, _content = make_file(chain, 200_000)

    async def main(path: Path) -> None:
        async with PinsetCache.open(path, chain, BUDGET) as cache, cache.pinned.pin(file.cid) as pinning:
            await pinning.file(file)
            for leaf in leaves:
                await cache.reader.leaf(file, leaf)
            pinning.pin_structure = _nothing  # type: ignore[method-assign]

    with lock_folder(where) as held:
        held.inode_key()
        assert MountId.open(held.path).name
        trio.run(main, held.path)
    (where / "ipfsfuse-cache" / "indexes").mkdir()
    return where


@pytest.fixture
def cache_dir(tmp_path: Path, used: Path) -> Path:
    """A copy of a cache that was used. It has every kind of file."""
    subprocess.run(["cp", "-a", str(used), str(tmp_path / "cache")], check=True)
    return tmp_path / "cache"


async def _nothing(*_arguments: object) -> None:
    """Does nothing: the root of a made-up file can't be parsed."""


def fill(name: str) -> str:
    chain = Chain()
    return name.format(cid=folder_cid(chain))


def folder_cid(chain: Chain) -> str:
    return cids.text(make_file(chain, 200_000, seed=9)[0].cid)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        subprocess.run(["rm", "-r", str(path)], check=True)
    else:
        path.unlink(missing_ok=True)


def link_to_a_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "precious")


def link_to_a_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "none")


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside / "precious", path)


def a_folder(path: Path, _outside: Path) -> None:
    path.mkdir()
    (path / "kept").write_text("kept")


def a_pipe(path: Path, _outside: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        parent = os.open(path.parent, os.O_PATH)
        made.bind(f"/proc/self/fd/{parent}/{path.name}")
        os.close(parent)


def garbage(path: Path, _outside: Path) -> None:
    path.write_bytes(b"\xff\x00 garbage\n" * 300)


def empty_file(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")


def of_another_user(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")
    os.chown(path, 12345, 12345)


def open_to_all(path: Path, _outside: Path) -> None:
    path.write_bytes(b"")
    path.chmod(0o666)


LINKS = [link_to_a_file, link_to_a_folder, link_to_nothing, hard_link]
PLANTED = [*LINKS, a_folder, a_pipe, a_socket, garbage, empty_file, of_another_user, open_to_all]


@as_root
@pytest.mark.logs(".")
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", [*NAMES, *CONTENT, *STRAYS])
def test_nothing_outside_changes_whatever_is_planted_at_a_name(
    cache_dir: Path, victim: Path, name: str, plant: Callable[[Path, Path], None]
) -> None:
    """The planted file is refused in one line, or repaired, or left alone. What is not our content is never
    removed."""
    path = cache_dir / "ipfsfuse-cache" / fill(name)
    remove(path)
    plant(path, victim)
    outside, planted = contents(victim), contents(path) if path.is_dir() and not path.is_symlink() else None
    try:
        use(cache_dir)
    except StoreFailed:
        refused(cache_dir)
        assert os.path.lexists(path)
    if name in STRAYS:
        assert os.path.lexists(path)
    if planted is not None:
        assert {
            each: found for each, found in contents(path).items() if each in planted and each != str(path)
        } == {each: found for each, found in planted.items() if each != str(path)}
    assert contents(victim) == outside | (
        {}
        if plant is not hard_link
        else {str(victim / "precious"): contents(victim)[str(victim / "precious")]}
    )
    assert (victim / "precious").read_bytes() == b"precious" * 1000
    remove(path)  # as the refusals say
    if name == "format":
        path.write_text("ipfsfuse cache 3\n")
    use(cache_dir)


@as_root
@pytest.mark.parametrize("how", ["link", "file", "foreign", "open to all", "unmarked", "marked otherwise"])
def test_a_foreign_folder_that_has_our_name_is_refused_and_left_alone(
    tmp_path: Path, victim: Path, how: str
) -> None:
    ours = tmp_path / "cache" / "ipfsfuse-cache"
    ours.parent.mkdir(mode=0o700)
    if how == "link":
        ours.symlink_to(victim)
    elif how == "file":
        ours.write_text("mine")
    else:
        ours.mkdir(mode=0o700)
        (ours / "photo").write_text("mine")
        if how == "foreign":
            os.chown(ours, 12345, 12345)
        elif how == "open to all":
            ours.chmod(0o777)
        elif how == "marked otherwise":
            (ours / "format").write_text("something else 3\n")
    before = contents(tmp_path)
    refused(tmp_path / "cache")
    assert contents(tmp_path) == before


# -- versions ------------------------------------------------------------------------------------------------


def test_the_refusal_of_a_newer_layout_names_the_version_to_use(cache_dir: Path) -> None:
    ours = cache_dir / "ipfsfuse-cache"
    (ours / "format").write_text("ipfsfuse cache 4\n")
    (ours / "CACHEDIR.TAG").write_text((ours / "CACHEDIR.TAG").read_text().replace(__version__, "7.8.9"))
    before = contents(ours)
    line = refused(cache_dir)
    assert "use ipfsfuse 7.8.9" in line
    assert "layout 4" in line
    assert "damaged" not in line
    assert contents(ours) == before


def test_the_refusal_of_a_newer_index_names_the_version_to_use_and_the_index_is_kept(cache_dir: Path) -> None:
    ours = cache_dir / "ipfsfuse-cache"
    database = sqlite3.connect(ours / "index.sqlite")
    database.execute("PRAGMA user_version = 99")
    database.close()
    (ours / "CACHEDIR.TAG").write_text((ours / "CACHEDIR.TAG").read_text().replace(__version__, "7.8.9"))
    line = refusal(cache_dir)
    assert "use ipfsfuse 7.8.9" in line
    assert "damaged" not in line
    assert not (ours / "index.malformed").exists()
    assert "7.8.9" in (ours / "CACHEDIR.TAG").read_text()


# -- folders of isolated mounts ------------------------------------------------------------------------------


def test_an_isolated_folder_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with folder.isolated_folder(tmp_path) as one, folder.isolated_folder(tmp_path) as two:
        assert one != two
        assert one.stat().st_mode & 0o777 == 0o700
        assert one.name.startswith(f"ipfsfuse-isolated-{os.geteuid()}-")
        (one / "content").write_text("secret")
    assert not one.exists()
    assert not two.exists()


def test_the_next_start_removes_an_isolated_folder_that_kill_9_left(tmp_path: Path) -> None:
    killed, left = holder("isolated", tmp_path)
    living, used = holder("isolated", tmp_path)
    end(killed, signal.SIGKILL)
    assert Path(left).exists()
    try:
        with folder.isolated_folder(tmp_path):
            assert not Path(left).exists()
            assert Path(used).exists()
    finally:
        end(living)
    assert not Path(used).exists()


@as_root
def test_folders_that_are_not_isolated_folders_of_ours_are_never_removed(
    tmp_path: Path, victim: Path
) -> None:
    temporary, ours = tmp_path / "tmp", f"ipfsfuse-isolated-{os.geteuid()}-"
    temporary.mkdir()
    (temporary / f"{ours}linkedto").symlink_to(victim)
    for name in (f"{ours}foreigns", f"{ours}openness", f"{ours}not-random", f"{ours}abc", ours.rstrip("-")):
        (temporary / name).mkdir(mode=0o700)
        (temporary / name / "kept").write_text("kept")
    os.chown(temporary / f"{ours}foreigns", 12345, 12345)
    (temporary / f"{ours}openness").chmod(0o755)
    (temporary / f"{ours}fileonly").write_text("kept")
    before = contents(tmp_path)
    with folder.isolated_folder(temporary):
        pass
    assert contents(tmp_path) == before


def _make_and_leave(where: str, times: int, failed: "multiprocessing.Queue[str]") -> None:
    for _ in range(times):
        with folder.isolated_folder(Path(where)) as made, lock_folder(made) as held:
            (held.path / "content").write_text("mine")
            if not (held.path / "content").exists() or not made.exists():
                failed.put(str(made))


def test_an_isolated_folder_is_not_removed_before_it_is_locked(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failed: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=_make_and_leave, args=(str(tmp_path), 60, failed)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert failed.empty()
    assert list(tmp_path.iterdir()) == []


# -- records of pins -----------------------------------------------------------------------------------------


def test_the_record_of_a_pin_is_json(cache_dir: Path) -> None:
    (pin,) = (cache_dir / "ipfsfuse-cache" / "pinned").iterdir()
    record = json.loads(pin.read_text())
    assert (record["cid"], record["files"], record["packs"]) == (pin.name, [pin.name], [])
