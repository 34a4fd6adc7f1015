"""Mounts that can't be: one line that names the thing, exit code 1 or 2, no traceback, nothing left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import Home, alive, wait_until

pytestmark = pytest.mark.fuse
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can change what others see of the machine")


# -- mountpoints -------------------------------------------------------------------------------------------------


def test_mountpoint_missing(user: Home) -> None:
    user.refused("mount", user.folder / "none", names=user.folder / "none")


def test_mountpoint_is_a_file(user: Home) -> None:
    (user.folder / "file").touch()
    user.refused("mount", user.folder / "file", names="not a directory")


def test_mountpoint_not_empty(user: Home) -> None:
    (user.mountpoint / "x").touch()
    user.refused("mount", user.mountpoint, names="not empty")


def test_mounted_already(user: Home) -> None:
    with user.mounted():
        ran = user.run("mount", "--cache-dir", user.folder / "other", user.mountpoint, check=False)
        assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
        assert "mounted already" in ran.stderr
        assert os.listdir(user.mountpoint) == []


def test_a_stale_mount_is_freed_and_used(user: Home) -> None:
    with user.mounted() as first:
        helper = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_helper_of(first.pid, pid)]
        for pid in [*helper, first.pid]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(first.pid), "the daemon ended")
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.listdir(user.mountpoint)
        second = user.json("mount", "--json", user.mountpoint)
        assert second["pid"] != first.pid
        assert os.listdir(user.mountpoint) == []
        user.run("unmount", user.mountpoint)


def _is_helper_of(daemon: int, pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(daemon)
    except OSError:
        return False


# -- the machine -------------------------------------------------------------------------------------------------


def machine(script: str) -> tuple[str, ...]:
    """Runs a command where `script` has changed what is mounted, for that command alone."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script + ' && exec "$@"', "sh")


@as_root
def test_no_dev_fuse(user: Home) -> None:
    hidden = machine("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3")
    user.refused("mount", user.mountpoint, names="/dev/fuse is missing", wrapper=hidden)
    doctor = subprocess.run([*hidden, sys.executable, "-m", "ipfsfuse", "doctor"], env=user.env, capture_output=True, text=True)
    assert doctor.returncode == 1
    assert "bad  /dev/fuse: missing\n     to do: load the kernel's module" in doctor.stdout


@as_root
def test_no_fusermount3(user: Home) -> None:
    empty = user.folder / "not-a-program"
    empty.touch(0o644)
    hidden = machine(f"mount --bind {empty} $(readlink -f $(command -v fusermount3))")
    user.refused("mount", user.mountpoint, names="install the package fuse3", wrapper=hidden)
    doctor = subprocess.run([*hidden, sys.executable, "-m", "ipfsfuse", "doctor"], env=user.env, capture_output=True, text=True)
    assert (doctor.returncode, "install the package fuse3" in doctor.stdout) == (1, True)


def test_kubo_without_a_repository(user: Home) -> None:
    told = user.refused("mount", "--from", "kubo", user.mountpoint, names=user.env["IPFS_PATH"])
    assert "set IPFS_PATH" in told
    assert "kubo+http://" in told


# -- the cache folder --------------------------------------------------------------------------------------------


def test_a_cache_folder_that_another_daemon_holds(user: Home) -> None:
    with user.mounted() as first:
        other = user.folder / "other"
        other.mkdir()
        ran = user.run("mount", other, check=False)
        assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
        assert f"process {first.pid}, mounted at {first.path}" in ran.stderr


def test_a_cache_folder_that_others_may_write(user: Home) -> None:
    user.cache.mkdir()
    user.cache.chmod(0o777)
    user.refused("mount", user.mountpoint, names=f"chmod 700 {user.cache}")
    assert list(user.cache.iterdir()) == []


@as_root
def test_a_cache_folder_that_others_own(user: Home) -> None:
    user.cache.mkdir(mode=0o700)
    os.chown(user.cache, 65534, 65534)
    user.refused("mount", user.mountpoint, names=f"{user.cache} belongs to another user")
    assert list(user.cache.iterdir()) == []


def test_a_cache_folder_that_is_a_file(user: Home) -> None:
    user.cache.touch()
    user.refused("mount", user.mountpoint, names=user.cache)


@as_root
def test_a_cache_folder_on_a_read_only_disk(user: Home) -> None:
    disk = user.folder / "disk"
    disk.mkdir()
    ro = machine(f"mount -t tmpfs -o ro none {disk}")
    user.refused("mount", "--cache-dir", disk / "cache", user.mountpoint, names=disk / "cache", wrapper=ro)


@as_root
def test_a_cache_folder_on_a_full_disk(user: Home) -> None:
    disk = user.folder / "disk"
    disk.mkdir()
    full = machine(f"mount -t tmpfs -o size=16k none {disk} && (head -c 64k /dev/zero > {disk}/filler || true) 2>/dev/null")
    user.refused("mount", "--cache-dir", disk / "cache", user.mountpoint, names=disk / "cache", wrapper=full)


@pytest.mark.parametrize("option", ["--cache-dir", "--library", "--record", "--header-file"])
def test_nothing_of_the_daemon_below_its_own_mount(user: Home, option: str) -> None:
    below = user.mountpoint / "below"
    line = user.refused("mount", option, below, user.mountpoint, names=below, code=2)
    assert "below the mountpoint" in line
    assert list(user.mountpoint.iterdir()) == []


def test_a_car_below_its_own_mount(user: Home) -> None:
    (user.mountpoint / "x.car").touch()
    user.refused("mount", "--from", user.mountpoint / "x.car", user.mountpoint, names="below the mountpoint", code=2)
