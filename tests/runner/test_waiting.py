"""A guest that waits for a block which never comes: whatever ends the run ends it, long before the mount's
deadline."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import PATIENCE, Home, alive, fuse_mounts, wait_until
from tests.runner.conftest import DEMO, Runner

pytestmark = pytest.mark.fuse

NEVER = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
"""The CID of a raw block; who is asked for it here never answers."""


@pytest.fixture
def silence() -> Iterator[socket.socket]:
    """A gateway that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    (tmp_path / "tmp").mkdir()
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "TMPDIR": str(tmp_path / "tmp")})


def waiting(silence: socket.socket) -> list[str]:
    port = silence.getsockname()[1]
    return ["--from", f"http://127.0.0.1:{port}", "--deadline", "10m"]


def nothing_is_mounted(run: Runner) -> bool:
    return not fuse_mounts(Path(run.env["TMPDIR"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(run: Runner, silence: socket.socket, number: signal.Signals) -> None:
    with run.start(*waiting(silence), DEMO / "reader-p1.wat", f"/ipfs/{NEVER}") as process:
        asked, _address = silence.accept()
        with asked:
            process.send_signal(number)
            assert process.wait(timeout=60) == -number
    wait_until(lambda: nothing_is_mounted(run), "the mount is gone")


def test_out_of_time(run: Runner, silence: socket.socket) -> None:
    with run.start(
        *waiting(silence), "-W", "timeout=1s", DEMO / "reader-p2.wat", f"/ipfs/{NEVER}"
    ) as process:
        assert process.wait(timeout=60) == 124
    wait_until(lambda: nothing_is_mounted(run), "the mount is gone")


def test_what_the_runner_does_itself_asks_a_mount_nothing(run: Runner, home: Home, tmp_path: Path) -> None:
    """The mount's daemon stands still: who asks it something can't be ended but by SIGKILL."""
    (tmp_path / "source").mkdir()
    cid = home.add(tmp_path / "source")
    command = ["--dir", f"{home.mountpoint / cid}::/data::ro", DEMO / "reader-p1.wat", "/data/x"]
    with home.mounted() as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        with run.start("--mount", mount.path, *command) as process:
            try:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                wait_until(children.read_text, "the guest has its process")
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
            finally:
                os.kill(mount.pid, signal.SIGCONT)


def test_kill_9(run: Runner, silence: socket.socket) -> None:
    with run.start(*waiting(silence), DEMO / "reader-p1.wat", f"/ipfs/{NEVER}") as process:
        asked, _address = silence.accept()
        with asked:
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            process.wait(timeout=60)
            wait_until(lambda: nothing_is_mounted(run), "the mount is gone")
            wait_until(lambda: not alive(int(child)), "the guest is gone")
