"""The holders of a mount, until it ends."""

import threading
from pathlib import Path

import pytest

from ipfsfuse import client, errors
from tests.cli.test_control import Running


def test_a_holder_that_arrives_as_the_last_one_leaves_keeps_the_mount(tmp_path: Path) -> None:
    running = Running(tmp_path / "control", {})
    with client.Connection(running.path) as first:
        first.ask("hold")
    running.on_loop(running.server.released.wait)
    waiter = threading.Thread(target=running.on_loop, args=[running.server.until_released])
    with client.Connection(running.path) as second:
        second.ask("hold")
        waiter.start()
        assert second.hold() == 1
        assert waiter.is_alive()
    waiter.join(30)
    with pytest.raises(errors.DaemonFailed, match="this mount is ending"):
        client.call(running.path, "hold")
    running.stop()
