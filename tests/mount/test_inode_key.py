"""The file `inode-key` in the cache folder: made once, and never followed, waited for or trusted where it is
not ours."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ipfsfuse.mount import inode_key

KEY = bytes(range(32))


def test_a_key_is_random_private_and_kept(tmp_path: Path) -> None:
    key = inode_key(tmp_path)
    assert len(key) == 32
    assert inode_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "inode-key").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["inode-key"]
    (tmp_path / "other").mkdir()
    assert inode_key(tmp_path / "other") != key


def planted_link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(KEY)
    path.symlink_to("elsewhere")


def with_content(content: bytes, mode: int = 0o600) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(mode)

    return make


@pytest.mark.parametrize(
    "plant",
    [
        planted_link,
        with_content(KEY, 0o644),
        with_content(KEY, 0o620),
        os.mkfifo,
        with_content(KEY[:31]),
        with_content(KEY + b"x"),
        with_content(b""),
    ],
    ids=["a link", "others may read it", "others may write it", "a pipe", "short", "long", "empty"],
)
def test_what_is_not_our_key_is_replaced(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    path = tmp_path / "inode-key"
    plant(path)
    key = inode_key(tmp_path)
    assert key[:31] != KEY[:31]
    assert stat.S_ISREG(path.lstat().st_mode)
    assert inode_key(tmp_path) == key
    if plant is planted_link:
        assert (tmp_path / "elsewhere").read_bytes() == KEY


@pytest.mark.logs("inode numbers will be others after a restart")
def test_where_it_can_not_be_written_a_mount_goes_on_with_another_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "inode-key").mkdir()
    assert len(inode_key(tmp_path)) == 32
    assert str(tmp_path / "inode-key") in caplog.records[0].getMessage()
    assert os.listdir(tmp_path) == ["inode-key"]
