"""CAR files without an index: the user sees how the index is built; damaged files are named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse.units import human
from tests.cli.conftest import on_terminal
from tests.mounting import PATIENCE, Home

pytestmark = pytest.mark.fuse

DAMAGED = "is damaged or cut short: blocks before the damage are used, the others are missing"


@pytest.fixture
def car(user: Home) -> Path:
    """A CARv1, which never has an index, of one folder."""
    source = user.folder / "source"
    source.mkdir()
    (source / "a").write_text("hello\n")
    (source / "z").write_bytes(os.urandom(700_000))
    user.run("export", user.add(source), user.folder / "good.car")
    return user.folder / "good.car"


def test_a_terminal_shows_the_index_being_built_once(user: Home, car: Path) -> None:
    size = human(car.stat().st_size)
    for expected in (True, False):
        shown = on_terminal(user, "mount", "--from", car, user.mountpoint)
        user.run("unmount", user.mountpoint)
        assert ("indexing:" in shown and "good.car" in shown) == expected, shown
        log = (user.store / "log").read_text()
        assert log.count(f"the index of good.car is built: {size} of {size}") == 1


def test_a_mount_in_the_foreground_logs_that_the_index_is_built(user: Home, car: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ipfsfuse",
        "mount",
        "--foreground",
        "--json",
        "--from",
        str(car),
        str(user.mountpoint),
    ]
    with subprocess.Popen(
        command, env=user.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout
        assert daemon.stdout.readline().startswith("{")
        daemon.terminate()
        _out, err = daemon.communicate(timeout=PATIENCE)
    assert err.count("the index of good.car is built: ") == 1


def test_a_damaged_car_is_used_up_to_the_damage_and_named_in_a_warning(user: Home, car: Path) -> None:
    cid = user.json("library", "--json")[0]["cid"]
    short = user.folder / "short.car"
    short.write_bytes(car.read_bytes()[:-100])
    with user.mounted("--from", short) as mount:
        assert (mount.path / cid / "a").read_text() == "hello\n"
        assert mount.log().count(f"WARNING ipfsfuse.sources.spec: {short} {DAMAGED}\n") == 1
    ran = user.run("export", "--from", short, cid, user.folder / "x.car", check=False)
    assert ran.returncode == 1
    warning, error = ran.stderr.splitlines()
    assert warning == f"{short} {DAMAGED}"
    assert error.endswith("is in no source and no running mount: name one that has it with --from")
