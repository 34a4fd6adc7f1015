"""A guest can leak its input to a mount's sources by the CIDs that it asks for. The runner warns of it, or
prevents it."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounting import Home
from tests.runner.conftest import Runner, lines

pytestmark = pytest.mark.fuse

SECRET = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
"""The CID of a raw block that stands for the guest's input. No source has it."""


class Gateway(http.server.ThreadingHTTPServer):
    """A gateway without blocks that remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        """The paths of the requests that it may pass on to other hosts."""
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Gateway)
        if self.headers.get("Cache-Control") != "only-if-cached":
            self.server.asked.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815 # http.server looks it up by this name

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})


def warnings(data: bytes) -> list[str]:
    return [line for line in lines(data) if "this guest can tell" in line]


def test_the_runner_warns_that_a_guest_can_leak_its_input_to_a_gateway(
    run: Runner, home: Home, gateway: Gateway, habits: Path, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    options = ["--from", gateway.url, "--deadline", "2s", "--dir", f"{tmp_path / 'given'}::/data::ro"]
    guest = [habits, "ls", f"/ipfs/{SECRET}"]
    done = run(*options, *guest)
    assert [SECRET in each for each in gateway.asked].count(True)
    (warning,) = warnings(done.stderr)
    assert gateway.url in warning
    assert "--dir" in warning
    assert "--allow CID or --offline prevents that" in warning
    gateway.asked.clear()
    (tmp_path / "allowed").write_text("content\n")
    allowed = home.add(tmp_path / "allowed")
    for prevention in (["--offline"], ["--allow", allowed]):
        done = run(*options, *prevention, *guest)
        assert not any(SECRET in each for each in gateway.asked), (prevention, gateway.asked, done)
        assert warnings(done.stderr) == []


def test_there_is_no_warning_if_all_sources_are_files(
    run: Runner, home: Home, habits: Path, tmp_path: Path
) -> None:
    (tmp_path / "content").write_text("content\n")
    home.run("export", home.add(tmp_path / "content"), tmp_path / "kubo")
    # `kubo` is the name of the CAR file here
    options = ["--from", tmp_path / "kubo", "--from", "library", "--env", "TOKEN=x"]
    done = run(*options, habits, "args")
    assert done.returncode == 0
    assert warnings(done.stderr) == []


def test_the_warning_names_each_input_and_needs_a_source_on_the_network(
    run: Runner, gateway: Gateway, habits: Path, tmp_path: Path
) -> None:
    network_source = ["--from", gateway.url]
    with open(os.devnull, "rb") as nothing:
        for options, named in (
            ([], None),
            (["--env", "TOKEN=x"], "--env"),
            (["--record", tmp_path / "run.json", "--env", "TOKEN=x"], "--env"),
        ):
            with run.start(*network_source, *options, habits, "args", stdin=nothing.fileno()) as process:
                _out, err = process.communicate()
            assert [named in each for each in warnings(err) if named] == ([True] if named else []), err
            assert len(warnings(err)) == (named is not None)
    assert "standard input" in warnings(run(*network_source, habits, "cat", stdin=b"secret").stderr)[0]
    assert warnings(run("--from", "library", "--env", "TOKEN=x", habits, "cat", stdin=b"secret").stderr) == []


def test_the_warning_depends_on_the_sources_of_a_live_mount(
    run: Runner, home: Home, gateway: Gateway, habits: Path
) -> None:
    with home.mounted("--from", gateway.url):
        assert len(warnings(run("--env", "TOKEN=x", habits, "args").stderr)) == 1
    with home.mounted("--from", gateway.url, "--offline"):
        assert warnings(run("--env", "TOKEN=x", habits, "args").stderr) == []
