"""What a mount does and reports if its disk is full or read-only, or its cache folder is gone."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from tests.cache.test_budget import own_filesystem
from tests.cache.test_trouble import own_mounts, read_only
from tests.dagging import Dag
from tests.faults.gateway import mounted
from tests.mounting import Home, Mounted, wait_until
from tests.network.nodes import drop_pages

MIB = 1 << 20


class Content:
    """Four files of 2 MiB and twenty small ones in one folder."""

    def __init__(self) -> None:
        self.dag, dice, entries = Dag(), random.Random(5), {}
        self.files: dict[str, bytes] = {}
        for number in range(4):
            leaves = [dice.randbytes(MIB) for _ in range(2)]
            self.files[f"large{number}"] = b"".join(leaves)
            entries[b"large%d" % number] = (self.dag.file(leaves), 2 * MIB)
        for number in range(20):
            self.files[f"small{number}"] = data = dice.randbytes(20_000)
            entries[b"small%d" % number] = (self.dag.block(data), len(data))
        self.root = cids.text(self.dag.directory(entries))

    def read(self, mount: Mounted) -> None:
        """Reads all files, not from the page cache, and checks them."""
        for name, data in self.files.items():
            drop_pages(mount.path / self.root / name)
            assert (mount.path / self.root / name).read_bytes() == data


@pytest.fixture
def content() -> Content:
    return Content()


def trouble(mount: Mounted) -> str:
    assert f"trouble: {mount.status()['cache']['trouble'] or '-'}\n" in mount.home.run("status").stdout
    return str(mount.status()["cache"]["trouble"])


def test_a_disk_that_is_smaller_than_the_budget_is_not_filled(home: Home, content: Content) -> None:
    with own_filesystem(home.cache, 5 * MIB) as folder:
        folder.chmod(0o700)
        with mounted(home, content.dag) as (_gateway, mount):
            for _ in range(2):
                content.read(mount)
            assert trouble(mount) == ""
            cache = mount.status()["cache"]
            assert cache["reserve"] == 5 * MIB // 20
            assert 2 * MIB < cache["used"] <= cache["effective_budget"] < 5 * MIB < cache["budget"]
            assert shutil.disk_usage(folder).free >= cache["reserve"] - (64 << 10)
            shown = home.run("status").stdout
            assert "  effective budget: 4." in shown
            assert "  reserve: 256.0 KiB\n" in shown


def test_reads_are_right_on_a_disk_that_other_programs_have_filled(home: Home, content: Content) -> None:
    with own_filesystem(home.cache, 3 * MIB) as folder:
        folder.chmod(0o700)
        with mounted(home, content.dag) as (_gateway, mount):
            with pytest.raises(OSError, match="No space left"):
                (folder / "of-another-program").write_bytes(bytes(4 * MIB))
            for _ in range(2):
                content.read(mount)
            full = r"\S+: (No space left on device|database or disk is full)"
            assert re.fullmatch(
                rf"{home.cache}({full}|: the disk is too full to cache anything: .* reserved)",
                trouble(mount),
            )
            (folder / "of-another-program").unlink()
            wait_until_trouble_is_over(lambda: content.read(mount), mount)


def test_a_mount_outlasts_a_disk_that_becomes_read_only_and_writable_again(
    home: Home, content: Content
) -> None:
    with own_filesystem(home.cache, 64 * MIB) as folder:
        folder.chmod(0o700)
        home.store.mkdir(0o700)
        with own_mounts(home.store) as mounts, mounted(home, content.dag) as (gateway, mount):
            content.read(mount)
            home.run("evict", "--all")
            with read_only(mounts):
                content.read(mount)
                assert "Read-only file system" in trouble(mount)
            wait_until_trouble_is_over(lambda: content.read(mount), mount)
            content.read(mount)
            asked = sum(gateway.asked.values())
            content.read(mount)
            assert sum(gateway.asked.values()) == asked, "everything is staged again"


def fill(disk: Path) -> Path:
    """Fills the disk. Returns the file that takes the space."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16) if file.tell() else bytes(4096))
    return filler


@pytest.mark.parametrize("before", ["nothing", "the folder", "a cache that was used"])
def test_a_start_on_a_full_disk_serves_uncached_and_says_so(
    home: Home, content: Content, before: str
) -> None:
    with own_filesystem(home.folder / "disk", 4 * MIB) as disk:
        options = ["--cache-dir", str(disk / "cache"), "--budget", "64MiB"]
        if before == "the folder":
            (disk / "cache").mkdir(0o700)
        if before == "a cache that was used":
            with mounted(home, content.dag, *options) as (_gateway, mount):
                (mount.path / content.root / "small1").read_bytes()
        filler = fill(disk)
        with mounted(home, content.dag, *options) as (_gateway, mount):
            content.read(mount)
            status = home.json("status", "--json", "--cache-dir", disk / "cache")
            assert re.search("No space left|disk is full|disk is too full", status["cache"]["trouble"]), (
                status["cache"]
            )
            assert (disk / "cache" / "ipfsfuse-cache" / "control").exists()
            filler.unlink()
            read_until_cached(content, mount)
        with mounted(home, content.dag, *options) as (_gateway, mount):
            assert (mount.path / content.root / "small1").read_bytes() == content.files["small1"]


