"""One user's home for each test, and one mounted tree that all tests of a module may read."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Home, Mounted


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def sample_tree(folder: Path) -> Path:
    """A folder with every kind of file that IPFS can hold, and a file of several leaves."""
    tree = folder / "tree"
    (tree / "dir" / "nested").mkdir(parents=True)
    (tree / "dir" / "nested" / "deep.txt").write_text("deep\n")
    (tree / "dir" / "same.txt").write_text("hello\n")
    (tree / "hello.txt").write_text("hello\n")
    (tree / "empty").touch()
    (tree / "empty-dir").mkdir()
    (tree / "big.bin").write_bytes(bytes(range(256)) * 20_000 + b"end")
    (tree / "link").symlink_to("hello.txt")
    (tree / "up").symlink_to("dir/../hello.txt")
    (tree / "outside").symlink_to("/etc/hostname")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "ünïcode ☃").write_text("snow\n")
    return tree


class Sample:
    """A mounted sample tree and the folder that it was added from."""

    def __init__(self, mount: Mounted, source: Path, cid: str) -> None:
        self.mount = mount
        self.source = source
        self.cid = cid
        self.root = mount.path / cid


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sample]:
    """Mounted with --allow-other if root runs the tests, so that other users may try too."""
    folder = tmp_path_factory.mktemp("sample")
    os.chmod(folder, 0o755)
    home = Home(folder)
    source = sample_tree(folder)
    cid = home.add(source)
    with home.mounted(*(["--allow-other"] if os.getuid() == 0 else [])) as mount:
        yield Sample(mount, source, cid)
