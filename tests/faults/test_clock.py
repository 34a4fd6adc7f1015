"""A mount while the wall clock of its machine is set."""

import errno
import subprocess
import sys
import time
from datetime import datetime

import pytest

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import Home, wait_until

SET_CLOCK = """
import os, sys, time
real = time.time
def settable():
    try:
        with open("clock-set-by") as file:
            return real() + float(file.read() or 0)
    except FileNotFoundError:
        return real()
time.time = settable
from ipfsfuse.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
YEAR = 365 * 86400


@pytest.mark.parametrize("years", [-20, 20])
def test_setting_the_wall_clock_changes_no_deadline_and_needs_no_remount(home: Home, years: int) -> None:
    dag = Dag()
    stalled, first, second = dag.block(b"stalled\n"), dag.block(b"1" * 100_000), dag.block(b"2" * 100_000)
    log = home.folder / "log"
    with Gateway(dag.blocks).serving() as gateway, log.open("w") as out:
        gateway.stalled.add(cids.text(stalled))
        command = [
            "mount",
            "--foreground",
            "--json",
            "--from",
            gateway.url,
            "--deadline",
            "2s",
            "--unconfined",
            str(home.mountpoint),
        ]
        with subprocess.Popen(
            [sys.executable, "-c", SET_CLOCK, *command], env=home.env, cwd=home.folder, stdout=out, stderr=out
        ) as daemon:
            try:
                wait_until(
                    lambda: '"mountpoint"' in log.read_text() or daemon.poll() is not None, "it is mounted"
                )
                assert len((home.mountpoint / cids.text(first)).read_bytes()) == 100_000
                with subprocess.Popen(
                    ["cat", home.mountpoint / cids.text(stalled)], stderr=subprocess.DEVNULL
                ) as cat:
                    began = time.monotonic()
                    time.sleep(0.5)
                    (home.folder / "clock-set-by").write_text(str(years * YEAR))
                    assert cat.wait(20) == 1
                    assert 1.9 < time.monotonic() - began < 3.5
                with pytest.raises(TimeoutError) as remembered:
                    (home.mountpoint / cids.text(stalled)).read_bytes()
                assert remembered.value.errno == errno.ETIMEDOUT
                assert len((home.mountpoint / cids.text(second)).read_bytes()) == 100_000
                status = home.json("status", "--json")
                assert 0 < status["uptime"] < 60
                used = [
                    datetime.fromisoformat(entry["last_used"]).timestamp()
                    for entry in home.json("ls", "--json")["entries"]
                ]
                assert len(used) == 2
                assert all(abs(time.time() + years * YEAR - each) < 60 for each in used)
            finally:
                daemon.terminate()
        assert daemon.returncode == 0, log.read_text()
