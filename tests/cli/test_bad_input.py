"""Bad input, on the real program: one line that names the thing, exit code 1 or 2, no traceback, nothing left behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounting import Home, alive, fuse_mounts, wait_until

pytestmark = pytest.mark.fuse
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can change what others see of the machine")


@pytest.fixture
def user(tmp_path: Path) -> Home:
    return Home(tmp_path)


def refused(user: Home, *arguments: str | Path, names: str | Path, code: int = 1, wrapper: tuple[str, ...] = ()) -> str:
    """Runs `ipfsfuse ARGUMENTS`, which must say why not in one line that holds `names`; that line."""
    command = [*wrapper, sys.executable, "-m", "ipfsfuse", *map(str, arguments)]
    ran = subprocess.run(command, env=user.env, capture_output=True, text=True, timeout=60)
    assert ran.stderr.startswith("ipfsfuse: "), ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "Traceback" not in ran.stderr
    assert str(names) in ran.stderr
    assert ran.returncode == code
    assert not fuse_mounts(user.folder)
    return ran.stderr


# -- mountpoints -------------------------------------------------------------------------------------------------


def test_mountpoint_missing(user: Home) -> None:
    refused(user, "mount", user.folder / "none", names=user.folder / "none")


def test_mountpoint_is_a_file(user: Home) -> None:
    (user.folder / "file").touch()
    refused(user, "mount", user.folder / "file", names="not a directory")


def test_mountpoint_not_empty(user: Home) -> None:
    (user.mountpoint / "x").touch()
    refused(user, "mount", user.mountpoint, names="not empty")


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
        with pytest.raises(OSError, match="not connected"):
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
    refused(user, "mount", user.mountpoint, names="/dev/fuse is missing", wrapper=hidden)
    doctor = subprocess.run([*hidden, sys.executable, "-m", "ipfsfuse", "doctor"], env=user.env, capture_output=True, text=True)
    assert doctor.returncode == 1
    assert "bad  /dev/fuse: missing\n     to do: load the kernel's module" in doctor.stdout


@as_root
def test_no_fusermount3(user: Home) -> None:
    empty = user.folder / "not-a-program"
    empty.touch(0o644)
    hidden = machine(f"mount --bind {empty} $(readlink -f $(command -v fusermount3))")
    refused(user, "mount", user.mountpoint, names="install the package fuse3", wrapper=hidden)
    doctor = subprocess.run([*hidden, sys.executable, "-m", "ipfsfuse", "doctor"], env=user.env, capture_output=True, text=True)
    assert (doctor.returncode, "install the package fuse3" in doctor.stdout) == (1, True)


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
    refused(user, "mount", user.mountpoint, names=f"chmod 700 {user.cache}")
    assert list(user.cache.iterdir()) == []


@as_root
def test_a_cache_folder_that_others_own(user: Home) -> None:
    user.cache.mkdir(mode=0o700)
    os.chown(user.cache, 65534, 65534)
    refused(user, "mount", user.mountpoint, names=f"{user.cache} belongs to another user")
    assert list(user.cache.iterdir()) == []


def test_a_cache_folder_that_is_a_file(user: Home) -> None:
    user.cache.touch()
    refused(user, "mount", user.mountpoint, names=user.cache)


@as_root
def test_a_cache_folder_on_a_read_only_disk(user: Home) -> None:
    disk = user.folder / "disk"
    disk.mkdir()
    ro = machine(f"mount -t tmpfs -o ro none {disk}")
    refused(user, "mount", "--cache-dir", disk / "cache", user.mountpoint, names=disk / "cache", wrapper=ro)


@as_root
def test_a_cache_folder_on_a_full_disk(user: Home) -> None:
    disk = user.folder / "disk"
    disk.mkdir()
    full = machine(f"mount -t tmpfs -o size=16k none {disk} && (head -c 64k /dev/zero > {disk}/filler || true) 2>/dev/null")
    refused(user, "mount", "--cache-dir", disk / "cache", user.mountpoint, names=disk / "cache", wrapper=full)


@pytest.mark.parametrize("option", ["--cache-dir", "--library", "--record", "--header-file"])
def test_nothing_of_the_daemon_below_its_own_mount(user: Home, option: str) -> None:
    below = user.mountpoint / "below"
    line = refused(user, "mount", option, below, user.mountpoint, names=below, code=2)
    assert "below the mountpoint" in line
    assert list(user.mountpoint.iterdir()) == []


def test_a_car_below_its_own_mount(user: Home) -> None:
    (user.mountpoint / "x.car").touch()
    refused(user, "mount", "--from", user.mountpoint / "x.car", user.mountpoint, names="below the mountpoint", code=2)


# -- sources -----------------------------------------------------------------------------------------------------


CARS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _car: b"", "the file is empty"),
    "no CAR": (lambda _car: b"<html>this is not the file you want</html>" * 9, "x.car"),
    "header cut": (lambda car: car[:20], "x.car"),
    "header that lies": (lambda car: b"\xff\xff\xff\xff\x0f" + car[1:], "x.car"),
}


@pytest.fixture
def car(user: Home) -> bytes:
    source = user.folder / "source"
    source.mkdir()
    (source / "a").write_text("hello\n")
    user.run("export", user.add(source), user.folder / "good.car")
    return (user.folder / "good.car").read_bytes()


@pytest.mark.parametrize("kind", CARS)
def test_a_source_that_is_no_car(user: Home, car: bytes, kind: str) -> None:
    spoil, names = CARS[kind]
    (user.folder / "x.car").write_bytes(spoil(car))
    refused(user, "mount", "--from", user.folder / "x.car", user.mountpoint, names=names)


def test_a_source_that_is_missing(user: Home) -> None:
    refused(user, "mount", "--from", user.folder / "none.car", user.mountpoint, names=f"{user.folder / 'none.car'}: no such file", code=2)


@pytest.mark.parametrize("text", ["htps://gateway.example", "kubo+ftp://127.0.0.1", "http://"])
def test_a_source_with_a_typing_error(user: Home, text: str) -> None:
    refused(user, "mount", "--from", text, user.mountpoint, names=text.partition("//")[0], code=2)


def test_a_source_given_twice(user: Home, car: bytes) -> None:
    file = user.folder / "good.car"
    refused(user, "mount", "--from", file, "--from", file, user.mountpoint, names="given twice", code=2)


# -- add ---------------------------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_not_utf8(path: Path) -> None:
    Path(os.fsdecode(os.fsencode(path) + b"\xff")).touch()


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_not_utf8])
def test_add_of_what_can_not_be_added(user: Home, make: Callable[[Path], None]) -> None:
    folder = user.folder / "folder"
    folder.mkdir()
    (folder / "a-good-one").write_text("x")
    make(folder / "thing")
    refused(user, "add", folder, names="thing")
    assert user.json("library", "--json") == []


@pytest.mark.parametrize("path", ["none", "/dev/null"])
def test_add_of_a_single_path_that_can_not_be_added(user: Home, path: str) -> None:
    refused(user, "add", path, names=path)


def test_add_keeps_a_symlink_loop_as_it_is(user: Home) -> None:
    (user.folder / "loop").symlink_to("loop")
    assert user.run("add", user.folder / "loop").stdout.startswith("added bafy")


def test_add_of_a_tree_1000_deep(user: Home) -> None:
    top = user.folder / "deep"
    top.mkdir()
    at = os.open(top, os.O_RDONLY)
    for _ in range(1000):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    assert user.run("add", "-Q", top).stdout.startswith("bafy")
    shutil.rmtree(top) if sys.version_info >= (3, 13) else subprocess.run(["rm", "-rf", top], check=True)


# -- commands without a mount ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("status",), ("ls",), ("fsck",), ("evict", "--all"), ("pin", "bafkqaaa"), ("status", "--json")])
def test_commands_where_nothing_is_mounted(user: Home, command: tuple[str, ...]) -> None:
    refused(user, *command, names=f"no mount uses {user.cache}")


def test_export_of_what_nobody_has(user: Home) -> None:
    cid = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
    refused(user, "export", cid, user.folder / "x.car", names=cid)
    assert not list(user.folder.glob("*x.car*"))


def test_rm_of_what_is_not_there(user: Home) -> None:
    refused(user, "rm", "bafkqaaa", names="bafkqaaa is no root of the library")
