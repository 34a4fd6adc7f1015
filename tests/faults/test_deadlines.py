"""A source that never answers: deadlines, interrupts, and other callers."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import PATIENCE, Home, Mounted, fuse_mounts, wait_until

DEADLINE = 6
"""Seconds: short, but long compared with everything else here on a loaded machine."""


class Stalled(NamedTuple):
    gateway: Gateway
    home: Home
    mount: Mounted
    root: Path
    """A directory with `good`, `stalled`, and 600 more names that stall."""


@contextmanager
def stalling(home: Home, deadline: int) -> Iterator[Stalled]:
    """A mount whose requests fail after `deadline` seconds."""
    dag = Dag()
    entries = {
        b"good": (dag.block(b"good\n"), 5),
        b"other": (dag.block(b"other\n"), 6),
        b"stalled": (dag.block(b"stalled\n"), 8),
    }
    entries |= {b"s%03d" % n: (dag.block(b"s%03d" % n), 4) for n in range(600)}
    leaves = [bytes([n]) * (1 << 20) for n in range(8)]
    entries[b"long"] = (dag.file(leaves), 8 << 20)
    root = dag.directory(entries)
    gateway = Gateway(dag.blocks)
    gateway.stalled = {cids.text(cid) for name, (cid, _) in entries.items() if name.startswith(b"s")} | {
        cids.text(dag.block(leaves[5]))
    }
    with gateway.serving(), home.mounted("--from", gateway.url, "--deadline", f"{deadline}s") as mount:
        yield Stalled(gateway, home, mount, mount.path / cids.text(root))


@pytest.fixture
def stalled(home: Home) -> Iterator[Stalled]:
    with stalling(home, DEADLINE) as found:
        yield found


@pytest.fixture
def patient(home: Home) -> Iterator[Stalled]:
    """A mount whose deadline never comes, so a call ends for another reason."""
    with stalling(home, 3600) as found:
        yield found


def ask(*command: str | Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )


def spent(started: float) -> float:
    return time.monotonic() - started


def test_cat_fails_with_etimedout_at_its_deadline(home: Home) -> None:
    deadline = 20
    with stalling(home, deadline) as stalled:
        started = time.monotonic()
        done = subprocess.run(["cat", stalled.root / "stalled"], capture_output=True, text=True)
        took = spent(started)
    assert "Connection timed out" in done.stderr
    assert deadline - 0.5 < took
    assert took < 2 * deadline, "a shared machine is slow, but the call must not wait for two deadlines"


def test_a_read_of_a_stalled_leaf_fails_once_although_the_kernel_asks_twice(stalled: Stalled) -> None:
    with (stalled.root / "long").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4, 0) == b"\0\0\0\0"
        started = time.monotonic()
        with pytest.raises(OSError) as raised:
            os.pread(file.fileno(), 4, 5 << 20)
        assert raised.value.errno in (errno.ETIMEDOUT, errno.EIO)
        first = spent(started)
        with pytest.raises(OSError):
            os.pread(file.fileno(), 4, 5 << 20)
        assert spent(started) - first < DEADLINE, "the failure is remembered, so the answer comes at once"
        assert os.pread(file.fileno(), 4, 7 << 20) == b"\7\7\7\7"


def test_three_stats_of_one_name_end_together(stalled: Stalled) -> None:
    started = time.monotonic()
    all_three = [ask("stat", stalled.root / "stalled") for _ in range(3)]
    assert [process.wait(60) for process in all_three] == [1, 1, 1]
    assert spent(started) < 2.5 * DEADLINE, "they end together, not one after the other"


def test_ctrl_c_frees_a_process_that_waits_in_a_lookup(patient: Stalled) -> None:
    process = ask("stat", patient.root / "stalled")
    wait_until(
        lambda: any(patient.gateway.asked[name] for name in patient.gateway.stalled),
        "the lookup waits for its block",
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) != 0


def test_ctrl_c_frees_a_cat_that_waits_in_a_read(patient: Stalled) -> None:
    process = ask("cat", patient.root / "long")
    wait_until(
        lambda: any(patient.gateway.asked[name] for name in patient.gateway.stalled),
        "the read waits for its leaf",
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == -signal.SIGINT


def test_500_waiting_calls_do_not_delay_other_names_in_the_same_directory(patient: Stalled) -> None:
    script = (
        "import os, sys, threading\n[threading.Thread(target=os.path.exists, "
        "args=(f'{sys.argv[1]}/s{n:03}',)).start() for n in range(500)]"
    )
    waiting = ask(sys.executable, "-c", script, patient.root)
    wait_until(lambda: len(patient.gateway.asked) > 20, "many lookups wait")
    assert (patient.root / "good").read_text() == "good\n"
    assert (patient.root / "other").read_text() == "other\n"
    assert waiting.poll() is None, "the other calls still wait"
    waiting.kill()
    waiting.wait(PATIENCE)


def test_a_mount_with_stalled_calls_unmounts(patient: Stalled) -> None:
    waiting = [ask("stat", patient.root / f"s{n:03}") for n in range(10)]
    wait_until(lambda: len(patient.gateway.asked) >= 10, "the lookups wait")
    patient.home.run("unmount", "--lazy", patient.mount.path)
    assert fuse_mounts(patient.home.folder) == []
    os.kill(patient.mount.pid, signal.SIGTERM)
    assert all(process.wait(PATIENCE) for process in waiting)


def test_the_failure_of_a_block_is_forgotten_and_the_block_is_asked_for_again(stalled: Stalled) -> None:
    subprocess.run(["cat", stalled.root / "stalled"], capture_output=True)
    stalled.gateway.stalled.clear()
    wait_until(lambda: os.path.exists(stalled.root / "stalled"), "the block comes")
    assert (stalled.root / "stalled").read_text() == "stalled\n"
