"""A guest that waits for a block that never arrives. A signal or a timeout ends it, long before the mount's
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
"""The CID of a raw block. The gateway never answers a request for it."""


@pytest.fixture
def silent_gateway() -> Iterator[socket.socket]:
    """A gateway that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    (tmp_path / "tmp").mkdir()
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "TMPDIR": str(tmp_path / "tmp")})


def mount_options(silent_gateway: socket.socket) -> list[str]:
    port = silent_gateway.getsockname()[1]
    return ["--from", f"http://127.0.0.1:{port}", "--deadline", "10m"]


def nothing_is_mounted(run: Runner) -> bool:
    return not fuse_mounts(Path(run.env["TMPDIR"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_waiting_guest(
    run: Runner, silent_gateway: socket.socket, number: signal.Signals
) -> None:
    with run.start(*mount_options(silent_gateway), DEMO / "reader-p1.wat", f"/ipfs/{NEVER}") as process:
        connection, _address = silent_gateway.accept()
        with connection:
            process.send_signal(number)
            assert process.wait(timeout=60) == -number
    wait_until(lambda: nothing_is_mounted(run), "the mount is gone")


def test_a_timeout_ends_a_waiting_guest(run: Runner, silent_gateway: socket.socket) -> None:
    with run.start(
        *mount_options(silent_gateway), "-W", "timeout=1s", DEMO / "reader-p2.wat", f"/ipfs/{NEVER}"
    ) as process:
        assert process.wait(timeout=60) == 124
    wait_until(lambda: nothing_is_mounted(run), "the mount is gone")


def test_the_runner_itself_never_waits_for_a_mount(run: Runner, home: Home, tmp_path: Path) -> None:
    """The mount's daemon is stopped. Only SIGKILL would end a process that waits for its answer."""
    (tmp_path / "source").mkdir()
    cid = home.add(tmp_path / "source")
    command = ["--dir", f"{home.mountpoint / cid}::/data::ro", DEMO / "reader-p1.wat", "/data/x"]
    with home.mounted() as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        with run.start("--mount", mount.path, *command) as process:
            try:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
                wait_until(children.read_text, "the guest's process has started")
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
            finally:
                os.kill(mount.pid, signal.SIGCONT)


def test_kill_9_of_the_runner_ends_a_waiting_guest(run: Runner, silent_gateway: socket.socket) -> None:
    with run.start(*mount_options(silent_gateway), DEMO / "reader-p1.wat", f"/ipfs/{NEVER}") as process:
        connection, _address = silent_gateway.accept()
        with connection:
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            process.wait(timeout=60)
            wait_until(lambda: nothing_is_mounted(run), "the mount is gone")
            wait_until(lambda: not alive(int(child)), "the guest is gone")
