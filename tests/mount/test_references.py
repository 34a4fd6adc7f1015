"""The kernel's references to the daemon's inodes, on real mounts: each path gives its own bytes and its own
CID, in whatever order paths are listed, dropped and listed again."""

import ctypes
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.fuse.inodes import MAX_INODES
from tests.counting import counted
from tests.dagging import Dag
from tests.fuse.forest import BAD, DIRECTORY, FILE, LINK, Expected, Forest, dagpb_file, forest, identity, v0
from tests.mounting import Home, wait_until

STEPS = int(os.environ.get("IPFSFUSE_WALK_STEPS", "120"))
DROP = Path("/proc/sys/vm/drop_caches")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can have the kernel drop its caches")
since_6_18 = pytest.mark.skipif(
    tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2]) < (6, 18),
    reason="older kernels forget only when memory is short",
)

FEW_KNOWN = """
import functools, os
import ipfsfuse.mount as mount
mount.Tree = functools.partial(mount.Tree, known=%d)
noted = os.open(%r, os.O_WRONLY | os.O_CREAT, 0o600)
class Inodes(mount.Inodes):
    def __init__(self, key):
        super().__init__(key, limit=%d)
        self.most = 0
    def refer(self, inode):
        super().refer(inode)
        self.note()
    def forget(self, number, count):
        inode = super().forget(number, count)
        self.note()
        return inode
    def note(self):
        self.most = max(self.most, len(self))
        os.pwrite(noted, b"%%8d %%8d" %% (len(self), self.most), 0)
mount.Inodes = Inodes
"""

SLOW = """
import trio
import ipfsfuse.mount as mount
class Tree(mount.Tree):
    def known(self, cid):
        return None
    async def attributes(self, cid):
        await trio.sleep(0.3)
        return await super().attributes(cid)
    async def entries(self, parent, after):
        await trio.sleep(0.3)
        return await super().entries(parent, after)
mount.Tree = Tree
"""


@contextmanager
def mounted(
    home: Home,
    dag: Dag,
    known: int = 50_000,
    roots: Sequence[Cid] = (),
    slow: str = "",
    limit: int = MAX_INODES,
) -> Iterator[Path]:
    """A mount of the blocks of `dag`. It remembers the attributes of `known` CIDs and should hold at most
    `limit` inodes. It writes into the file `held` how many it holds."""
    car = dag.car(home.folder / "content.car", roots)
    with counted(home, str(car), slow + FEW_KNOWN % (known, str(home.folder / "held"), limit)):
        yield home.mountpoint


def held(home: Home) -> tuple[int, int]:
    """The number of inodes that the daemon holds now, and the most that it has held."""
    now, most = (home.folder / "held").read_text().split() or ("2", "2")
    return int(now), int(most)


