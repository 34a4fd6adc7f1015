"""Mounts of an ordinary user, isolated mounts, and mounts that end with their last holder."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse import client
from tests.mounting import (
    NOBODY,
    Home,
    alive,
    command_of,
    fuse_mounts,
    open_device,
    pass_with_open_device,
    wait_until,
)

has_mtab = pytest.mark.skipif(
    not os.path.exists("/etc/mtab"), reason="needs /etc/mtab, which fusermount3 reads for users"
)


@pytest.fixture
def users_home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    for path in (tmp_path, home.mountpoint):
        os.chown(path, NOBODY, NOBODY)
    return home


@open_device
@has_mtab
def test_an_ordinary_user_mounts_reads_and_unmounts(users_home: Home) -> None:
    home = users_home
    data = os.urandom(1 << 20) * 12 + b"tail"
    (home.folder / "data").write_bytes(data)

    def run(*arguments: str) -> str:
        command = [*command_of(NOBODY), sys.executable, "-m", "ipfsfuse", *arguments]
        done = subprocess.run(command, env=home.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    cid = run("add", "-Q", str(home.folder / "data")).strip()
    run("mount", str(home.mountpoint))
    try:
        script = (
            f"import hashlib; print(hashlib.sha256(open({str(home.mountpoint / cid)!r}, "
            "'rb').read()).hexdigest())"
        )
        read = subprocess.run(
            [*command_of(NOBODY), "/usr/bin/python3", "-c", script], capture_output=True, text=True
        )
        assert read.stdout.strip() == hashlib.sha256(data).hexdigest(), read.stderr
        with pytest.raises(PermissionError):
            os.listdir(home.mountpoint)  # without allow_other, even root may not enter
    finally:
        run("unmount", str(home.mountpoint))
    assert fuse_mounts(home.folder) == []


@open_device
@has_mtab
def test_a_mountpoint_of_another_user_is_refused(users_home: Home) -> None:
    others = users_home.folder / "others"
    others.mkdir(mode=0o755)
    users_home.refused(
        "mount",
        others,
        names=f"{others} can't be mounted: this user may not write to it",
        wrapper=command_of(NOBODY),
    )


def lets_others_in() -> bool:
    fuse_conf = Path("/etc/fuse.conf")
    return fuse_conf.exists() and "user_allow_other" in fuse_conf.read_text().splitlines()


@open_device
@has_mtab
@pytest.mark.skipif(
    lets_others_in(), reason="this machine's /etc/fuse.conf allows --allow-other to every user"
)
def test_allow_other_needs_the_administrators_permission(users_home: Home) -> None:
    home = users_home
    home.refused(
        "mount",
        "--allow-other",
        home.mountpoint,
        names="needs the line user_allow_other in /etc/fuse.conf",
        wrapper=command_of(NOBODY),
    )


@has_mtab
def test_an_ordinary_user_mounts_with_a_device_that_is_open_to_all() -> None:
    pass_with_open_device(__file__)


def test_an_isolated_mount_leaves_nothing_and_shares_nothing(home: Home, tmp_path: Path) -> None:
    (home.folder / "file").write_text("x\n")
    cid = home.add(home.folder / "file")
    with home.mounted("--isolated") as mount:
        private = mount.control.parent
        assert private.stat().st_mode & 0o777 == 0o700
        assert not home.cache.exists()
        assert (mount.path / cid).read_text() == "x\n"
        with home.mounted(at=tmp_path / "shared") as shared:
            assert shared.control.parent != private
    wait_until(lambda: not private.exists(), "its folder is gone")


def test_the_next_isolated_mount_removes_the_folder_of_a_killed_one(home: Home) -> None:
    with home.mounted("--isolated") as mount:
        left = mount.control.parent
        os.kill(mount.pid, 9)
        wait_until(lambda: not alive(mount.pid), "it was killed")
    assert left.exists()
    with home.mounted("--isolated"):
        assert not left.exists()


def test_a_mount_that_is_held_ends_with_its_last_holder(home: Home) -> None:
    started = home.json("mount", "--json", "--while-held", home.mountpoint)
    with client.Connection(Path(started["control"])) as first:
        first.ask("hold")
        with client.Connection(Path(started["control"])) as second:
            second.ask("hold")
        assert alive(started["pid"])
        assert os.listdir(home.mountpoint) == []
    wait_until(lambda: not alive(started["pid"]), "the daemon ends")
    assert fuse_mounts(home.folder) == []


def test_a_stale_mountpoint_is_freed_and_used(home: Home) -> None:
    (home.folder / "file").write_text("x\n")
    cid = home.add(home.folder / "file")
    started = home.json("mount", "--json", home.mountpoint)
    os.kill(started["pid"], 9)
    wait_until(lambda: not alive(started["pid"]), "it was killed")
    with home.mounted() as mount:
        assert (mount.path / cid).read_text() == "x\n"


def test_a_cache_folder_that_others_may_write_is_refused(home: Home) -> None:
    home.cache.mkdir(mode=0o777)
    home.cache.chmod(0o777)
    done = home.run("mount", home.mountpoint, check=False)
    assert done.returncode == 1
    assert f"{home.cache} may be written by others" in done.stderr
    assert fuse_mounts(home.folder) == []
