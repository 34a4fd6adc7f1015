"""Pins where the node restarts, is away, hangs, or has lost what it was told."""

import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pins import kubopins
from ipfsfuse.dag import cid as cids
from tests.cache.pinning import add, has, held, made_up, mounts, pinning, settled, until
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")


@pytest.mark.parametrize("crash", [False, True])
def test_the_node_restarted_in_between(own_node: Node, tmp_path: Path, crash: bool) -> None:
    node = own_node
    first, second = add(node, b"before"), add(node, b"after")

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(first)
            await settled(pins)
            await trio.to_thread.run_sync(node.kill if crash else node.stop)
            await trio.to_thread.run_sync(node.start)
            node.gc()
            assert has(node, first)
            pins.add(second)
            pins.remove(first)
            await settled(pins)
            assert held(node, mounts(node)[0]) == [cids.canonical(second)]

    trio.run(main)


@pytest.mark.logs("pins wait until the node takes them")
def test_a_node_that_is_down_at_the_start_gets_them_later(own_node: Node, tmp_path: Path) -> None:
    node, cid = own_node, add(own_node, b"patience")
    node.stop()

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(cid)
            await trio.to_thread.run_sync(until, lambda: pins.status().failing != "", "the node's absence is seen")
            assert pins.state(cid) == "queued"
            await trio.to_thread.run_sync(node.start)
            await settled(pins)
            assert (pins.state(cid), pins.status().failing) == ("cache", "")

    trio.run(main)


def test_a_node_that_hangs_delays_nobody(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            await settled(pins)
            node.pause()
            for index in range(5000):
                pins.add(made_up(index))
                pins.remove(made_up(index - 1))
            for _ in range(100):
                await trio.sleep(0.01)  # this loop goes on, while a request to the node hangs
            assert pins.state(made_up(4999)) == "queued"
            node.resume()
            await settled(pins)
            assert held(node, mounts(node)[0]) == [made_up(4999)]

    trio.run(main)


@pytest.mark.logs("pins wait until the node takes them")
def test_a_folder_that_someone_removed_is_made_again(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(made_up(1))
            pins.keep(made_up(2))
            await settled(pins)
            node.rpc("files/rm", arg="/ipfsfuse", recursive=True)
            pins.add(made_up(3))
            await settled(pins)
            (mount,) = mounts(node)
            assert sorted(held(node, mount)) == [made_up(1), made_up(3)]
            assert held(node, mount, "pinned-") == [made_up(2)]

    trio.run(main)


@contextmanager
def refusing(node: Node, refused: set[str]) -> Iterator[tuple[str, Counter[str]]]:
    """The node's RPC API, but for the paths of its own tree that it refuses to remove; (its URL, how often it was asked to)."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            entry = self.path.partition("?")[2].partition("&")[0].rpartition("%2F")[2]
            removal = self.path.startswith("/api/v0/files/rm?")
            asked[entry] += removal
            if removal and entry in refused:
                status, answer = 500, b'{"Message": "not now", "Code": 0, "Type": "error"}'
            else:
                headers = {"Content-Type": self.headers.get("Content-Type") or "application/octet-stream"}
                try:
                    with urllib.request.urlopen(urllib.request.Request(node.api_url + self.path, body, headers, method="POST")) as given:
                        status, answer = given.status, given.read()
                except urllib.error.HTTPError as exc:
                    status, answer = exc.code, exc.read()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.logs("pins wait until the node takes them")
def test_a_release_is_tried_three_times_then_waits_and_is_done_by_the_next_start(
    own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, cid = own_node, add(own_node, b"let go of at last")
    refused = {"staged-1"}

    async def first(url: str, asked: Counter[str]) -> None:
        async with pinning(url, tmp_path) as pins:
            pins.add(cid)
            await settled(pins)
            pins.remove(cid)
            await trio.to_thread.run_sync(until, lambda: "not now" in pins.status().failing, "the node refused it")
            assert asked["staged-1"] == 3
            assert pins.state(cid) == ""

    async def second(url: str) -> None:
        async with pinning(url, tmp_path) as pins:
            await settled(pins)

    monkeypatch.setattr(kubopins, "FIRST_WAIT", 1000.0)
    with refusing(node, refused) as (url, asked):
        trio.run(first, url, asked)
        node.gc()
        assert has(node, cid)
        refused.clear()
        trio.run(second, url)
    assert held(node, mounts(node)[0]) == []
    node.gc()
    assert not has(node, cid)
