"""A daemon is killed at any moment, again and again. Its cache folder is damaged while it runs and after it
has ended. Every read is right.

IPFSFUSE_DAMAGES is the number of runs in each of three places. IPFSFUSE_DAMAGES_FIRST is the number of the
first run; the number seeds the run.
"""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipfsfuse import client
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.faults.test_cloning import file_system
from tests.faults.test_harm import repository
from tests.mounting import Home, Mounted, wait_until

ROUNDS = int(os.environ.get("IPFSFUSE_DAMAGES", "2"))
FIRST = int(os.environ.get("IPFSFUSE_DAMAGES_FIRST", "0"))
MIB = 1 << 20
BUDGET = 20
"""MiB: less than all content takes, so files are evicted all the time."""
READERS = 4
OUTSIDE = b"not of the cache" * 10_000
TOP = ("format", "inode-key", "mount-id", "index.sqlite", "index.sqlite-wal", "daemon.json", "lock")
"""Files of the cache folder itself that may be damaged. None of them holds the user's pins."""

pytestmark = pytest.mark.logs(".")  # each damage is logged


class Content:
    """A directory with every kind of file that the cache treats differently."""

    def __init__(self) -> None:
        dice, self.dag = random.Random(19), Dag()
        self.files: dict[str, bytes] = {}
        entries = {}

        def add(name: str, leaves: list[bytes]) -> None:
            self.files[name] = b"".join(leaves)
            cid = self.dag.file(leaves) if len(leaves) > 1 else self.dag.block(leaves[0])
            entries[name.encode()] = (cid, len(self.files[name]))

        add("long", [*(dice.randbytes(MIB) for _ in range(12)), dice.randbytes(12_345)])
        for number in range(6):
            add(f"large{number}", [dice.randbytes(300_000 + number) for _ in range(4)])
        for number in range(40):
            add(f"small{number}", [dice.randbytes(dice.randrange(1, 50_000))])
        for number in range(3):  # as `ipfs add` writes them with CIDv0
            leaves = [dice.randbytes(262_144) for _ in range(5)]
            self.files[f"wrapped{number}"] = b"".join(leaves)
            sizes = [len(leaf) for leaf in leaves]
            message = UnixFS(type=Type.FILE, filesize=sum(sizes), blocksizes=sizes)
            nodes = [self.dag.node([], UnixFS(Type.FILE, data=leaf, filesize=len(leaf))) for leaf in leaves]
            cid = self.dag.node([Link(node, b"", 262_158) for node in nodes], message)
            entries[b"wrapped%d" % number] = (cid, sum(sizes))
        self.root = cids.text(self.dag.directory(entries))
        self.pinned = cids.text(entries[b"large0"][0])


