"""Attributes, access, xattrs and statfs as users and their tools see them."""

import errno
import os
import stat
import subprocess

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.unixfs import Type, UnixFS
from tests.dagging import Dag
from tests.faults.gateway import mounted
from tests.mount.conftest import Sample
from tests.mount.test_writes import call
from tests.mounting import Home, wait_until

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "answer"),
    {
        "lookup-absent": "ENOENT",
        "lookup-no-cid": "ENOENT",
        "lookup-wrong-digit": "ENOENT",
        "name-256": "ENAMETOOLONG",
        "name-256-root": "ENAMETOOLONG",
        "read-directory": "EISDIR",
        "readlink-file": "EINVAL",
        "getxattr-absent": "ENODATA",
        "getxattr-acl": "ENOTSUP",
        "access-w": "EACCES",
        "access-w-dir": "EACCES",
        "access-r": "ok",
        "access-x": "EACCES",
        "flock": "ok",
        "fsync": "ok",
        "open-rdonly": "ok",
    }.items(),
)
def test_read_only_calls_give_the_expected_answers(sample: Sample, name: str, answer: str) -> None:
    assert call(name, sample.root) == answer


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["stat", "read", "list"])
def test_with_allow_other_another_user_reads(sample: Sample, name: str) -> None:
    assert call(name, sample.root, 65534) == "ok"


def test_default_modes_are_0444_and_0555_and_the_default_time_is_0(sample: Sample) -> None:
    file, folder, link = (os.lstat(sample.root / name) for name in ("hello.txt", "dir", "link"))
    assert [stat.filemode(s.st_mode) for s in (file, folder, link)] == [
        "-r--r--r--",
        "dr-xr-xr-x",
        "lrwxrwxrwx",
    ]
    for shown in (file, folder, link):
        assert shown.st_mtime == shown.st_ctime == shown.st_atime == 0
        assert (shown.st_nlink, shown.st_uid, shown.st_gid) == (1, os.getuid(), os.getgid())
        assert shown.st_blksize == 1 << 20


def test_stored_modes_and_times_are_shown(home: Home) -> None:
    file = home.folder / "tool"
    file.write_text("#!/bin/sh\necho ran\n")
    file.chmod(0o7751)
    os.utime(file, ns=(1, 1_600_000_000_123_456_789))
    cid = home.add("--preserve-mode", "--preserve-mtime", file)
    with home.mounted() as mount:
        shown = os.stat(mount.path / cid)
        assert stat.S_IMODE(shown.st_mode) == 0o7751
        assert shown.st_mtime_ns == shown.st_ctime_ns == shown.st_atime_ns == 1_600_000_000_123_456_789
        assert (
            subprocess.run([mount.path / cid], capture_output=True, text=True, check=True).stdout == "ran\n"
        )


def test_times_that_the_kernel_cannot_hold_are_shown_as_the_nearest_one(home: Home) -> None:
    dag = Dag()
    seconds = {
        "0001": -62_135_596_800,
        "1677": -9_223_372_036,
        "2262": 9_223_372_036,
        "9999": 253_402_300_799,
    }
    files = {
        year.encode(): (dag.node([], UnixFS(type=Type.FILE, data=b"x", filesize=1, mtime=stored * 10**9)), 1)
        for year, stored in seconds.items()
    }
    root = cids.text(dag.directory(files))
    with home.mounted("--from", dag.car(home.folder / "content.car")) as mount:
        shown = {year: os.stat(mount.path / root / year).st_mtime_ns for year in seconds}
        assert shown == {
            "0001": -(1 << 63),
            "1677": -9_223_372_036 * 10**9,
            "2262": 9_223_372_036 * 10**9,
            "9999": (1 << 63) - 1,
        }
        assert (
            len(
                subprocess.run(
                    ["ls", "-l", mount.path / root], capture_output=True, check=True
                ).stdout.splitlines()
            )
            == 5
        )


