"""`--passthrough`: the kernel itself reads staging files that were verified whole."""

import contextlib
import ctypes
import mmap
import os
import platform
import random
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse import client
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.cache.standin import flip
from tests.cache.test_budget import own_filesystem
from tests.dagging import Dag
from tests.faults.gateway import Gateway, mounted
from tests.mounting import NOBODY, Home, Mounted, command_of, wait_until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="passthrough is for root")

MIB = 1 << 20
LEAF, LEAVES = 256 << 10, 6
FILES = 20


class PassthroughFile:
    """A mount with --passthrough, and one file at its gateway that was not read yet."""

    def __init__(self, home: Home, gateway: Gateway, mount: Mounted, cid: Cid, content: bytes) -> None:
        self.home, self.gateway, self.mount, self.cid, self.content = home, gateway, mount, cid, content
        self.path = mount.path / cids.text(cid)
        self.staged = home.store / "staging" / cids.text(cid)
        self._before = self.state()["verified"]

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = client.call(self.mount.control, "status")["passthrough"]
        return state

    def read_and_verify(self) -> None:
        """Reads the file once, and waits until it is verified whole, and the next open is passed through."""
        assert self.path.read_bytes() == self.content
        self.wait_until_verified()
        # the file that was verified may have been another test's
        wait_until(self._opens_passed_through, "an open is passed through")

    def _opens_passed_through(self) -> bool:
        with self.path.open("rb"):
            return self.is_passed_through()

    def wait_until_verified(self) -> None:
        wait_until(
            lambda: (state := self.state())["verified"] > self._before and not state["waiting"],
            "it is verified",
        )

    def is_passed_through(self) -> bool:
        return bool(self.state()["open"])

    def evict(self) -> None:
        client.call(self.mount.control, "evict", cid=cids.text(self.cid))


def files_of(dag: Dag, count: int, size: int = LEAF) -> dict[Cid, bytes]:
    dice = random.Random(3)
    made = {}
    for _ in range(count):
        leaves = [dice.randbytes(size) for _ in range(LEAVES)]
        made[dag.file(leaves)] = b"".join(leaves)
    return made


@pytest.fixture(scope="module", autouse=True)
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the kernel takes backing files. It refuses backing files on an overlay, where the
    folders of a container often lie; then the folder is a tmpfs."""
    if tuple(map(int, platform.release().split(".")[:2])) < (6, 9):
        pytest.skip("passthrough needs Linux 6.9 or newer")
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip() == "overlayfs":
        with own_filesystem(folder / "tmpfs", 1 << 30) as mounted_there:
            yield mounted_there
    else:
        yield folder


@pytest.fixture
def tmp_path(disk: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="test-", dir=disk))


@pytest.fixture(scope="module")
def unread_files(disk: Path) -> Iterator[Iterator[PassthroughFile]]:
    """The files of one mount. Each is given once."""
    dag = Dag()
    home = Home(disk / "passthrough")
    made = files_of(dag, FILES)
    with mounted(home, dag, "--passthrough") as (gateway, mount):
        yield (PassthroughFile(home, gateway, mount, cid, content) for cid, content in made.items())


@pytest.fixture
def target(unread_files: Iterator[PassthroughFile]) -> PassthroughFile:
    return next(unread_files)


def test_the_kernel_reads_a_file_that_was_verified_whole(target: PassthroughFile) -> None:
    """With read, pread, mmap, sendfile and copy, after a fork, and with several opens at a time."""
    target.read_and_verify()
    asked = sum(target.gateway.asked.values())
    with target.path.open("rb") as file, target.path.open("rb") as other:
        assert target.state()["open"] == 1
        assert "disk is trusted" in target.state()["trust"]
        assert file.read() == other.read() == target.content
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == target.content
        copy = target.home.folder / "copy"
        with copy.open("wb") as out:
            at = 0
            while at < len(target.content):
                at += os.sendfile(out.fileno(), file.fileno(), at, len(target.content))
        assert copy.read_bytes() == target.content
        shutil.copyfile(target.path, copy)
        assert copy.read_bytes() == target.content
        child = os.fork()
        if not child:
            os._exit(
                os.pread(file.fileno(), 100, 5 * LEAF - 50) != target.content[5 * LEAF - 50 : 5 * LEAF + 50]
            )
        assert os.waitpid(child, 0)[1] == 0
        assert target.is_passed_through()
    wait_until(lambda: not target.is_passed_through(), "it is closed")
    assert sum(target.gateway.asked.values()) == asked


def test_an_inode_that_is_open_through_the_daemon_stays_so_until_its_last_release(
    target: PassthroughFile,
) -> None:
    """An open that the kernel passes through would fail with EIO meanwhile."""
    with target.path.open("rb") as first:
        assert first.read() == target.content
        target.wait_until_verified()
        with target.path.open("rb") as second:
            assert second.read() == target.content
            assert not target.is_passed_through()
        with target.path.open("rb") as third:
            assert not target.is_passed_through()
            first.close()
            assert third.read() == target.content
    with target.path.open("rb") as fourth:
        assert target.is_passed_through()
        assert fourth.read() == target.content


@contextlib.contextmanager
def many_readers(target: PassthroughFile) -> Iterator[None]:
    """Threads that open, read and close the file again and again. Each does so 60 times at least."""
    failed: list[BaseException] = []
    enough = threading.Event()

    def work(seed: int) -> None:
        dice, times = random.Random(seed), 0
        try:
            while times < 60 or not enough.is_set():
                times += 1
                with target.path.open("rb") as file:
                    at = dice.randrange(len(target.content) - 5000)
                    assert os.pread(file.fileno(), 5000, at) == target.content[at : at + 5000]
                    if dice.random() < 0.2:
                        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                            assert mapped[at : at + 5000] == target.content[at : at + 5000]
        except BaseException as exc:
            failed.append(exc)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for each in workers:
        each.start()
    try:
        yield
    finally:
        enough.set()
        for each in workers:
            each.join()
    assert failed == []
    wait_until(lambda: not target.is_passed_through(), "all are closed")


def test_many_threads_open_and_close_a_verified_file(target: PassthroughFile) -> None:
    target.read_and_verify()
    with many_readers(target):
        pass


def test_many_threads_open_and_close_a_file_while_it_is_fetched_and_verified(target: PassthroughFile) -> None:
    with many_readers(target):
        target.wait_until_verified()
    with target.path.open("rb") as file:
        assert target.is_passed_through()
        assert file.read() == target.content


@pytest.mark.parametrize("how", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
def test_a_backing_file_cannot_be_opened_for_writing(target: PassthroughFile, how: int) -> None:
    target.read_and_verify()
    with target.path.open("rb"):
        assert target.is_passed_through()
        with pytest.raises(PermissionError):
            os.open(target.path, how)
    with pytest.raises(PermissionError):
        os.open(target.path, how)
    assert target.staged.read_bytes() == target.content


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_staging_file_is_verified_again(target: PassthroughFile, when: str) -> None:
    """A flip before the verification makes it fail. A later flip changes the file's times."""
    if when == "after":
        target.read_and_verify()
    else:
        assert target.path.read_bytes() == target.content
        wait_until(target.staged.exists, "it is staged")
    for leaf in range(3):
        flip(target.staged, leaf * LEAF + 77)
        with target.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == target.content
    assert target.path.read_bytes() == target.content
    target.wait_until_verified()
    with target.path.open("rb") as file:
        assert target.is_passed_through()
        assert file.read() == target.content