class Damager:
    """Damages the cache folder at random, one file at a time."""

    def __init__(self, store: Path, outside: Path) -> None:
        self.store, self.outside = store, outside
        self.begin(random.Random(0))

    def begin(self, dice: random.Random) -> None:
        self.dice = dice
        self.done: list[str] = []
        self._saved: dict[Path, bytes] = {}

    def damage(self, *, top: bool) -> None:
        """Damages one file. With `top` it may be a file that is read only at a start."""
        with contextlib.suppress(FileNotFoundError):  # it was evicted meanwhile
            names = [*(self.store / "staging").iterdir(), *(self.store / "packs").iterdir()]
            if top and (not names or self.dice.random() < 0.3):
                names = [self.store / name for name in TOP if (self.store / name).is_file()]
            # the links that `link` made lead outside
            names = [path for path in names if not path.is_symlink()]
            if not names:
                return
            path = self.dice.choice(names)
            ways: list[Callable[[Path], object]] = [self.flip] * 4 + [
                self.cut,
                self.zero,
                self.hole,
                self.remove,
            ]
            if path.parent != self.store:
                ways += [self.longer, self.link]
                if top:
                    ways += [self.swap, self.half]
            way = self.dice.choice(ways)
            if path.parent == self.store:
                self._saved.setdefault(path, path.read_bytes())
            self.done.append(f"{way.__name__} {path.relative_to(self.store)}")
            way(path)

    def put_back(self) -> bool:
        """Restores the files of the cache folder itself. Returns whether any was damaged."""
        for path, data in self._saved.items():
            path.write_bytes(data)
        return bool(self._saved)

    def flip(self, path: Path) -> None:
        with path.open("r+b") as file:
            if size := os.fstat(file.fileno()).st_size:
                for _ in range(self.dice.choice((1, 1, 20))):
                    at = self.dice.randrange(size)
                    old = os.pread(file.fileno(), 1, at)
                    os.pwrite(file.fileno(), bytes([(old or b"\0")[0] ^ 1 << self.dice.randrange(8)]), at)

    def cut(self, path: Path) -> None:
        os.truncate(path, self.dice.randrange(path.stat().st_size + 1))

    def zero(self, path: Path) -> None:
        with path.open("r+b") as file:
            at = self.dice.randrange(os.fstat(file.fileno()).st_size + 1) & ~4095
            os.pwrite(file.fileno(), bytes(min(4096, os.fstat(file.fileno()).st_size - at)), at)

    def hole(self, path: Path) -> None:
        at = self.dice.randrange(path.stat().st_size + 1) & ~4095
        subprocess.run(
            ["fallocate", "-p", "-o", str(at), "-l", "65536", path], check=False, capture_output=True
        )

    def longer(self, path: Path) -> None:
        with path.open("ab") as file:
            file.write(self.dice.randbytes(self.dice.choice((1, 5000, 100_000))))

    def remove(self, path: Path) -> None:
        path.unlink()

    def link(self, path: Path) -> None:
        link = path.with_name("link")
        link.symlink_to(self.outside)
        link.replace(path)  # by one call, else the daemon may make the file anew in between

    def swap(self, path: Path) -> None:
        other = self.dice.choice([*path.parent.iterdir()])
        between = path.with_name("between")
        path.rename(between)
        if other != path:
            other.rename(path)
        between.rename(other)

    def half(self, path: Path) -> None:
        """Renames a complete file to a partial one, or the other way round."""
        path.rename(path.with_name(path.name.removesuffix(".part") if path.suffix else f"{path.name}.part"))


class Readers:
    """Threads that read at random within the block. An error counts unless the daemon was killed."""

    def __init__(self, mount: Mounted, content: Content, dice: random.Random) -> None:
        self.folder = mount.path / content.root
        self.content = content
        self.seeds = [dice.random() for _ in range(READERS)]
        self.killed = threading.Event()
        self.wrong: list[str] = []
        self.reads = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._read_on, args=(random.Random(seed),)) for seed in self.seeds]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.killed.set()
            for thread in threads:
                thread.join()

    def _read_on(self, dice: random.Random) -> None:
        names = [*self.content.files]
        while not self.killed.is_set() and not self.wrong:
            name = dice.choice(["long", dice.choice(names)])
            try:
                self._read(name, dice)
            except OSError as exc:
                if not self.killed.is_set():
                    self.wrong.append(f"{name}: {exc}")
            self.reads += 1

    def _read(self, name: str, dice: random.Random) -> None:
        right = self.content.files[name]
        with (self.folder / name).open("rb", buffering=0) as file:
            at = dice.choice((0, 0, dice.randrange(len(right))))
            size = dice.choice((4096, 1 << 17))
            while at < len(right) and not self.wrong:
                # if the kernel reads the file, this also works after a kill
                got = os.pread(file.fileno(), size, at)
                # a read is cut short if the daemon dies
                whole = size if not self.killed.is_set() else len(got)
                if got != right[at : at + whole]:
                    self.wrong.append(f"{name} at {at}: {len(got)} bytes of {size}")
                if dice.random() < 0.01:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if dice.random() < 0.01:
                    break
                at += len(got) or size


