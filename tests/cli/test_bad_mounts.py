"""Mounts that can't be made: they fail with one line that names the cause and exit code 1 or 2. They print no
traceback and leave nothing behind."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mounting import NOBODY, Home, alive, command_of, fuse_mounts, wait_until

pytestmark = pytest.mark.fuse
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make a mount namespace")


# -- mountpoints ---------------------------------------------------------------------------------------------


def test_mountpoint_missing(user: Home) -> None:
    user.refused("mount", user.folder / "none", names=user.folder / "none")


def test_mountpoint_is_a_file(user: Home) -> None:
    (user.folder / "file").touch()
    user.refused("mount", user.folder / "file", names="not a directory")


def test_mountpoint_not_empty(user: Home) -> None:
    (user.mountpoint / "x").touch()
    user.refused("mount", user.mountpoint, names="not empty")


def test_mountpoint_is_mounted_already(user: Home) -> None:
    with user.mounted():
        ran = user.run("mount", "--cache-dir", user.folder / "other", user.mountpoint, check=False)
        assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
        assert "mounted already" in ran.stderr
        assert os.listdir(user.mountpoint) == []


def test_a_new_mount_takes_the_place_of_a_dead_one(user: Home) -> None:
    with user.mounted() as first:
        os.stat(user.mountpoint)  # its attributes are cached from here on
        helper = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_helper_of(first.pid, pid)]
        for pid in [*helper, first.pid]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(first.pid), "the daemon has ended")
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.listdir(user.mountpoint)
        doctor = user.run("doctor", check=False)
        assert doctor.returncode == 1
        assert (
            f"bad  mount: {first.path} is left from a daemon that has ended: programs there" in doctor.stdout
        )
        assert f"to do: `ipfsfuse mount {first.path}` takes its place;" in doctor.stdout
        [listed] = [each for each in user.json("mounts", "--json") if each["mountpoint"] == str(first.path)]
        assert (listed["answers"], listed["since"]) == (False, None)
        ended = f"ipfsfuse: the daemon of the mount at {first.path} has ended: `ipfsfuse mount {first.path}` takes"
        assert user.run("status", "--mount", first.path, check=False).stderr.startswith(ended)
        assert user.run("status", check=False).stderr.startswith(ended)
        assert "mounted at" in user.run("logs").stdout
        second = user.json("mount", "--json", user.mountpoint)
        assert second["pid"] != first.pid
        assert os.listdir(user.mountpoint) == []
        assert f" serves {first.path}\n" in user.run("doctor").stdout
        user.run("unmount", user.mountpoint)


def _is_helper_of(daemon: int, pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(daemon)
    except OSError:
        return False


# -- the machine ---------------------------------------------------------------------------------------------


def in_namespace_after(script: str) -> tuple[str, ...]:
    """A wrapper for a command. It runs `script` and then the command, in a mount namespace of their own."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", script + ' && exec "$@"', "sh")


@as_root
def test_no_dev_fuse(user: Home) -> None:
    hidden = in_namespace_after("mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3")
    user.refused("mount", user.mountpoint, names="/dev/fuse is missing", wrapper=hidden)
    doctor = subprocess.run(
        [*hidden, sys.executable, "-m", "ipfsfuse", "doctor"], env=user.env, capture_output=True, text=True
    )
    assert doctor.returncode == 1
    assert "bad  /dev/fuse: missing\n     to do: load the kernel's module" in doctor.stdout


@as_root
def test_no_fusermount3(user: Home) -> None:
    empty = user.folder / "not-a-program"
    empty.touch(0o644)
    hidden = in_namespace_after(f"mount --bind {empty} $(readlink -f $(command -v fusermount3))")
    for folder in (user.folder, user.mountpoint):
        os.chown(folder, NOBODY, NOBODY)
    wrapper = [*hidden, *command_of(NOBODY)]
    user.refused("mount", user.mountpoint, names="install the package fuse3", wrapper=wrapper)
    command = [*wrapper, sys.executable, "-m", "ipfsfuse", "doctor"]
    doctor = subprocess.run(command, env=user.env, capture_output=True, text=True)
    assert (doctor.returncode, "install the package fuse3" in doctor.stdout) == (1, True)


def test_kubo_without_a_repository(user: Home) -> None:
    line = user.refused("mount", "--from", "kubo", user.mountpoint, names=user.env["IPFS_PATH"])
    assert "set IPFS_PATH" in line
    assert "kubo+http://" in line