def test_a_start_on_a_disk_without_free_inodes_serves_uncached(home: Home, content: Content) -> None:
    with own_filesystem(home.folder / "disk", 64 * MIB) as disk:
        subprocess.run(["mount", "-o", "remount,nr_inodes=4", str(disk)], check=True)
        fillers = []
        with contextlib.suppress(OSError):
            while True:
                fillers.append(disk / f"filler{len(fillers)}")
                fillers[-1].touch()
        with mounted(home, content.dag, "--cache-dir", str(disk / "cache")) as (_gateway, mount):
            content.read(mount)
            assert not (disk / "cache").exists()
            subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(disk)], check=True)
            wait_until((disk / "cache" / "ipfsfuse-cache" / "control").exists, "the mount can be asked")
            assert home.json("status", "--json", "--cache-dir", disk / "cache")["pid"] == mount.pid
            read_until_cached(content, mount)


def read_until_cached(content: Content, mount: Mounted) -> None:
    """Reads until the cache stages files again."""
    staging = mount.control.parent / "staging"
    wait_until(
        lambda: content.read(mount) or (staging.is_dir() and any(staging.iterdir())),
        "the cache is written again",
    )


def wait_until_trouble_is_over(read: Callable[[], None], mount: Mounted) -> None:
    def over() -> bool:
        read()
        return not mount.status()["cache"]["trouble"]

    wait_until(over, "the trouble is over")


@pytest.mark.parametrize(("deleted", "options"), [("store", ()), ("cache", ("--unconfined",))])
def test_reads_go_on_after_the_cache_folder_is_deleted(
    home: Home, content: Content, deleted: str, options: tuple[str, ...]
) -> None:
    """Only an unconfined daemon can create the folder of `--cache-dir` again."""
    with mounted(home, content.dag, *options) as (_gateway, mount):
        content.read(mount)
        shutil.rmtree(getattr(home, deleted))
        content.read(mount)
        wait_until((home.store / "control").exists, "the mount can be asked again")
        assert "No such file or directory" in trouble(mount)
        assert os.stat(home.cache).st_mode & 0o077 == 0
        content.read(mount)


@pytest.mark.parametrize("becomes", ["a file", "a link to nothing", "another cache"])
def test_reads_go_on_after_the_cache_folder_is_replaced(home: Home, content: Content, becomes: str) -> None:
    """No name in it can be looked up then (ENOTDIR, ELOOP). That does not end the mount, and the mount
    touches nothing there."""
    with mounted(home, content.dag) as (_gateway, mount):
        content.read(mount)
        home.cache.rename(home.folder / "moved")
        if becomes == "a file":
            home.cache.write_text("precious")
        elif becomes == "a link to nothing":
            home.cache.symlink_to(home.folder / "none")
        else:
            home.cache.mkdir(0o700)
            home.store.mkdir(0o700)
            (home.store / "format").write_text("ipfsfuse cache 3\n")
        for _ in range(3):
            content.read(mount)
            time.sleep(0.8)
        if becomes == "another cache":
            assert [path.name for path in home.store.iterdir()] == ["format"]
        os.unlink(home.cache) if becomes != "another cache" else shutil.rmtree(home.cache)
        (home.folder / "moved").rename(home.cache)
        wait_until(lambda: not home.run("status", check=False).returncode, "the mount can be asked again")
        assert mount.status()["pid"] == mount.pid


def test_truncating_any_file_of_the_index_does_not_end_the_mount(home: Home, content: Content) -> None:
    with mounted(home, content.dag) as (_gateway, mount):
        content.read(mount)
        assert {path.name for path in home.store.glob("index.sqlite*")} <= {
            "index.sqlite",
            "index.sqlite-wal",
        }
        for path in home.store.glob("index.sqlite*"):
            os.truncate(path, 0)
        content.read(mount)
        home.run("evict", "--all")
        content.read(mount)
        assert mount.status()["pid"] == mount.pid


def test_a_second_mount_is_refused_after_the_lock_was_deleted(home: Home, content: Content) -> None:
    with mounted(home, content.dag) as (_gateway, mount):
        (home.store / "lock").unlink()
        other = home.folder / "other"
        other.mkdir()
        done = home.run("mount", other, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (os.EX_TEMPFAIL, 1)
        assert f"process {mount.pid}, mounted at {mount.path}" in done.stderr
        content.read(mount)


def test_an_open_file_can_be_read_after_its_eviction(home: Home, content: Content) -> None:
    name, data = "large1", content.files["large1"]
    with mounted(home, content.dag) as (gateway, mount):
        path = mount.path / content.root / name
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(file.fileno(), 1000, 0) == data[:1000]
            asked = sum(gateway.asked.values())
            assert home.json("evict", "--json", os.getxattr(path, "ipfs.cid").decode())["freed"] >= MIB
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), len(data), 0) == data
            assert os.pread(file.fileno(), 1000, MIB + 5) == data[MIB + 5 : MIB + 1005]
            assert sum(gateway.asked.values()) > asked
        content.read(mount)
