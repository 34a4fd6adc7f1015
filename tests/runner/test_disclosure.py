"""What a guest can tell a mount's sources: the runner says so, or prevents it."""

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
"""The CID of a raw block that a guest made of what it was given: nobody has it."""


class Gateway(http.server.ThreadingHTTPServer):
    """Has nothing, and remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        """Paths that it was asked for and could ask others for."""
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


def test_a_guest_tells_a_gateway_what_it_was_given_and_the_runner_says_that_it_can(
    run: Runner, home: Home, gateway: Gateway, habits: Path, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    options = ["--from", gateway.url, "--deadline", "2s", "--dir", f"{tmp_path / 'given'}::/data::ro"]
    guest = [habits, "ls", f"/ipfs/{SECRET}"]
    done = run(*options, *guest)
    assert [SECRET in each for each in gateway.asked].count(True)
    (said,) = warnings(done.stderr)
    assert gateway.url in said
    assert "--dir" in said
    assert "--allow CID or --offline prevents that" in said
    gateway.asked.clear()
    (tmp_path / "allowed").write_text("content\n")
    allowed = home.add(tmp_path / "allowed")
    for prevented in (["--offline"], ["--allow", allowed]):
        done = run(*options, *prevented, *guest)
        assert not any(SECRET in each for each in gateway.asked), (prevented, gateway.asked, done)
        assert warnings(done.stderr) == []


def test_a_run_whose_content_is_all_in_files_tells_nobody(
    run: Runner, home: Home, habits: Path, tmp_path: Path
) -> None:
    (tmp_path / "content").write_text("content\n")
    home.run("export", home.add(tmp_path / "content"), tmp_path / "kubo")
    options = ["--from", tmp_path / "kubo", "--from", "library", "--env", "TOKEN=x"]  # a CAR of that name
    done = run(*options, habits, "args")
    assert done.returncode == 0
    assert warnings(done.stderr) == []


def test_it_is_said_for_whatever_can_hold_a_secret_and_a_source_that_is_asked(
    run: Runner, gateway: Gateway, habits: Path, tmp_path: Path
) -> None:
    far = ["--from", gateway.url]
    with open(os.devnull, "rb") as nothing:
        for options, given in (
            ([], None),
            (["--env", "TOKEN=x"], "--env"),
            (["--record", tmp_path / "run.json", "--env", "TOKEN=x"], "--env"),
        ):
            with run.start(*far, *options, habits, "args", stdin=nothing.fileno()) as process:
                _out, err = process.communicate()
            assert [given in each for each in warnings(err) if given] == ([True] if given else []), err
            assert len(warnings(err)) == (given is not None)
    assert "standard input" in warnings(run(*far, habits, "cat", stdin=b"secret").stderr)[0]
    assert warnings(run("--from", "library", "--env", "TOKEN=x", habits, "cat", stdin=b"secret").stderr) == []


def test_a_mount_that_is_used_as_it_is_tells_of_its_sources(
    run: Runner, home: Home, gateway: Gateway, habits: Path
) -> None:
    with home.mounted("--from", gateway.url):
        assert len(warnings(run("--env", "TOKEN=x", habits, "args").stderr)) == 1
    with home.mounted("--from", gateway.url, "--offline"):
        assert warnings(run("--env", "TOKEN=x", habits, "args").stderr) == []
