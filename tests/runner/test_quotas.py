"""Quotas: how much a run may fetch from the network. Also long allow-lists."""

import base64
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ipfsfuse_run
from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults import gateway
from tests.faults.gateway import Gateway, errno_of
from tests.mounting import Home
from tests.runner.conftest import Runner, lines

pytestmark = pytest.mark.fuse

LEAF, LEAVES = 256 << 10, 12
EMPTY = '(module (func (export "_start")))'


class Served(NamedTuple):
    gateway: Gateway
    run: Runner
    path: str
    """The path of a file with LEAVES leaves, for the guest."""


@pytest.fixture
def served(home: Home, tmp_path: Path) -> Iterator[Served]:
    dag = Dag()
    file = dag.file([os.urandom(LEAF) for _ in range(LEAVES)])
    with Gateway(dag.blocks).serving() as server:
        run = Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})
        yield Served(server, run, f"/ipfs/{cids.text(file)}")


def test_a_run_fetches_no_more_than_it_may(served: Served, habits: Path) -> None:
    command = [habits, "cat", served.path]
    done = served.run("--from", served.gateway.url, "-W", "max-fetch=1MiB", *command)
    assert done.returncode == 134
    assert "had more than max-fetch=1MiB fetched" in lines(done.stderr)[-1]
    assert len(done.stdout) < 1 << 20
    sent = sum(served.gateway.asked.values())
    assert sent <= 4 + 1 + LEAVES // 2, "only answers that were under way at the bound may exceed it"
    done = served.run("--from", served.gateway.url, "-W", "max-fetch=4MiB", *command)
    assert (done.returncode, len(done.stdout)) == (0, LEAF * LEAVES)


def test_a_guest_that_tries_again_and_again_is_ended(served: Served, habits: Path) -> None:
    begun = time.monotonic()
    done = served.run(
        "--from", served.gateway.url, "-W", "max-fetch=300000,timeout=30s", habits, "insist", served.path
    )
    assert (done.returncode, time.monotonic() - begun < 29) == (134, True)
    assert lines(done.stderr)[-1] == f"ipfsfuse-run: {habits} had more than max-fetch=300000 fetched"


def test_a_guest_larger_than_the_quota_is_refused_with_the_reason(served: Served) -> None:
    done = served.run("--from", served.gateway.url, "-W", "max-fetch=1KiB", served.path)
    assert done.returncode == 125
    assert "more than max-fetch=1KiB fetched" in lines(done.stderr)[-1]


def test_max_fetch_can_not_be_combined_with_mount_or_record(served: Served, habits: Path) -> None:
    for args in (["--mount", "/tmp"], ["--record", "x.car"]):
        done = served.run(*args, "-W", "max-fetch=1MiB", habits)
        assert (done.returncode, b"max-fetch" in done.stderr) == (2, True)


def test_past_the_quota_reads_fail_at_once_with_eio(home: Home) -> None:
    dag = Dag()
    file = dag.file([os.urandom(LEAF) for _ in range(LEAVES)])
    with gateway.mounted(home, dag, "--isolated", "--max-fetch", "1MiB") as (_gateway, mount):
        # a read that waits for the deadline would give ETIMEDOUT
        assert errno_of(mount.path / cids.text(file)) == "EIO"


def test_a_hundred_thousand_cids_may_be_allowed(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = tmp_path / "guest.wat"
    guest.write_text(EMPTY)
    digests = [hashlib.sha256(b"%d" % each).digest() for each in range(100_000)]
    many = [
        "b" + base64.b32encode(b"\x01\x55\x12\x20" + each).decode().lower().rstrip("=")
        for each in digests[1:]
    ]
    few = [cids.text(cids.parse(many[0]))]
    listed = tmp_path / "allowed"
    listed.write_text("".join(f"{each}\n" for each in many))
    for name, value in {**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")}.items():
        monkeypatch.setenv(name, value)
    for allow in (few, [str(listed)], many):
        assert ipfsfuse_run.run(guest, allow=allow, offline=True).exit_code == 0