# -- the cache folder ----------------------------------------------------------------------------------------


def test_a_cache_folder_that_another_daemon_holds(user: Home) -> None:
    with user.mounted() as first:
        other = user.folder / "other"
        other.mkdir()
        ran = user.run("mount", other, check=False)
        assert (ran.returncode, ran.stderr.count("\n")) == (os.EX_TEMPFAIL, 1)
        assert f"process {first.pid}, mounted at {first.path}" in ran.stderr


def test_a_cache_folder_that_others_may_write(user: Home) -> None:
    user.cache.mkdir()
    user.cache.chmod(0o777)
    user.refused("mount", user.mountpoint, names=f"chmod go-w {user.cache}")
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
    ro = in_namespace_after(f"mount -t tmpfs -o ro none {disk}")
    user.refused("mount", "--cache-dir", disk / "cache", user.mountpoint, names=disk / "cache", wrapper=ro)


@pytest.mark.parametrize("option", ["--cache-dir", "--library", "--record", "--header-file"])
def test_files_of_the_daemon_below_its_mountpoint_are_refused(user: Home, option: str) -> None:
    below = user.mountpoint / "below"
    line = user.refused("mount", option, below, user.mountpoint, names=below, code=2)
    assert "below the mountpoint" in line
    assert list(user.mountpoint.iterdir()) == []


def test_a_car_below_the_mountpoint_is_refused(user: Home) -> None:
    (user.mountpoint / "x.car").touch()
    user.refused(
        "mount", "--from", user.mountpoint / "x.car", user.mountpoint, names="below the mountpoint", code=2
    )


# -- a path that changes while it is mounted -----------------------------------------------------------------

SWAPPING = """#!/bin/sh
case "$*" in *-u*) exec {real} "$@";; esac
mv {parent} {parent}.before
{swap}
exec {real} "$@"
"""


@as_root
@pytest.mark.parametrize("swap", ["ln -s {victim} {parent}", "cp -a {parent}.before {parent}"])
def test_root_mounts_nothing_if_a_parent_folder_is_replaced_meanwhile(user: Home, swap: str) -> None:
    """fusermount3 resolves the path a second time. Here it finds another folder then."""
    parent, victim, tools = user.folder / "parent", user.folder / "victim", user.folder / "tools"
    for each in (parent / "ipfs", victim / "ipfs", tools):
        each.mkdir(parents=True)
    (victim / "ipfs" / "precious").write_text("precious")
    script = SWAPPING.format(
        real=shutil.which("fusermount3"), parent=parent, swap=swap.format(victim=victim, parent=parent)
    )
    (tools / "fusermount3").write_text(script)
    (tools / "fusermount3").chmod(0o755)
    user.env["PATH"] = f"{tools}:{os.environ['PATH']}"
    user.refused("mount", parent / "ipfs", names="was replaced while it was being mounted")
    assert fuse_mounts(user.folder) == []
    assert (victim / "ipfs" / "precious").read_text() == "precious"


@as_root
def test_root_mounts_nothing_where_anyone_may_replace_the_path(user: Home) -> None:
    parent = user.folder / "open"
    (parent / "ipfs").mkdir(parents=True)
    parent.chmod(0o777)
    user.refused("mount", parent / "ipfs", names="anyone may replace ipfs")
    parent.chmod(0o1777)
    with user.mounted(at=parent / "ipfs"):
        pass


# -- doctor reports the folders that mount refuses -----------------------------------------------------------


def test_doctor_reports_the_folders_that_a_mount_refuses(user: Home) -> None:
    """It says what to do about each folder, and changes nothing."""
    (user.store).mkdir(parents=True, mode=0o700)
    user.cache.chmod(0o700)
    (user.store / "photo").write_text("mine")
    user.library.mkdir(mode=0o700)
    (user.library / "mine.car").write_text("mine")
    line = user.refused("mount", user.mountpoint, names=f"{user.store} holds photo but no marker file format")
    done = user.run("doctor", check=False)
    assert done.returncode == 1
    assert line.strip().removeprefix("ipfsfuse: ") in done.stdout
    assert f"{user.library} holds mine.car and is not marked as a library" in done.stdout
    assert [path.name for path in user.store.iterdir()] == ["photo"]
    assert [path.name for path in user.library.iterdir()] == ["mine.car"]