def test_st_blocks_follows_from_the_size_so_that_tar_and_du_see_no_holes(sample: Sample) -> None:
    big = os.stat(sample.root / "big.bin")
    assert big.st_blocks == -(-big.st_size // 512)
    archived = subprocess.run(
        ["tar", "-S", "-cf", "-", "-C", sample.root, "big.bin"], capture_output=True, check=True
    ).stdout
    original = subprocess.run(
        ["tar", "-S", "-cf", "-", "-C", sample.source, "big.bin"], capture_output=True, check=True
    ).stdout
    assert len(archived) == len(original)
    assert (
        int(
            subprocess.run(
                ["du", "-B1", sample.root / "big.bin"], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
        >= big.st_size
    )


def test_statfs_shows_the_budget_and_the_staged_bytes(home: Home) -> None:
    dag = Dag()
    cid = dag.file([bytes([number]) * MIB for number in range(8)])
    with mounted(home, dag, "--budget", "64MiB") as (_, mount):
        before = os.statvfs(mount.path)
        assert before.f_blocks * before.f_frsize == 64 * MIB
        assert before.f_namemax == 255
        assert (before.f_blocks - before.f_bfree) * before.f_frsize < 8 * MIB
        (mount.path / cids.text(cid)).read_bytes()
        wait_until((home.store / "staging" / cids.text(cid)).exists, "it is staged")
        shown = os.statvfs(mount.path)
        assert shown.f_bavail == shown.f_bfree
        assert 8 * MIB <= (before.f_bfree - shown.f_bfree) * shown.f_frsize < 9 * MIB
        assert b"ipfsfuse" in subprocess.run(["df", mount.path], capture_output=True, check=True).stdout


def test_test_w_says_no_even_to_root(sample: Sample) -> None:
    assert subprocess.run(["sh", "-c", f"test -w '{sample.root}/hello.txt'"]).returncode == 1


def test_every_file_directory_and_symlink_has_its_cid_in_an_xattr(sample: Sample) -> None:
    assert os.getxattr(sample.root, "ipfs.cid").decode() == sample.cid
    for name in ("hello.txt", "dir", "empty", "big.bin", "link"):
        shown = os.getxattr(sample.root / name, "ipfs.cid", follow_symlinks=False).decode()
        assert shown == sample.mount.home.add("--only-hash", sample.source / name)
    assert set(os.listxattr(sample.root / "hello.txt")) == {
        "ipfs.cid",
        "ipfsfuse.staged",
        "ipfsfuse.pinned",
        "ipfsfuse.source",
    }


def test_the_root_has_no_cid(sample: Sample) -> None:
    for name in ("ipfs.cid", "ipfsfuse.staged", "ipfsfuse.source"):
        with pytest.raises(OSError) as refused:
            os.getxattr(sample.mount.path, name)
        assert refused.value.errno == errno.ENODATA


def test_the_mount_is_nosuid_nodev_and_rw_so_that_writes_are_eperm(sample: Sample) -> None:
    with open("/proc/self/mountinfo") as table:
        (line,) = [line for line in table if line.split()[4] == str(sample.mount.path)]
    options = line.split()[5].split(",")
    assert {"rw", "nosuid", "nodev"} <= set(options)


def test_copies_by_several_tools_equal_the_original(sample: Sample, home: Home) -> None:
    for number, command in enumerate(
        ("cp -a {0}/. {1}", "rsync -a {0}/ {1}/", "tar -C {0} -cf - . | tar -C {1} -xf -")
    ):
        copy = home.folder / f"copy{number}"
        copy.mkdir()
        subprocess.run(command.format(f"'{sample.root}'", copy), shell=True, check=True, capture_output=True)
        assert (
            subprocess.run(
                ["diff", "-r", "--no-dereference", sample.source, copy], capture_output=True
            ).returncode
            == 0
        )
        subprocess.run(["chmod", "-R", "u+w", copy], check=True)


def test_git_status_works_in_a_mounted_repository(home: Home) -> None:
    repository = home.folder / "repo"
    git = [
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "safe.directory=*",
        "--no-optional-locks",
    ]
    subprocess.run([*git, "init", "-q", repository], check=True)
    (repository / "file").write_text("x\n")
    subprocess.run([*git, "-C", repository, "add", "file"], check=True)
    subprocess.run([*git, "-C", repository, "commit", "-qm", "first"], check=True)
    cid = home.add("-H", "--preserve-mode", "--preserve-mtime", repository)
    with home.mounted() as mount:
        done = subprocess.run(
            [*git, "-C", mount.path / cid, "status", "--porcelain"],
            capture_output=True,
            text=True,
            env=home.env,
        )
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
