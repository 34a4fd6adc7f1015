"""`ipfsfuse serve` with different clients: Kubo, other mounts, and attackers."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from multiformats import multibase
from trio.testing import MockClock

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.serve import app as gateway
from ipfsfuse.serve import server as bounds
from tests.dagging import Dag
from tests.faults.gateway import Gateway, blocks_of
from tests.faults.test_harm import thousands_of_nodes_in_cids
from tests.kubo.fixtures import need_kubo
from tests.kubo.node import Node, free_port
from tests.looptime.steps import no_step_is_long
from tests.mounting import Home, wait_until
from tests.serve.conftest import Server, serving
from tests.sources.ipns import NameServer, make, name_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ABSENT = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
CAR = "application/vnd.ipld.car"


def tree(home: Home, *, size: int = 3 << 20) -> tuple[Path, str]:
    folder = home.folder / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "large").write_bytes(os.urandom(size))
    for number in range(30):
        (folder / "sub" / f"small-{number}").write_text(f"small {number}")
    return folder, home.add(folder)


def same(one: Path, other: Path) -> None:
    subprocess.run(["diff", "-r", one, other], check=True)


# -- content ---------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_another_hosts_mount_reads_what_is_served(home: Home, tmp_path: Path) -> None:
    folder, cid = tree(home)
    other = Home(tmp_path / "other")
    with serving(home) as server, other.mounted("--from", server.url) as mount:
        same(folder, mount.path / cid)
        served = home.json("status", "--json")["served"]
        assert served["bytes"] > 3 << 20
        assert served["broken"] == 0


@pytest.mark.kubo
def test_a_real_kubo_reads_a_file_by_http_retrieval(home: Home) -> None:
    need_kubo()
    folder, cid = tree(home)
    with serving(home) as server, router(server) as url:
        settings = {
            "Routing": {"Type": "delegated", "DelegatedRouters": [url]},
            "HTTPRetrieval": {"Enabled": True},
            "Provide": {"Enabled": False},
        }
        with Node(settings=settings) as node:
            assert node.cmd("cat", f"/ipfs/{cid}/large", text=False) == (folder / "large").read_bytes()
            assert node.cmd("cat", f"/ipfs/{cid}/sub/small-7") == "small 7"


@contextmanager
def router(server: Server) -> Iterator[str]:
    """A delegated router that names `server` as the provider of everything."""
    host, port = server.address.split(":")
    peer = "12D3KooWM8sovaEGU1bmiWGWAzvs47DEcXKZZTuJnpQyVTkRs2Vn"
    record = {
        "Schema": "peer", "ID": peer, "Addrs": [f"/ip4/{host}/tcp/{port}/http"],
        "Protocols": ["transport-ipfs-gateway-http"],
    }  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"Providers": [record]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    routing = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=routing.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{routing.server_address[1]}"
    routing.shutdown()
    routing.server_close()


@pytest.mark.kubo
def test_cars_have_the_same_blocks_in_the_same_order_as_those_of_a_real_node(
    home: Home, kubo_node: Node
) -> None:
    folder, cid = tree(home)
    wide = home.folder / "wide"
    wide.mkdir()
    for number in range(2000):
        (wide / f"a-name-that-is-long-enough-to-make-a-hamt-of-it-{number}").write_text(str(number))
    sharded = home.add(wide)
    with serving(home) as server:
        for root in (cid, sharded):
            answer = server.ask(f"/ipfs/{root}?format=car")
            (home.folder / "all.car").write_bytes(answer.body)
            node_has = kubo_node.cmd("dag", "import", "--stats", str(home.folder / "all.car"))
            assert "Imported" in node_has
        theirs = Server.__new__(Server)
        theirs.address = kubo_node.gateway_url.removeprefix("http://")
        for path in (
            cid,
            f"{cid}/large",
            f"{cid}/sub",
            f"{cid}/sub/small-3",
            sharded,
            f"{sharded}/a-name-that-is-long-enough-to-make-a-hamt-of-it-77",
        ):
            for query in (
                "dag-scope=block",
                "dag-scope=entity",
                "dag-scope=all",
                "dag-scope=entity&entity-bytes=1048000:1049000",
            ):
                target = f"/ipfs/{path}?format=car&{query}"
                ours = server.ask(target, Accept=f"{CAR}; order=dfs; dups=n").blocks()
                assert ours == theirs.ask(target, Accept=f"{CAR}; order=dfs; dups=n").blocks()
    assert folder.exists()


def test_head_etags_and_refused_requests(home: Home) -> None:
    _folder, cid = tree(home)
    with serving(home) as server:
        raw, as_car = f"/ipfs/{cid}?format=raw", f"/ipfs/{cid}?format=car"
        for target in (raw, as_car):
            answer, head = server.ask(target), server.ask(target, method="HEAD")
            assert head.status == 200
            assert head.body == b""
            assert head.headers["etag"] == answer.headers["etag"]
            for tags in (answer.headers["etag"], f'"x", {answer.headers["etag"]}', "*"):
                known = server.ask(target, If_None_Match=tags)
                assert (known.status, known.body) == (304, b"")
            assert server.ask(target, If_None_Match='"x"').status == 200
        assert server.ask(f"/ipfs/{ABSENT}?format=raw", If_None_Match="*").status == 404
        assert server.ask(as_car).headers["etag"] != server.ask(f"{as_car}&dag-scope=block").headers["etag"]
        refused = {
            f"/ipfs/{cid}": 400, "/": 404, "/api/v0/id": 404, f"/ipfs/{cid}/sub?format=raw": 400, "/ipfs/x?format=raw": 400,
            f"{as_car}&dag-scope=x": 400, f"{as_car}&entity-bytes=x": 400, f"{as_car}&car-version=2": 400,
            f"/ipfs/{cid}/../x?format=car": 400, f"/ipfs/{ABSENT}?format=raw": 404, f"/ipfs/{ABSENT}?format=car": 404,
            f"/ipfs/{cid}/large/x?format=car": 404, f"/ipns/{cid}?format=car": 400, "/ipns/x?format=ipns-record": 400,
            "/ipfs/" + "a/" * 4000 + "?format=car": 400, f"/ipfs/{cid}/" + "a/" * 300 + "?format=car": 400,
        }  # fmt: skip
        assert {target: server.ask(target).status for target in refused} == refused
        assert server.ask(raw, method="POST").status == 405
        assert server.ask(raw, method="DELETE").headers["allow"] == "GET, HEAD"
        assert server.ask(f"/ipfs/{ABSENT}?format=raw", Cache_Control="only-if-cached").status == 412
        assert server.ask(raw, Cache_Control="only-if-cached").status == 200
        assert server.ask(raw, Content_Length="5").status == 413


# -- sources ---------------------------------------------------------------------------------------------


def gateway_of(home: Home, *cid: str) -> Gateway:
    blocks: dict[bytes, bytes] = {}
    for each in cid:
        home.run("export", each, home.folder / f"{each}.car")
        blocks |= blocks_of(home.folder / f"{each}.car")
    return Gateway(blocks)


def test_nothing_is_fetched_for_clients_without_the_option_fetch(home: Home, tmp_path: Path) -> None:
    elsewhere = Home(tmp_path / "elsewhere")
    folder, cid = tree(elsewhere)
    with gateway_of(elsewhere, cid).serving() as gateway:
        with serving(home, "--from", gateway.url) as server:
            assert server.ask(f"/ipfs/{cid}?format=car").status == 404
            assert not gateway.asked
        with serving(home, "--from", gateway.url, "--fetch", "--deadline", "2s") as server:
            car = f"/ipfs/{cid}?format=car"
            assert server.ask(car, Cache_Control="only-if-cached").status == 412
            assert not gateway.asked
            blocks = server.ask(car).blocks()
            assert len(blocks) > 30
            assert server.ask(car, Cache_Control="only-if-cached").blocks() == blocks
            assert server.ask(f"/ipfs/{ABSENT}?format=raw").status in (404, 504)
        with serving(home) as server:  # what was fetched is in the cache now
            assert server.ask(car).blocks() == blocks
    assert folder.exists()


@pytest.mark.fuse
def test_content_is_read_through_a_mount_that_uses_the_cache_folder(home: Home, tmp_path: Path) -> None:
    elsewhere = Home(tmp_path / "elsewhere")
    folder, cid = tree(elsewhere)
    with gateway_of(elsewhere, cid).serving() as gateway, home.mounted("--from", gateway.url) as mount:
        same(folder, mount.path / cid)
        asked = gateway.asked.total()
        with serving(home) as server:
            answer = server.ask(f"/ipfs/{cid}?format=car")
            assert len(answer.blocks()) > 30
            assert server.ask(f"/ipfs/{ABSENT}?format=raw").status == 404
            served = mount.status()["served"]
            assert served["bytes"] > 3 << 20
            other = Home(tmp_path / "other")
            with other.mounted("--from", server.url) as second:
                same(folder, second.path / cid)
        assert gateway.asked.total() == asked
        with serving(home) as server:
            home.run("unmount", mount.path)
            assert server.ask(f"/ipfs/{cid}?format=raw").status == 504


@pytest.mark.fuse
def test_name_records_that_were_seen_are_served(home: Home) -> None:
    _folder, cid = tree(home)
    name = name_of(KEY)
    target = f"/ipns/{name}?format=ipns-record"
    names = home.folder / "ipns"
    names.mkdir()
    with NameServer().serving() as source:
        source.records[str(name)] = make(KEY, f"/ipfs/{cid}", 3, ttl=60)
        with serving(home, "--from", "library", "--from", source.url) as server:
            assert server.ask(target).status == 404
            assert server.ask(target, Cache_Control="only-if-cached").status == 412
            assert not source.asked
        with home.mounted("--from", "library", "--from", source.url, "--ipns", names):
            assert (names / str(name) / "sub").is_dir()
            with serving(home) as server:
                assert server.ask(target).body == source.records[str(name)]
        with serving(home) as server:
            answer = server.ask(target)
            assert answer.body == source.records[str(name)]
            assert answer.headers["content-type"] == "application/vnd.ipfs.ipns-record"
            assert answer.headers["cache-control"] == "public, max-age=60"
            assert server.ask(f"/ipns/{name}", Accept="application/vnd.ipfs.ipns-record").body == answer.body
            assert server.ask(target, If_None_Match=answer.headers["etag"]).status == 304
        (home.store / "names" / str(name)).write_bytes(make(KEY, f"/ipfs/{cid}", 3, valid=-1))
        with serving(home) as server:
            assert server.ask(target).status == 404
            assert server.ask(target, Cache_Control="only-if-cached").status == 412
        with serving(home, "--from", source.url, "--fetch") as server:
            assert server.ask(target).body == source.records[str(name)]


# -- hostile clients -------------------------------------------------------------------------------------


def connect(server: Server) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_an_answer_that_can_not_be_completed_is_visibly_cut_off(home: Home, tmp_path: Path) -> None:
    elsewhere = Home(tmp_path / "elsewhere")
    _folder, cid = tree(elsewhere)
    gateway = gateway_of(elsewhere, cid)
    large = next(key for key, block in gateway.blocks.items() if len(block) == 1 << 20)
    del gateway.blocks[large]
    with (
        gateway.serving(),
        serving(home, "--from", gateway.url, "--fetch", "--deadline", "1s") as server,
        closing(connect(server)) as client,
    ):
        client.sendall(f"GET /ipfs/{cid}?format=car HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while piece := client.recv(1 << 20):
            answer += piece
        assert answer.startswith(b"HTTP/1.1 200")
        assert not answer.endswith(b"0\r\n\r\n")
        wait_until(
            lambda: home.json("status", "--json")["served"]["broken"] == 1, "the broken answer is counted"
        )


def test_many_silent_clients_do_not_keep_others_out_for_long(home: Home) -> None:
    _folder, cid = tree(home)
    with serving(home) as server:
        crowd = [connect(server) for _ in range(bounds.MAX_CONNECTIONS - 10)]
        for number, each in enumerate(crowd):
            each.sendall(b"GET /" if number % 2 else b"")
        began = time.monotonic()
        assert server.ask(f"/ipfs/{cid}?format=raw").status == 200
        assert time.monotonic() - began < 10
        for each in crowd:
            each.close()


def test_a_client_that_reads_nothing_delays_neither_other_clients_nor_the_end(home: Home) -> None:
    _folder, cid = tree(home, size=64 << 20)
    with serving(home) as server:
        stalled = [connect(server) for _ in range(5)]
        for each in stalled:
            each.sendall(f"GET /ipfs/{cid}?format=car HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert each.recv(10)
        assert server.ask(f"/ipfs/{cid}?format=raw").status == 200
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 15
        for each in stalled:
            each.close()


def test_an_answer_that_the_client_does_not_take_is_given_up() -> None:
    """An HTTP/2 client can refuse to take one answer, and send more requests."""

    async def block(cid: Cid, fetch: bool) -> bytes:
        return bytes(2 << 20)

    async def record(name: object, fetch: bool) -> bytes:
        raise NotImplementedError

    async def main() -> float:
        app, began = gateway.TrustlessGateway(block, record), trio.current_time()

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await trio.sleep_forever()

        with pytest.RaisesGroup(gateway.Broken):
            await app({"type": "http", "method": "GET", "raw_path": f"/ipfs/{ABSENT}".encode(), "query_string": b"format=raw", "headers": []},
                      trio.sleep_forever, send)  # fmt: skip
        return trio.current_time() - began

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) <= 33 * gateway.SEND_SECONDS


def test_a_long_answer_to_a_silent_client_is_not_cut_off() -> None:
    """An HTTP/2 client with a large window may send nothing while it reads."""

    async def main() -> None:
        ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
        connection = bounds._Connection(ours)
        await theirs.send_all(b"a request")
        assert await connection.receive_some() == b"a request"
        received = list[bytes]()

        async def receive() -> None:
            received.append(bytes(await connection.receive_some()))

        async with theirs, trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for _ in range(3):
                await trio.sleep(bounds.HEAD_SECONDS - 1)
                await connection.send_all(b"a part of the answer")
            await theirs.send_all(b"another request")
        assert received == [b"another request"]
        await connection.aclose()

    trio.run(main, clock=MockClock(autojump_threshold=0.01))


def test_thousands_of_nodes_in_cids_do_not_block_the_event_loop(home: Home) -> None:
    """Such nodes are not in the CAR, so nothing is sent while they are walked."""
    dag = Dag()
    root = cids.text(thousands_of_nodes_in_cids(dag, 10_000))
    with no_step_is_long(home), serving(home, "--from", dag.car(home.folder / "inline.car")) as server:
        assert len(server.ask(f"/ipfs/{root}?format=car").blocks()) == 1


def test_garbage_ends_only_its_own_connection(home: Home) -> None:
    _folder, cid = tree(home)
    with serving(home) as server:
        for sent in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxxxxx",
                     b"GET /ipfs/%ff?format=raw HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 50_000,
                     b"GET /ipfs/x?" + b"a=1&" * 1000 + b" HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\r\n"):  # fmt: skip
            with closing(connect(server)) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                answer = client.recv(1 << 16)
                assert not answer.startswith(b"HTTP/1.1 200")
        assert server.ask(f"/ipfs/{cid}?format=raw").status == 200


def test_a_web_page_whose_name_resolves_to_this_machine_reads_nothing(home: Home) -> None:
    """DNS rebinding: the page's name resolves to this machine, so the browser lets the page read the answers.
    An option allows the name of a proxy."""
    _folder, cid = tree(home)

    def asked(server: Server, host: str) -> int:
        return server.ask(f"/ipfs/{cid}?format=raw", Host=host).status

    with serving(home) as server:
        for host in (
            "127.0.0.1",
            "127.9.9.9:1",
            "localhost:1",
            "LOCALHOST.",
            "cid.ipfs.localhost",
            "[::1]:80",
        ):
            assert asked(server, host) == 200
        for host in (
            "rebound.example:8080",
            "127.0.0.1.example",
            "localhost.example",
            "xlocalhost",
            "[::1",
            "",
        ):
            assert asked(server, host) == 403
        assert b"--allow-host" in server.ask("/ipfs/x", Host="rebound.example").body
    with serving(home, "--allow-host", "ipfs.example") as server:
        assert [asked(server, host) for host in ("IPFS.example:443", "x.ipfs.example")] == [200, 403]
    assert bounds.hosts(["192.0.2.1", "127.0.0.1"], []) is None
    assert bounds.hosts(["192.0.2.1"], ["ipfs.example"]) == ["ipfs.example"]


def test_serve_is_refused_with_a_reason_in_one_line(home: Home) -> None:
    port = free_port()
    with closing(socket.create_server(("127.0.0.1", port))):
        home.refused("serve", "--listen", f"127.0.0.1:{port}", names=str(port), code=2)
    home.refused("serve", "--listen", "nonsense", names="HOST:PORT", code=2)
    home.refused("serve", "--from", "http://", names="host", code=2)
    for name in ("ipfs.example:443", "https://ipfs.example", "*.example", "b\u00fccher.example", ""):
        home.refused("serve", "--allow-host", name, names="is not a host name", code=2)
    with serving(home) as server:
        message = home.refused("mount", home.mountpoint, names=str(server.process.pid), code=os.EX_TEMPFAIL)
        assert "ipfsfuse serve" in message


def test_a_cid_is_served_in_any_spelling(home: Home) -> None:
    _folder, cid = tree(home)
    with serving(home) as server:
        parsed = cids.parse(cid)
        answer = server.ask(f"/ipfs/{cid}?format=raw")
        for base in ("base36", "base58btc", "base16"):
            spelled = multibase.encode(parsed, base)
            assert server.ask(f"/ipfs/{spelled}?format=raw").body == answer.body