def test_a_file_that_is_mapped_for_writing_is_read_through_the_daemon(target: PassthroughFile) -> None:
    """A store through a mapping changes no file time if the page is dirty already."""
    target.read_and_verify()
    with target.staged.open("r+b") as writer, mmap.mmap(writer.fileno(), 0) as mapped:
        writer.close()
        with target.path.open("rb") as file:
            assert not target.is_passed_through()
            mapped[77] ^= 1
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == target.content
    assert target.path.read_bytes() == target.content
    target.wait_until_verified()  # the next test counts the files that are verified


def test_an_evicted_file_is_read_to_its_end_and_counts_until_then(target: PassthroughFile) -> None:
    target.read_and_verify()
    used = client.call(target.mount.control, "status")["cache"]["used"]
    with target.path.open("rb") as file:
        assert target.is_passed_through()
        target.evict()
        assert not target.staged.exists()
        assert target.state()["lingering"] >= len(target.content)
        assert client.call(target.mount.control, "status")["cache"]["used"] >= used - LEAF
        assert file.read() == target.content
    assert target.path.read_bytes() == target.content, "it is fetched again"
    wait_until(lambda: not target.state()["lingering"], "its space is free")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@contextlib.contextmanager
def mapped_alone(path: Path, size: int) -> Iterator[int]:
    """The address of a mapping of a file that is closed (Python's mmap would keep it open)."""
    with path.open("rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    try:
        yield address
    finally:
        _libc.munmap(address, size)


def is_intact(address: int, content: bytes) -> bool:
    """Whether `content` is mapped at `address`. A child looks, because a hole would end it by SIGBUS."""
    child = os.fork()
    if not child:
        os._exit(ctypes.string_at(address, len(content)) != content)
    return os.waitpid(child, 0)[1] == 0


def test_a_mapping_outlives_the_last_release_and_is_never_cut_short(target: PassthroughFile) -> None:
    """The kernel maps the backing file itself, and no RELEASE shows when that ends."""
    target.read_and_verify()
    with mapped_alone(target.path, len(target.content)) as address:
        wait_until(lambda: target.state()["mapped"] and not target.state()["open"], "it is closed")
        with target.path.open("rb") as file:
            assert target.is_passed_through(), "it may be opened again"
            assert file.read() == target.content
        wait_until(lambda: not target.state()["open"], "it is closed again")
        target.evict()
        assert target.state()["lingering"] >= len(target.content)
        assert is_intact(address, target.content)
    wait_until(lambda: not target.state()["lingering"] and not target.state()["mapped"], "its space is free")


def bytes_on_disk(folder: Path) -> int:
    """The bytes that the files in `folder` take. A file that is renamed meanwhile may be left out."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_blocks * 512 if file.is_file() else 0
    return total


def test_an_open_file_is_not_evicted_for_room_and_the_budget_holds(home: Home) -> None:
    budget = 20 * MIB
    dag = Dag()
    made = files_of(dag, 5, MIB)
    with mounted(home, dag, "--passthrough", "--budget", "20MiB", "--reserve", "0") as (gateway, mount):
        first, *others = [
            PassthroughFile(home, gateway, mount, cid, content) for cid, content in made.items()
        ]
        first.read_and_verify()
        with first.path.open("rb") as file:
            assert first.is_passed_through()
            for other in others:
                assert other.path.read_bytes() == other.content
                assert bytes_on_disk(home.store) <= budget
            assert first.staged.exists()
            assert file.read() == first.content
            wait_until(lambda: first.state()["verified"] > 1, "another one is verified")
            with others[-1].path.open("rb") as more:
                assert first.state()["open"] == 1, "no more than half of the budget is held"
                assert more.read() == others[-1].content


def test_readers_of_a_mount_that_was_killed_are_not_cut_short(home: Home) -> None:
    dag = Dag()
    [(cid, content)] = files_of(dag, 1).items()
    with mounted(home, dag, "--passthrough") as (gateway, mount):
        one = PassthroughFile(home, gateway, mount, cid, content)
        one.read_and_verify()
        file = one.path.open("rb")
        with mapped_alone(one.path, len(content)) as address:
            os.kill(mount.pid, signal.SIGKILL)
            wait_until(lambda: not os.path.ismount(mount.path), "it is unmounted")
            with mounted(home, dag) as (_gateway, next_mount):
                client.call(next_mount.control, "evict", cid=cids.text(cid))
                assert not one.staged.exists()
                assert is_intact(address, content)
                assert file.read() == content
        file.close()


def test_an_overlay_on_the_mount_shows_the_same_bytes(target: PassthroughFile) -> None:
    target.read_and_verify()
    upper = target.home.folder / "overlay"
    upper.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", upper], check=True)
    try:
        for name in ("upper", "work", "merged"):
            (upper / name).mkdir()
        options = f"lowerdir={target.mount.path},upperdir={upper}/upper,workdir={upper}/work"
        made = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, upper / "merged"], capture_output=True
        )
        if made.returncode:
            pytest.skip(f"no overlay on a mount here: {made.stderr.decode()}")
        try:
            with (upper / "merged" / cids.text(target.cid)).open("rb") as file:
                assert target.is_passed_through()
                assert file.read() == target.content
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                    assert mapped[:] == target.content
        finally:
            subprocess.run(["umount", upper / "merged"], check=True)
    finally:
        subprocess.run(["umount", upper], check=True)


def test_a_cache_folder_on_an_overlay_is_refused(home: Home) -> None:
    folder = home.folder / "on-overlay"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        for name in ("lower", "upper", "work", "merged"):
            (folder / name).mkdir()
        options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, folder / "merged"], check=True)
        try:
            cache = folder / "merged" / "cache"
            home.refused(
                "mount", "--passthrough", "--cache-dir", cache, home.mountpoint, names="on a local disk"
            )
        finally:
            subprocess.run(["umount", folder / "merged"], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_root_without_the_capability_is_refused(home: Home) -> None:
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    home.refused("mount", "--passthrough", home.mountpoint, names="root (CAP_SYS_ADMIN)", wrapper=drop)


def test_an_ordinary_user_is_refused(home: Home) -> None:
    for path in (home.folder, home.mountpoint, home.runtime):
        os.chown(path, NOBODY, NOBODY)
    home.folder.parent.chmod(0o755)
    home.refused("mount", "--passthrough", home.mountpoint, names="root", wrapper=command_of(NOBODY))


def test_passthrough_with_record_is_refused(home: Home) -> None:
    record = home.folder / "record"
    home.refused("mount", "--passthrough", "--record", record, home.mountpoint, names="--record", code=2)


def test_content_that_is_read_in_place_is_read_through_the_daemon(home: Home) -> None:
    (home.folder / "large").write_bytes(content := random.Random(1).randbytes(5 * LEAF))
    cid = home.add(home.folder / "large")
    with home.mounted("--passthrough", "--from", "library") as mount:
        for _ in range(2):
            with (mount.path / cid).open("rb") as file:
                assert file.read() == content
                assert not mount.status()["passthrough"]["open"]