def names_by_small_buffers(folder: Path) -> Iterator[list[str]]:
    """The names in `folder` as getdents64(2) gives them, a small buffer at a time."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(1024)
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while (
            got := libc.syscall(217 if os.uname().machine == "x86_64" else 61, file, buffer, len(buffer))
        ) > 0:
            at, names = 0, []
            while at < got:
                length = int.from_bytes(buffer.raw[at + 16 : at + 18], "little")
                names.append(os.fsdecode(buffer.raw[at + 19 : at + length].split(b"\0")[0]))
                at += length
            yield names
        assert got == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(file)


def dagpb_files(dag: Dag, count: int) -> dict[bytes, tuple[Cid, int]]:
    """Small files whose attributes are only in their own blocks."""
    return {
        f"file-{number:04}".encode(): (dag.block(dagpb_file(b"%d" % number), cids.DAG_PB), 8)
        for number in range(count)
    }


# -- a listing must not take references away -----------------------------------------------------------------


def test_a_file_of_cid_version_0_can_be_read_after_the_root_was_listed(home: Home) -> None:
    dag = Dag()
    cid = v0(dag.block(dagpb_file(b"trusted\n"), cids.DAG_PB))
    name = cids.text(cid)
    assert name.startswith("Qm")
    with mounted(home, dag, roots=[cid]) as mount:
        for _ in range(3):
            assert (mount / name).read_bytes() == b"trusted\n"
            assert (
                len(
                    subprocess.run(
                        ["ls", "-l", mount], check=True, capture_output=True, text=True
                    ).stdout.splitlines()
                )
                == 2
            )


def test_a_file_that_is_opened_between_two_parts_of_a_listing_can_be_read_after_it(home: Home) -> None:
    dag = Dag()
    root = cids.text(dag.directory(dagpb_files(dag, 300)))
    with mounted(home, dag) as mount:
        parts = names_by_small_buffers(mount / root)
        names = next(parts)
        os.stat(mount / root / "file-0299")
        with (mount / root / "file-0250").open("rb") as opened:
            names += [name for part in parts for name in part]
            assert len(names) == 302
            assert opened.read() == b"250"
        assert [(mount / root / f"file-{number:04}").read_bytes() for number in (250, 299)] == [
            b"250",
            b"299",
        ]


def test_files_can_be_read_after_a_listing_by_another_path_once_attributes_are_dropped(
    home: Home,
) -> None:
    dag = Dag()
    folder = dag.directory(dagpb_files(dag, 200))
    root = cids.text(dag.directory({b"one": (folder, 1), b"two": (folder, 1)}))
    with mounted(home, dag, known=20) as mount:
        for _ in range(2):
            assert [(mount / root / "one" / f"file-{number:04}").read_bytes() for number in range(200)] == [
                b"%d" % n for n in range(200)
            ]
            assert len(os.listdir(mount / root / "two")) == 200


# -- the limit of inodes -------------------------------------------------------------------------------------


def raw_leaves(dag: Dag, count: int) -> dict[bytes, tuple[Cid, int]]:
    return {b"%05d" % number: (dag.block(b"leaf %d" % number), 9) for number in range(count)}


def test_a_listing_with_more_names_than_the_limit_of_inodes_keeps_to_the_limit(home: Home) -> None:
    """Beyond the limit a listing gives only names."""
    dag = Dag()
    root = cids.text(dag.directory(raw_leaves(dag, 4000)))
    with mounted(home, dag, limit=500) as mount, (mount / root / "00000").open("rb") as opened:
        for _ in range(2):
            assert sorted(os.listdir(mount / root)) == [f"{number:05}" for number in range(4000)]
            drop_listing(mount / root)
        assert held(home)[1] <= 501
        assert opened.read() == b"leaf 0"
        for number in (0, 1, 3998, 3999):
            path = mount / root / f"{number:05}"
            assert path.read_bytes() == b"leaf %d" % number
            assert cids.parse(os.getxattr(path, "ipfs.cid").decode()) == dag.block(b"leaf %d" % number)


def drop_listing(folder: Path) -> None:
    """Drops the listing of `folder` from the kernel's page cache."""
    file = os.open(folder, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@since_6_18
def test_looked_up_inodes_beyond_the_limit_are_forgotten_unless_in_use(home: Home) -> None:
    """The names are looked up one by one, as a guest can do with CIDs that it makes up."""
    dag = Dag()
    below = dag.directory({b"file": (dag.block(b"below"), 5)})
    root = cids.text(dag.directory({**raw_leaves(dag, 3000), b"below": (below, 5)}))
    with mounted(home, dag, limit=500) as mount, (mount / root / "00000").open("rb") as opened:
        inside = subprocess.Popen(
            ["sh", "-c", "read line; pwd -P; cat file"],
            cwd=mount / root / "below",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        number = os.stat(mount / root / "00000").st_ino
        for name in range(3000):
            os.stat(mount / root / f"{name:05}")
        assert held(home)[1] > 500
        wait_until(lambda: held(home)[0] < 500, "the kernel has forgotten inodes that are not in use")
        assert os.readlink(f"/proc/self/fd/{opened.fileno()}") == str(mount / root / "00000")
        assert opened.read() == b"leaf 0"
        assert os.stat(mount / root / "00000").st_ino == number
        assert inside.communicate(b"go\n")[0].decode() == f"{mount}/{root}/below\nbelow"
        for name in range(0, 3000, 37):
            assert (mount / root / f"{name:05}").read_bytes() == b"leaf %d" % name
    assert "forgets inode" not in (home.folder / "told").read_text()


# -- numbers can't be chosen ---------------------------------------------------------------------------------


def test_content_made_for_a_trusted_files_inode_number_does_not_take_it_over(home: Home) -> None:
    """The attacker knows the inode number of the trusted file, which stays the same over a restart. Once, an
    inode number was the last eight bytes of the CID."""
    dag = Dag()
    trusted = dag.block(dagpb_file(b"the trusted bytes\n"), cids.DAG_PB)
    with mounted(home, dag) as mount:
        number = os.stat(mount / cids.text(trusted)).st_ino
    hostile = {}
    for place, tail in enumerate(
        (number.to_bytes(8, "big"), number.to_bytes(8, "little"), cids.multihash(trusted)[-8:])
    ):
        inline = identity(cids.DAG_PB, dagpb_file(b"the attacker's bytes: " + tail))
        assert inline.endswith(tail + b"\x18\x1e")
        hostile[f"padded-{place}".encode()] = inline, 30
        hostile[f"raw-{place}".encode()] = identity(cids.RAW, b"the attacker's " + tail), 30
        hostile[f"ends-{place}".encode()] = (
            identity(cids.DAG_PB, b"\x0a\x2a\x08\x02\x12\x26" + b"the attacker's bytes".ljust(30) + tail),
            30,
        )
    root = cids.text(dag.directory(hostile))
    with mounted(home, dag) as mount:
        path = mount / cids.text(trusted)
        assert os.stat(path).st_ino == number
        with path.open("rb") as opened:
            for _ in range(3):
                subprocess.run(["ls", "-l", mount / root], check=True, capture_output=True)
                for name in hostile:
                    (mount / root / os.fsdecode(name)).read_bytes()
                    assert os.stat(mount / root / os.fsdecode(name)).st_ino != number
                assert os.stat(path).st_ino == number
                assert path.read_bytes() == opened.read() == b"the trusted bytes\n"
                assert os.getxattr(path, "ipfs.cid").decode() == path.name
                opened.seek(0)


def test_20000_cids_with_equal_last_bytes_do_not_slow_lookups(home: Home) -> None:
    """Once, all of them hashed to one number, and each lookup counted up from there. The listing took 70 s,
    and other lookups waited 44 s."""
    dag = Dag()
    tail = b"\x00" * 7 + b"\x07"
    alike = [identity(cids.RAW, number.to_bytes(8, "big") + tail) for number in range(20_000)]
    root = cids.text(dag.directory({f"{number:05}".encode(): (cid, 16) for number, cid in enumerate(alike)}))
    others = [cids.text(dag.block(b"other %d" % number)) for number in range(2000)]
    with mounted(home, dag) as mount:
        listed, waited = threading.Event(), []

        def look_up_others() -> None:
            for name in others:
                began = time.monotonic()
                os.stat(mount / name)
                waited.append(time.monotonic() - began)
                if listed.wait(0.005):
                    return

        with ThreadPoolExecutor(1) as other:
            looking = other.submit(look_up_others)
            began = time.monotonic()
            shown = subprocess.run(
                ["ls", "-l", mount / root], check=True, capture_output=True, text=True
            ).stdout
            took = time.monotonic() - began
            listed.set()
            looking.result()
        assert len(shown.splitlines()) == 20_001
        print(f"ls -l took {took:.2f} s, another lookup at most {max(waited):.2f} s")
        assert took < 30, "it takes 6 s on an idle machine"
        assert max(waited) < 5, "it takes 1 s on an idle machine"


# -- random sequences ----------------------------------------------------------------------------------------


class Walker:
    """Uses the mount at random, and checks what it gets."""

    def __init__(self, mount: Path, forest: Forest, seed: int) -> None:
        self._mount, self._forest, self._dice = mount, forest, random.Random(seed)
        self._open: list[tuple[int, Expected]] = []
        self._paths = list(forest.expected)

    def path(self, *kinds: str) -> tuple[Path, Expected]:
        path = self._dice.choice(self._forest.of_kind(*kinds) if kinds else self._paths)
        return self._mount.joinpath(*map(os.fsdecode, path)), self._forest.expected[path]

    def check(self, path: Path, expected: Expected) -> None:
        if expected.kind == BAD:
            with pytest.raises(OSError, match=path.name):
                os.stat(path)
            return
        cid = cids.parse(os.getxattr(path, "ipfs.cid", follow_symlinks=False).decode())
        assert cids.canonical(cid) == cids.canonical(expected.cid)
        if expected.kind == FILE:
            assert path.read_bytes() == expected.content
        elif expected.kind == LINK:
            assert os.fsencode(os.readlink(path)) == expected.content
        else:
            assert sorted(map(os.fsencode, os.listdir(path))) == sorted(expected.names)

    def step(self) -> None:
        match self._dice.randrange(8):
            case 0 | 1:
                self.check(*self.path())
            case 2:
                path, expected = self.path(FILE)
                self._open.append((os.open(path, os.O_RDONLY), expected))
            case 3 if self._open:
                os.close(self._open.pop(self._dice.randrange(len(self._open)))[0])
            case 4 if self._open:
                file, expected = self._dice.choice(self._open)
                if self._dice.random() < 0.5:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(file, 1 << 20, 0) == expected.content
            case 5:
                path, _expected = self.path(DIRECTORY)
                subprocess.run(
                    ["ls", "-l", path if self._dice.random() < 0.8 else self._mount], capture_output=True
                )
            case 6:
                path, expected = self.path(DIRECTORY)
                for names in names_by_small_buffers(path):
                    other, _expected = self.path(FILE, DIRECTORY)
                    os.stat(other)
                    inside = path / self._dice.choice(names)
                    if (
                        self._dice.random() < 0.3
                        and inside.name not in ("bad", "unshown")
                        and inside.is_file()
                    ):
                        inside.read_bytes()
            case 7:
                drop_caches()

    def close(self) -> None:
        for file, _expected in self._open:
            os.close(file)


def drop_caches() -> None:
    """Makes the kernel drop the dentries and inodes that are not in use."""
    DROP.write_text("2\n")


@as_root
@pytest.mark.parametrize(("crowd", "limit"), [(1, MAX_INODES), (4, MAX_INODES), (4, 15)])
def test_after_any_walk_with_dropped_caches_each_path_gives_its_own_bytes_and_cid(
    home: Home, crowd: int, limit: int
) -> None:
    """This holds also if the daemon asks the kernel all the time to forget inodes."""
    content = forest()
    with mounted(home, content.dag, known=10, roots=content.listed, limit=limit) as mount:

        def walk(seed: int) -> None:
            walker = Walker(mount, content, seed)
            try:
                for _ in range(STEPS):
                    walker.step()
            finally:
                walker.close()

        with ThreadPoolExecutor(crowd) as walkers:
            for each in [walkers.submit(walk, seed) for seed in range(crowd)]:
                each.result()
        last = Walker(mount, content, 0)
        for path, expected in content.expected.items():
            last.check(mount.joinpath(*map(os.fsdecode, path)), expected)

        wait_until_forgotten(home)


def wait_until_forgotten(home: Home) -> None:
    """Nothing is in use any more, so the daemon must let go of all inodes but the root."""

    def only_the_root_is_held() -> bool:
        drop_caches()
        return held(home)[0] == 1

    wait_until(only_the_root_is_held, "the daemon holds only the root")
    assert "forgets inode" not in (home.folder / "told").read_text()


@as_root
def test_callers_that_are_killed_while_they_wait_leave_no_reference(home: Home) -> None:
    """Some are killed before the answer, some after it."""
    dag = Dag()
    root = cids.text(dag.directory(dagpb_files(dag, 40) | {b"raw": (dag.block(b"raw"), 3)}))
    with mounted(home, dag, slow=SLOW) as mount:
        os.stat(mount / root)
        callers = [
            subprocess.Popen(["stat", mount / root / f"file-{number:04}"], stdout=subprocess.DEVNULL)
            for number in range(40)
        ]
        callers += [subprocess.Popen(["ls", mount / root], stdout=subprocess.DEVNULL) for _ in range(8)]
        for caller in random.Random(1).sample(callers, len(callers)):
            time.sleep(0.02)
            caller.kill()
        for caller in callers:
            caller.wait(60)
        assert (mount / root / "file-0007").read_bytes() == b"7"
        wait_until_forgotten(home)
