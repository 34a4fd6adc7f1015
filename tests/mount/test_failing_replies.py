"""Replies of a real daemon that can't be written to the device: no caller waits for ever, and each gets the
right bytes."""

import errno
import os
from pathlib import Path

import pytest

from tests.counting import counted
from tests.fuse.failing_writev import build
from tests.mounting import Home

FILES = 12


@pytest.mark.parametrize(
    ("number", "failures", "least", "most"),
    [
        (errno.EINTR, 3, 0, 2),
        (errno.ENOMEM, 2, 0, 2),
        (errno.ENOMEM, 7, 0, FILES // 2 + 2),
        (errno.ENOMEM, 1000, FILES, FILES),
    ],
)
def test_replies_that_fail_are_tried_again_or_left_to_python(
    home: Home, tmp_path: Path, number: int, failures: int, least: int, most: int
) -> None:
    """With more than three failures in a row, only writes of the device thread fail. The thread gives up
    after seven. With exactly seven failures it leaves every other request to Python. `least` and `most`: how
    many opens Python should answer once the page cache has the files."""
    tree = home.folder / "tree"
    tree.mkdir()
    contents = {f"{place:02}": os.urandom(1000 + place) for place in range(FILES)}
    for name, content in contents.items():
        (tree / name).write_bytes(content)
    root = home.mountpoint / home.add(tree)
    home.env |= build(tmp_path, number, failures, everywhere=failures <= 3)
    with counted(home, "library") as kernel:
        for _ in range(3):
            before = kernel.now()
            assert {name: (root / name).read_bytes() for name in contents} == contents
        asked = kernel.since(before)
        assert least <= asked["open"] <= most + asked["lookup"], (
            "files that the kernel has forgotten are opened by Python"
        )
    assert "ERROR ipfsfuse" not in (home.folder / "told").read_text()
