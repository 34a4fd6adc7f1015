"""The control socket: the server and the client, over a real socket."""

import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from ipfsfuse import client, errors
from ipfsfuse.control import MAX_LINE, server


async def echo(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
    for done in range(3):
        await progress({"done": done, "total": 3})
    return {"got": arguments}


async def refuse(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
    raise errors.NotAllowed("not this one")


async def refuse_in_nursery(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse, arguments, progress)
    return {}


async def break_down(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
    raise ZeroDivisionError("unexpected")


async def long(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
    return {"entries": ["x" * 250] * 40_000}


COMMANDS: dict[str, server.Handler] = {
    "long": long,
    "echo": echo,
    "refuse": refuse,
    "refuse_in_nursery": refuse_in_nursery,
    "break_down": break_down,
}


class Running:
    """A control server on an event loop of its own, in a thread."""

    def __init__(self, path: Path, commands: Mapping[str, server.Handler]) -> None:
        self.path = path
        self.server = server.ControlServer(commands)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._main))
        self._thread.start()
        assert self._ready.wait(30)

    async def _main(self) -> None:
        self._token, self._scope = trio.lowlevel.current_trio_token(), trio.CancelScope()
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.server.serve, self.path)
                self._ready.set()

    def on_loop(self, function: Callable[..., Any], *args: object) -> Any:
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def stop(self) -> None:
        if self._thread.is_alive():
            trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "control", COMMANDS)
    yield made
    made.stop()


def test_answer_and_progress_come_back(running: Running) -> None:
    seen: list[dict[str, Any]] = []
    assert client.call(running.path, "echo", seen.append, cid="bafy", depth=2) == {
        "got": {"cid": "bafy", "depth": 2}
    }
    assert seen == [{"done": 0, "total": 3}, {"done": 1, "total": 3}, {"done": 2, "total": 3}]


def test_several_commands_on_one_connection(running: Running) -> None:
    with client.Connection(running.path) as connection:
        assert [connection.ask("echo", n=n)["got"] for n in range(5)] == [{"n": n} for n in range(5)]


@pytest.mark.parametrize("command", ["refuse", "refuse_in_nursery"])
def test_the_client_raises_the_error_that_the_command_raised(running: Running, command: str) -> None:
    with pytest.raises(errors.NotAllowed, match=r"^not this one$"):
        client.call(running.path, command)


def test_an_answer_may_be_long(running: Running) -> None:
    assert len(client.call(running.path, "long")["entries"]) == 40_000


def test_unknown_command_is_a_usage_error(running: Running) -> None:
    with pytest.raises(errors.UsageError, match="'dance'"):
        client.call(running.path, "dance")


@pytest.mark.logs("a command of the control socket failed")
def test_an_unexpected_error_ends_only_its_own_command(running: Running) -> None:
    with pytest.raises(errors.DaemonFailed, match="ZeroDivisionError"):
        client.call(running.path, "break_down")
    assert client.call(running.path, "echo")["got"] == {}


@pytest.mark.parametrize("line", [b"", b"no json", b"[]", b'{"command": 3}', b"[" * 100_000, b"\xff\xfe"])
def test_a_line_that_is_not_a_request_is_refused(running: Running, line: bytes) -> None:
    with client.Connection(running.path) as connection, connection.socket.makefile("rb") as replies:
        connection.socket.sendall(line + b"\n")
        reply = json.loads(replies.readline())
        assert (reply["ok"], reply["kind"]) == (False, "UsageError")
        assert connection.ask("echo")["got"] == {}


def test_an_endless_line_ends_the_connection(running: Running) -> None:
    with (
        client.Connection(running.path) as connection,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        connection.socket.sendall(b"x" * 8 * MAX_LINE)
    assert client.call(running.path, "echo")["got"] == {}


def test_closing_the_connection_cancels_its_command(tmp_path: Path) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def wait(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    running = Running(tmp_path / "control", {"wait": wait})
    try:
        with client.Connection(running.path) as connection:
            connection.socket.sendall(b'{"command": "wait"}\n')
            assert started.wait(30)
            assert not cancelled.is_set()
        assert cancelled.wait(30)
    finally:
        running.stop()


def test_holders_are_counted_until_the_last_has_gone(running: Running) -> None:
    with client.Connection(running.path) as first:
        assert first.hold() == 1
        assert first.hold() == 1
        with client.Connection(running.path) as second:
            assert second.hold() == 2
            assert second.ask("echo")["got"] == {}
        assert not running.server.released.is_set()
    running.on_loop(running.server.released.wait)
    assert running.server.holders == 0


def test_only_the_owner_may_open_the_socket(running: Running) -> None:
    assert stat.S_IMODE(running.path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_other_users_are_refused_even_if_they_can_connect(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.path.chmod(0o666)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the other user may not enter the folders above
    with socket.socket(socket.AF_UNIX) as connection:
        os.seteuid(65534)
        try:
            connection.connect("control")
            reply = json.loads(connection.makefile("rb").readline())
        finally:
            os.seteuid(0)
    assert reply == {
        "ok": False,
        "error": "this mount answers user 0 and root alone, not user 65534",
        "kind": "NotAllowed",
    }


def test_the_path_of_the_socket_may_be_long(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 200) / ("e" * 200)
    folder.mkdir(parents=True)
    running = Running(folder / "control", COMMANDS)
    try:
        assert client.call(running.path, "echo")["got"] == {}
    finally:
        running.stop()


def test_a_socket_without_a_server_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(errors.DaemonFailed, match="no mount uses"):
        client.call(path, "echo")
    running = Running(path, COMMANDS)
    assert client.call(path, "echo")["got"] == {}
    running.stop()
    assert not path.exists()


def test_a_command_without_a_daemon_says_how_to_mount(tmp_path: Path) -> None:
    for path in (tmp_path / "control", tmp_path / "none" / "control"):
        with pytest.raises(errors.DaemonFailed, match=r"no mount uses .*ipfsfuse mount"):
            client.call(path, "status")


def test_a_folder_in_the_place_of_the_socket_is_refused(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()

    async def main() -> None:
        with pytest.raises(errors.StoreFailed, match="is not a socket"):
            await server.ControlServer({}).serve(tmp_path / "control")

    trio.run(main)


def test_a_mount_that_ends_during_a_command(tmp_path: Path) -> None:
    started = threading.Event()

    async def wait(arguments: server.Arguments, progress: server.SendProgress) -> Mapping[str, Any]:
        started.set()
        await trio.sleep_forever()

    running = Running(tmp_path / "control", {"wait": wait})
    stopper = threading.Thread(target=lambda: (started.wait(30), running.stop()))
    stopper.start()
    with pytest.raises(errors.DaemonFailed, match="`wait`"):
        client.call(running.path, "wait")
    stopper.join()


def test_a_mount_that_never_answers(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "control"))
        silent.listen()
        with pytest.raises(errors.DaemonFailed, match=r"did not answer `status` within 0\.1 s"):
            client.call(tmp_path / "control", "status", timeout=0.1)
