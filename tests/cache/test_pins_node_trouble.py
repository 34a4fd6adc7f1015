"""Pins at a node that restarts, is down, hangs, or has lost what it held."""

import os
import shutil
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trio

from ipfsfuse.cache.pins import kubo_pins
from ipfsfuse.cache.pins import lease as leases
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.dag import cid as cids
from tests.cache.pinning import add, folder_of, has, held, made_up, mounts, pinning, settled, until
from tests.cache.test_pins_crash import settle_once
from tests.kubo.node import Node

pytestmark = pytest.mark.usefixtures("quick_pins")


@pytest.mark.parametrize("crash", [False, True])
def test_pins_survive_a_restart_of_the_node(own_node: Node, tmp_path: Path, crash: bool) -> None:
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


@pytest.mark.logs("pins wait until kubo takes them")
def test_a_node_that_is_down_at_the_start_gets_the_pins_later(own_node: Node, tmp_path: Path) -> None:
    node, cid = own_node, add(own_node, b"patience")
    node.stop()

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(cid)
            await trio.to_thread.run_sync(
                until, lambda: pins.status().failing != "", "the mount sees that the node is down"
            )
            assert pins.state(cid) == "queued"
            await trio.to_thread.run_sync(node.start)
            await settled(pins)
            assert (pins.state(cid), pins.status().failing) == ("cache", "")

    trio.run(main)


