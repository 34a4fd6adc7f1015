"""What a live mount does, and says, when its disk is full or read-only, or its cache folder is gone."""

import os
import random
import re
import shutil
from collections.abc import Callable

import pytest

from ipfsfuse.dag import cid as cids
from tests.cache.test_budget import own_filesystem
from tests.cache.test_trouble import read_only
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
        """Reads all of it, past the page cache, and all of it must be right."""
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


def test_a_disk_that_others_have_filled(home: Home, content: Content) -> None:
    with own_filesystem(home.cache, 3 * MIB) as folder:
        folder.chmod(0o700)
        with mounted(home, content.dag) as (_gateway, mount):
            with pytest.raises(OSError, match="No space left"):
                (folder / "of-another-program").write_bytes(bytes(4 * MIB))
            for _ in range(2):
                content.read(mount)
            full = r"\S+: (No space left on device|database or disk is full)"
            assert re.fullmatch(rf"{home.cache}({full}|: the disk is too full to cache anything: .* reserved)", trouble(mount))
            (folder / "of-another-program").unlink()
            said_no_more(lambda: content.read(mount), mount)


def test_a_disk_that_becomes_read_only_and_writable_again(home: Home, content: Content) -> None:
    with own_filesystem(home.cache, 64 * MIB) as folder:
        folder.chmod(0o700)
        with mounted(home, content.dag) as (gateway, mount):
            content.read(mount)
            home.run("evict", "--all")
            with read_only(home.cache / "files", home.cache / "packs"):
                content.read(mount)
                assert "Read-only file system" in trouble(mount)
            said_no_more(lambda: content.read(mount), mount)
            content.read(mount)
            asked = sum(gateway.asked.values())
            content.read(mount)
            assert sum(gateway.asked.values()) == asked, "it is staged again"


def said_no_more(read: Callable[[], None], mount: Mounted) -> None:
    def over() -> bool:
        read()
        return not mount.status()["cache"]["trouble"]

    wait_until(over, "the trouble is over")


def test_the_cache_folder_is_deleted(home: Home, content: Content) -> None:
    with mounted(home, content.dag) as (_gateway, mount):
        content.read(mount)
        shutil.rmtree(home.cache)
        content.read(mount)
        wait_until((home.cache / "control").exists, "the mount can be asked again")
        assert "No such file or directory" in trouble(mount)
        assert os.stat(home.cache).st_mode & 0o077 == 0
        content.read(mount)


def test_an_evicted_file_that_is_open_goes_on_reading(home: Home, content: Content) -> None:
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
