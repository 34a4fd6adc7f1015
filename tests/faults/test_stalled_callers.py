"""On a real mount, many callers wait for blocks that no source gives, and one caller reads blocks that exist.

IPFSFUSE_STALLED is the number of waiting callers."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse.dag import cid as cids
from tests.dag.blocks import Blocks
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import NOBODY, PATIENCE, Home, command_of, wait_until

STALLED = int(os.environ.get("IPFSFUSE_STALLED", "600"))
DEADLINE = 8
"""Seconds."""
PROMPT = 0.1
"""Seconds in which a read reaches the source although a crowd waits."""
PROMPT_OF_TEN = 8
"""So many of ten reads in a row must be prompt: on a shared machine a process may pause for that long."""
READS = 400
CROWD = Path(__file__).with_name("crowd.c")


class Timed(Gateway):
    """Answers after `seconds`, and notes when each CID was first asked for."""

    seconds = 0.0

    def __init__(self, blocks: dict[bytes, bytes]) -> None:
        super().__init__(blocks)
        self.asked_at: dict[str, float] = {}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].removeprefix("/ipfs/")
        self.asked_at.setdefault(name, time.monotonic())
        if name not in self.stalled:
            time.sleep(self.seconds)
        super().answer(request)


@pytest.fixture(scope="session")
def crowd_command(tmp_path_factory: pytest.TempPathFactory) -> str:
    command = tmp_path_factory.mktemp("crowd") / "crowd"
    subprocess.run(["cc", "-O1", "-Wall", "-pthread", "-o", command, CROWD], check=True)
    command.parent.chmod(0o755)  # another user runs it
    return str(command)


@contextmanager
def crowd(command: str, folder: Path, user: int | None) -> Iterator["subprocess.Popen[str]"]:
    """Runs STALLED threads in one process. Each looks up a name in `folder` that stalls. All have begun."""
    arguments = [*(command_of(user) if user is not None else []), command, str(folder), str(STALLED)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begun\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("seconds", "user"), [(0.25, None), (0.0, NOBODY)], ids=["slow", "another user's, fast"]
)
def test_a_stalled_crowd_delays_no_read_and_each_of_its_calls_ends_at_its_deadline(
    home: Home, crowd_command: str, seconds: float, user: int | None
) -> None:
    """Another user's crowd never delays a read. The reader's own crowd delays no read once it waits."""
    if user is not None and os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    dag = Dag()
    entries = {b"s%04d" % n: (dag.block(b"s%04d" % n), 5) for n in range(STALLED)}
    stalled = {cids.text(cid) for cid, _size in entries.values()}
    good = {b"good%04d" % n: (dag.block(os.urandom(100)), 100) for n in range(READS)}
    root = dag.directory(entries | good)
    gateway = Timed(dag.blocks)
    gateway.stalled, gateway.seconds = stalled, seconds
    delays = list[float]()
    with (
        gateway.serving(),
        home.mounted("--from", gateway.url, "--deadline", f"{DEADLINE}s", "--allow-other") as mount,
    ):
        folder = mount.path / cids.text(root)
        os.stat(folder)
        with crowd(crowd_command, folder, user) as process:
            if user is None:
                wait_until(lambda: all_wait(mount.status()["sources"][0]), "they all wait")
            names = iter(good)
            while process.poll() is None and (name := next(names, None)) is not None:
                began = time.monotonic()
                assert len((folder / name.decode()).read_bytes()) == 100
                delays.append(gateway.asked_at[cids.text(good[name][0])] - began)
                if len(delays) == 10:
                    source = mount.status()["sources"][0]
                    assert source["in_flight"] <= source["most_per_caller"] < source["most_in_flight"]
                time.sleep(0.02)
            out, _err = process.communicate(timeout=PATIENCE)
    took, failed = zip(*(line.split() for line in out.splitlines()), strict=True)
    assert set(failed) == {str(errno.ETIMEDOUT)}
    assert len(took) == STALLED
    assert min(map(float, took)) > DEADLINE * 0.7, (
        "they end one after the other, a quarter of the deadline early at most"
    )
    assert max(map(float, took)) <= DEADLINE + 1
    assert len(delays) >= 10, "at least ten reads in a row are measured"
    for first in range(0, len(delays) - 9, 10):
        ten = sorted(delays[first : first + 10])
        assert ten[PROMPT_OF_TEN - 1] < PROMPT, f"from read {first} on: {ten}"


def all_wait(source: dict[str, Any]) -> bool:
    return int(source["in_flight"]) + int(source["waiting"]) >= STALLED


def test_a_call_that_waits_for_several_blocks_ends_at_its_deadline(home: Home) -> None:
    heap = Blocks()
    names = [b"name %d" % number for number in range(1000)]
    root = heap.trie(names, width=8)
    gateway = Timed(heap.by_hash)
    gateway.seconds = 2.0
    with gateway.serving(), home.mounted("--from", gateway.url, "--deadline", "3s") as mount:
        folder = mount.path / cids.text(root)
        os.stat(folder)
        asked, began = len(gateway.asked_at), time.monotonic()
        with pytest.raises(TimeoutError):
            os.stat(folder / "name 7")
        assert 2.5 < time.monotonic() - began < 5.5, "three blocks, one after the other, would take longer"
        assert 1 <= len(gateway.asked_at) - asked <= 2
        wait_until(
            lambda: os.path.exists(folder / "name 7"),
            "blocks that arrived are kept, so the next calls go on from there",
        )


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_staged_bytes_are_counted_for_the_user_who_read_them(home: Home) -> None:
    dag = Dag()
    leaves = [bytes([number]) * (1 << 20) for number in range(6)]
    entries = {name: (dag.file(leaves[at : at + 3]), 3 << 20) for name, at in ((b"roots", 0), (b"others", 3))}
    root = dag.directory(entries)
    gateway = Gateway(dag.blocks)
    with gateway.serving(), home.mounted("--from", gateway.url, "--allow-other") as mount:
        assert len((mount.path / cids.text(root) / "roots").read_bytes()) == 3 << 20
        others = str(mount.path / cids.text(root) / "others")
        subprocess.run([*command_of(NOBODY), "cat", others], check=True, stdout=subprocess.DEVNULL)
        wait_until(lambda: mount.status()["cache"]["used"] > 6 << 20, "all of it is staged")
        accounts = mount.status()["cache"]["callers"]
        assert accounts.keys() == {"0", str(NOBODY)}
        assert all(3 << 20 <= size < 4 << 20 for size in accounts.values())