def test_a_node_that_hangs_does_not_delay_the_event_loop(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            await settled(pins)
            node.pause()
            for index in range(5000):
                pins.add(made_up(index))
                pins.remove(made_up(index - 1))
            for _ in range(100):
                await trio.sleep(0.01)  # the event loop goes on while a request to the node hangs
            assert pins.state(made_up(4999)) == "queued"
            node.resume()
            await settled(pins)
            assert held(node, mounts(node)[0]) == [made_up(4999)]

    trio.run(main)


@pytest.mark.logs("pins wait until kubo takes them")
def test_a_folder_that_a_user_removed_is_made_again(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path) as pins:
            pins.add(made_up(1))
            pins.pin(made_up(2))
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
    """A proxy of the node's RPC API that refuses to remove the MFS entries in `refused`. Yields its URL, and
    how often it was asked to remove each entry."""
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
                    with urllib.request.urlopen(
                        urllib.request.Request(node.api_url + self.path, body, headers, method="POST")
                    ) as given:
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


@pytest.mark.logs("pins wait until kubo takes them")
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
            await trio.to_thread.run_sync(
                until, lambda: "not now" in pins.status().failing, "the node refuses the removal"
            )
            assert asked["staged-1"] == 3
            assert pins.state(cid) == ""

    async def second(url: str) -> None:
        async with pinning(url, tmp_path) as pins:
            await settled(pins)

    monkeypatch.setattr(kubo_pins, "FIRST_WAIT", 1000.0)
    with refusing(node, refused) as (url, asked):
        trio.run(first, url, asked)
        node.gc()
        assert has(node, cid)
        refused.clear()
        trio.run(second, url)
    assert held(node, mounts(node)[0]) == []
    node.gc()
    assert not has(node, cid)


# -- what is read back from the node -------------------------------------------------------------------------


def test_a_node_that_lost_everything_between_two_mounts_gets_the_pins_again(
    own_node: Node, tmp_path: Path
) -> None:
    node = own_node

    async def live() -> None:
        async with pinning(node, tmp_path, map(made_up, range(1500)), [made_up(-1)]) as pins:
            await settled(pins)
            assert (pins.status().held, pins.status().queued) == (1501, 0)

    trio.run(live)
    (mount,) = mounts(node)
    node.stop()
    shutil.rmtree(node.repo)
    node.init()
    node.start()
    with pytest.raises(RuntimeError, match="does not exist"):
        mounts(node)
    trio.run(live)
    assert mounts(node) == [mount]
    assert set(held(node, mount)) == set(map(made_up, range(1500)))
    assert held(node, mount, "pinned-") == [made_up(-1)]


def test_twenty_thousand_pins_are_read_back_by_one_request_for_each_thousand(
    own_node: Node, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    everything = list(map(made_up, range(20_000)))

    async def live() -> int:
        async with pinning(own_node, tmp_path, everything) as pins:
            start = trio.current_time()
            await settled(pins)
            record_property("milliseconds", round(1000 * (trio.current_time() - start)))
            assert (pins.status().held, pins.status().batches) == (20_000, 20)
            return pins.status().requests

    trio.run(live)
    before = folder_of(own_node, mounts(own_node)[0])
    assert trio.run(live) <= 20 + 10
    assert folder_of(own_node, mounts(own_node)[0]) == before


def test_small_blocks_that_are_staged_stay_pinned_over_a_restart(own_node: Node, tmp_path: Path) -> None:
    """The list of staged content at the start names only files. Each other CID that the node holds is looked
    up."""

    async def first() -> None:
        async with pinning(own_node, tmp_path, [made_up(1)]) as pins:
            for index in range(2, 302):
                pins.add(made_up(index))
            await settled(pins)

    async def second() -> None:
        async with pinning(
            own_node, tmp_path, [made_up(1)], is_staged=lambda cid: cid < made_up(202)
        ) as pins:
            await settled(pins)
            assert pins.status().held == 201
            assert [pins.state(made_up(index)) for index in (1, 201, 202)] == ["cache", "cache", ""]

    trio.run(first)
    trio.run(second)
    assert set(held(own_node, mounts(own_node)[0])) >= set(map(made_up, range(1, 202)))


def test_our_folder_is_mended_after_an_edit_and_the_entries_of_the_user_are_left_alone(
    own_node: Node, tmp_path: Path
) -> None:
    node = own_node
    large = node.add(os.urandom(2_000_000), "--cid-version=1", "--chunker=size-2000000")
    folder = node.cmd("add", "-r", "-Q", "--pin=false", _tree(tmp_path / "tree"))

    async def live() -> None:
        async with pinning(node, tmp_path / "cache", [made_up(1), made_up(2)], [made_up(3)]) as pins:
            await settled(pins)
            assert (pins.status().held, pins.status().queued) == (3, 0)

    trio.run(live)
    (mount,) = mounts(node)
    before = folder_of(node, mount)
    ours = f"/ipfsfuse/{mount}"
    for name in ("staged-7", "staged-08", "pinned-99999999999", "staged-" + "9" * 200):
        node.cmd("files", "cp", f"/ipfs/{folder}", f"{ours}/{name}")
    node.cmd("files", "cp", f"/ipfs/{large}", f"{ours}/staged-9")
    node.cmd("files", "cp", f"/ipfs/{folder}", f"{ours}/mine")
    node.cmd("files", "cp", f"/ipfs/{before['staged-1']}", f"{ours}/staged-1000")
    node.rpc("files/rm", arg=f"{ours}/pinned-1", force=True)
    node.rpc("files/rm", arg=f"{ours}/lease", force=True)
    node.rpc("files/mkdir", arg=f"{ours}/lease")
    trio.run(live)
    after = folder_of(node, mount)
    assert after.pop("mine") == folder
    assert set(held(node, mount)) == {made_up(1), made_up(2)}
    assert held(node, mount, "pinned-") == [made_up(3)]
    assert len(after) == 2
    assert node.rpc("files/read", arg=f"{ours}/lease")["resting"] is True
    shutil.rmtree(tmp_path / "cache")
    settle_once(node, tmp_path / "next")
    assert folder_of(node, mount) == {"mine": folder}, (
        "the entry of the user stays also when the folder is released"
    )


def _tree(folder: Path) -> Path:
    folder.mkdir()
    for name in ("000", "001"):
        (folder / name).write_text(name)
    return folder


def test_an_edit_of_our_folder_is_mended_while_the_mount_runs(
    own_node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW", 0.1)
    node = own_node

    async def main() -> None:
        async with pinning(node, tmp_path, [made_up(1)]) as pins:
            await settled(pins)
            (mount,) = mounts(node)
            node.rpc("files/rm", arg=f"/ipfsfuse/{mount}/staged-1", force=True)
            await trio.to_thread.run_sync(
                until, lambda: held(node, mount) == [made_up(1)], "it is pinned again"
            )

    trio.run(main)


def test_a_batch_whose_block_the_node_has_lost_is_written_anew(own_node: Node, tmp_path: Path) -> None:
    node = own_node

    async def live() -> None:
        async with pinning(node, tmp_path, [made_up(1)]) as pins:
            await settled(pins)
            assert pins.status().held == 1

    trio.run(live)
    (mount,) = mounts(node)
    (batch,) = folder_of(node, mount).values()
    node.cmd("block", "rm", batch)
    assert not node.has(batch)
    trio.run(live)
    assert held(node, mount) == [made_up(1)]


@pytest.mark.logs("pins wait until kubo takes them: /ipfsfuse/.* in the node's MFS")
@pytest.mark.parametrize("name", ["ours", "/ipfsfuse"])
def test_a_file_with_the_name_of_our_folder_is_left_alone_and_logged_once(
    own_node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    node = own_node
    (tmp_path / "cache").mkdir(mode=0o700)
    path = name if name.startswith("/") else f"/ipfsfuse/{MountId.open(tmp_path / 'cache').name}"
    node.cmd("files", "write", "--create", "--parents", path, stdin=b"mine")

    async def main() -> None:
        async with pinning(node, tmp_path / "cache", [made_up(1)]) as pins:
            await trio.to_thread.run_sync(
                until, lambda: pins.status().failing != "", "the mount sees the file"
            )
            requests = pins.status().requests
            await trio.to_thread.run_sync(
                until, lambda: pins.status().requests > requests + 1, "the mount tries again"
            )
            assert "move it away" in pins.status().failing
            node.rpc("files/rm", arg=path, force=True)
            await settled(pins)
            assert pins.state(made_up(1)) == "cache"

    trio.run(main)
    assert len([record for record in caplog.records if "pins wait" in record.getMessage()]) == 1
