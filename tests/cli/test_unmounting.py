"""`unmount` finds the processes that hold a mount by their links in /proc, and refuses other mounts."""

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipfsfuse.cli.mounting import holders
from tests.cli.conftest import Ipfsfuse

HOLDING = {
    "working directory": "import os, sys; os.chdir(sys.argv[1])",
    "open file": "import sys; held = open(sys.argv[1] + '/file')",
    "open folder": "import os, sys; held = os.open(sys.argv[1], os.O_RDONLY)",
    "mapped file": "import mmap, os, sys; fd = os.open(sys.argv[1] + '/file', os.O_RDONLY); held = "
    "mmap.mmap(fd, "
    "0, prot=1); os.closerange(3, 99)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "a folder\nof two lines"
    made.mkdir()
    (made / "file").write_bytes(b"x" * mmap.PAGESIZE)
    return made


@pytest.fixture(params=HOLDING)
def holder(request: pytest.FixtureRequest, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = HOLDING[request.param] + "; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_each_way_of_holding_is_found(holder: subprocess.Popen[bytes], folder: Path) -> None:
    found = {each.pid: each for each in holders(folder)}
    assert holder.pid in found
    assert found[holder.pid].uses.startswith(str(folder))
    assert found[holder.pid].command.startswith(sys.executable)


def test_a_process_in_a_folder_with_a_longer_name_is_not_a_holder(folder: Path, tmp_path: Path) -> None:
    longer = tmp_path / (folder.name + "er")
    longer.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        cwd=longer,
        stdin=-1,
        stdout=-1,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [each.pid for each in holders(longer)] == [process.pid]
        assert not list(holders(folder))
        process.kill()


def test_unmount_refuses_a_path_that_is_not_a_mount_of_ipfsfuse(ipfsfuse: Ipfsfuse, tmp_path: Path) -> None:
    assert ipfsfuse("unmount", tmp_path) == (1, "", f"ipfsfuse: nothing is mounted at {tmp_path}\n")
    assert ipfsfuse("unmount", tmp_path / "none") == (
        1,
        "",
        f"ipfsfuse: nothing is mounted at {tmp_path / 'none'}\n",
    )
    ran = ipfsfuse("unmount", "/proc")
    assert (ran.code, ran.err) == (
        1,
        "ipfsfuse: /proc is not a mount of ipfsfuse but of type proc: use umount\n",
    )
    assert os.path.exists("/proc/self")
