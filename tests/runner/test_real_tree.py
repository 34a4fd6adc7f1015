"""A guest walks a real tree and hashes all of it. The hash equals the one that is computed outside."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounting import Home
from tests.realtree import copy_of_the_standard_library
from tests.runner.conftest import Runner

pytestmark = pytest.mark.fuse


def entries(top: Path) -> Iterator[bytes]:
    """The bytes that digest.c hashes for each entry below a folder, in its order."""
    for name in sorted(os.listdir(top), key=os.fsencode):
        path = top / name
        if path.is_symlink():
            yield os.fsencode(name) + b"\0symlink\0" + os.fsencode(os.readlink(path))
        elif path.is_dir():
            yield os.fsencode(name) + b"\0directory\0"
            yield from (os.fsencode(name) + b"/" + each for each in entries(path))
        else:
            yield os.fsencode(name) + b"\0file %d\0" % path.stat().st_size + path.read_bytes()


def digest(top: Path) -> tuple[str, int]:
    """The SHA-256 of a tree, and the number of its entries."""
    sha256, count = hashlib.sha256(), 0
    for entry in entries(top):
        sha256.update(entry)
        count += 1
    return sha256.hexdigest(), count


def test_a_guest_walks_the_standard_library(
    home: Home, tmp_path: Path, build_guest: Callable[[str], Path]
) -> None:
    tree = copy_of_the_standard_library(tmp_path / "python")
    (tree / "link").symlink_to("os.py")
    cid = home.add(tree)
    with home.mounted() as mount:
        run = Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")}, mount.path)
        done = run(build_guest("digest"), f"/ipfs/{cid}")
    assert done.returncode == 0, done
    sha256, count = done.stdout.split()
    assert (sha256.decode(), int(count)) == digest(tree)
    assert int(count) > 500