@pytest.fixture(params=["gateway", "xfs", "btrfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The folder for the cache. On `xfs` and `btrfs` it lies next to a repository, and leaves are cloned."""
    if request.param == "gateway":
        yield "", tmp_path
    else:
        with file_system(request.param, tmp_path) as folder:
            yield request.param, folder


def test_every_read_is_right_after_any_damage_and_any_kill_of_the_daemon(
    place: tuple[str, Path],
) -> None:
    """On XFS the mount has --passthrough: the kernel itself reads complete files."""
    kind, folder = place
    content = Content()
    home, outside = Home(folder / "home"), folder / "outside"
    outside.write_bytes(OUTSIDE)
    options = ["--budget", f"{BUDGET}MiB", "--deadline", "20s"]
    if kind:
        repository(folder / "repository", content.dag)
        home.env["IPFS_PATH"] = str(folder / "repository")
        options += ["--from", "kubo"]
    if kind == "xfs":
        options.append("--passthrough")
    with Gateway(content.dag.blocks).serving() as gateway:
        options += ["--from", gateway.url]
        home.run("mount", *options, home.mountpoint)
        home.run("pin", content.pinned)
        home.run("unmount", home.mountpoint)
        damager = Damager(home.store, outside)
        for number in range(FIRST, FIRST + ROUNDS):
            with start(home, options, damager) as mount:
                damager.begin(random.Random(number))
                live(mount, content, damager, "--passthrough" in options)
            for _ in range(3):
                damager.damage(top=True)
        with start(home, options, damager) as mount:
            check_all(mount, content)
            if kind != "btrfs":  # btrfs reports late how much a file takes
                check_budget(mount)
            assert client.call(mount.control, "metrics")["pinned"] == 1
    assert outside.read_bytes() == OUTSIDE


@contextlib.contextmanager
def start(home: Home, options: list[str], damager: Damager) -> Iterator[Mounted]:
    """A mount. If it is refused because of the damage, it says so in one line, and the file is put back."""
    with contextlib.ExitStack() as stack:
        try:
            mount = stack.enter_context(home.mounted(*options))
        except AssertionError as exc:
            lines = str(exc).splitlines()  # the command and its code, the failure as JSON, its line
            assert len(lines) == 3, (lines, damager.done)
            assert str(home.store) in lines[2], (lines, damager.done)
            assert damager.put_back(), (lines, damager.done)
            mount = stack.enter_context(home.mounted(*options))
        yield mount


def live(mount: Mounted, content: Content, damager: Damager, trusts_disk: bool) -> None:
    """Reads until the daemon is killed or all was checked. Damages the cache unless the disk is trusted."""
    dice = damager.dice
    readers = Readers(mount, content, dice)
    with readers.reading():
        ends = time.monotonic() + dice.random() * 0.8
        while time.monotonic() < ends:
            time.sleep(0.1)
            if not trusts_disk:
                damager.damage(top=False)
        if dice.random() < 0.8:
            readers.killed.set()
            os.kill(mount.pid, signal.SIGKILL)
        else:
            check_all(mount, content)
    assert not readers.wrong, (readers.wrong, damager.done)


def check_all(mount: Mounted, content: Content) -> None:
    for name, right in content.files.items():
        assert (mount.path / content.root / name).read_bytes() == right, name


def check_budget(mount: Mounted) -> None:
    """Checks the budget. Only for a daemon during whose run no file is made longer."""
    assert client.call(mount.control, "status")["cache"]["used"] <= BUDGET * MIB
    # the last leaves are written after they were given, and evict others while these are counted
    wait_until(lambda: used(mount.home.store) <= BUDGET * MIB, "it is within the budget")


def used(folder: Path) -> int:
    """The bytes that the files in `folder` take. Counted by inode, because files are renamed meanwhile."""
    found: dict[int, int] = {}
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            info = path.lstat()
            found[info.st_ino] = info.st_blocks * 512
    return sum(found.values())
