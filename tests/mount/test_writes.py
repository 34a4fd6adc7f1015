"""Nothing can be changed: every mutating call that reaches the mount fails with EPERM, for every user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.conftest import Sample

SCRIPT = Path(__file__).with_name("syscalls.py")
NOBODY = 65534

EPERM = [
    "open-wronly",
    "open-rdwr",
    "open-append",
    "open-trunc",
    "open-rdonly-trunc",
    "open-creat-existing",
    "create",
    "create-root",
    "create-excl",
    "mkdir",
    "mkdir-root",
    "mknod",
    "mkfifo",
    "symlink",
    "link",
    "unlink",
    "unlink-symlink",
    "rmdir",
    "rmdir-root",
    "rename",
    "rename-over",
    "rename-dir",
    "chmod",
    "chmod-dir",
    "fchmod",
    "chown",
    "lchown",
    "utimensat",
    "utimensat-symlink",
    "futimens",
    "truncate",
    "truncate-same",
    "setxattr",
    "setxattr-own",
    "removexattr",
]

KERNEL_ANSWERS = {
    "rename-out": "EXDEV",
    "link-out": "EXDEV",
    "ftruncate-rdonly": "EINVAL",
    "write-rdonly": "EBADF",
    "fallocate-rdonly": "EBADF",
    "copy-file-range-rdonly": "EBADF",
    "mkdir-existing": "EEXIST",
    "symlink-existing": "EEXIST",
    "create-excl-existing": "EEXIST",
    "open-directory-wronly": "EISDIR",
    "unlink-directory": "EISDIR",
    "rmdir-file": "ENOTDIR",
    "file-as-directory": "ENOTDIR",
    "unlink-absent": "ENOENT",
    "open-tmpfile": "ENOTSUP",
    "rename-same-inode": "ok",
    "mmap-shared-write": "EACCES",
}


def call(name: str, folder: Path, user: int | None = None) -> str:
    """The answer to a call that another process makes."""
    options = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    # another user may not enter the tests' environment
    python = sys.executable if user is None else "/usr/bin/python3"
    script = SCRIPT.read_text()
    done = subprocess.run(
        [python, "-c", script, name, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fingerprint(folder: Path) -> str:
    command = f"find '{folder}' -printf '%P %y %m %s %T@ %i %l\\n' | sort; cat '{folder}/hello.txt'"
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", EPERM)
def test_every_mutating_call_is_eperm(sample: Sample, name: str) -> None:
    before = fingerprint(sample.root)
    assert call(name, sample.root) == "EPERM"
    assert fingerprint(sample.root) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", EPERM)
def test_every_mutating_call_is_eperm_for_another_user(sample: Sample, name: str) -> None:
    before = fingerprint(sample.root)
    assert call(name, sample.root, NOBODY) == "EPERM"
    assert fingerprint(sample.root) == before


@pytest.mark.parametrize("name", KERNEL_ANSWERS)
def test_calls_that_the_kernel_answers_itself_give_its_errno(sample: Sample, name: str) -> None:
    before = fingerprint(sample.root)
    assert call(name, sample.root) == KERNEL_ANSWERS[name]
    assert fingerprint(sample.root) == before


def test_the_tree_is_unchanged_after_all_these_calls(sample: Sample) -> None:
    assert (
        subprocess.run(
            ["diff", "-r", "--no-dereference", sample.source, sample.root], capture_output=True
        ).returncode
        == 0
    )
