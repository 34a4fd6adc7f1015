"""`push` sends a DAG of the library to a real Kubo node, and pins it there."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb
from ipfsfuse.dag.nodes import Link
from tests.dag.blocks import identity
from tests.kubo.node import Node
from tests.mounting import Home, wait_until
from tests.sources.listening import HttpAnswering


def tree(home: Home, size: int = 6 << 20) -> str:
    folder = home.folder / "tree"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "large").write_bytes(os.urandom(size))
    (folder / "deep" / "er" / "small").write_text("small")
    (folder / "deep" / "link").symlink_to("er/small")
    return home.add(folder)


def pinned(node: Node, cid: str) -> bool:
    return cid in str(node.rpc("pin/ls", type="recursive").get("Keys", {}))


@pytest.fixture
def to(own_node: Node) -> str:
    return f"kubo+{own_node.api_url}"


def test_a_dag_of_the_library_is_pushed_and_pinned(home: Home, own_node: Node, to: str) -> None:
    cid = tree(home)
    first = home.json("push", cid, "--to", to, "--json")
    assert first["blocks"] > 6
    assert (first["present"], first["pinned"]) == (0, True)
    assert pinned(own_node, cid)
    own_node.gc()
    assert own_node.cmd("cat", f"{cid}/deep/er/small") == "small"
    large = (home.folder / "tree" / "large").read_bytes()
    assert own_node.cmd("cat", f"{cid}/large", text=False) == large
    again = home.json("push", cid, "--to", to, "--json")
    assert (again["blocks"], again["bytes"], again["present"]) == (0, 0, first["blocks"])
    home.env["IPFS_PATH"] = str(own_node.repo)
    assert "pinned it there: 0 blocks sent" in home.run("push", cid).stdout


def test_a_push_that_was_killed_goes_on_where_it_ended(home: Home, own_node: Node, to: str) -> None:
    cid = tree(home, 24 << 20)
    command = [sys.executable, "-m", "ipfsfuse", "push", cid, "--to", to]
    process = subprocess.Popen(command, env=home.env)
    try:
        wait_until(lambda: own_node.rpc("repo/stat")["RepoSize"] > 4 << 20, "some blocks are there")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not pinned(own_node, cid)
    pushed = home.json("push", cid, "--to", to, "--json")
    assert pushed["present"] >= 2
    assert pushed["blocks"] >= 1
    assert pinned(own_node, cid)
    assert int(own_node.rpc("dag/stat", arg=cid, progress=False)["TotalSize"]) > 24 << 20


def test_push_shows_a_bar_on_a_terminal(home: Home, to: str) -> None:
    cid = tree(home, 8 << 20)
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    command = [sys.executable, "-m", "ipfsfuse", "push", cid, "--to", to]
    with os.fdopen(leader, "rb", buffering=0) as terminal:
        process = subprocess.Popen(command, env=home.env, stdout=subprocess.PIPE, stderr=follower)
        os.close(follower)
        shown = b""
        try:
            while data := terminal.read(4096):
                shown += data
        except OSError:  # the other side is closed
            pass
        assert process.wait() == 0
        assert process.stdout is not None
        process.stdout.close()
    assert b"pushing:" in shown
    assert b"/8.00M" in shown


def test_blocks_below_a_dag_cbor_and_an_identity_block_are_pushed(
    home: Home, own_node: Node, to: str
) -> None:
    """The identity block needs not be sent, because its CID holds it."""
    cid = tree(home)
    inline = identity(dagpb.encode([Link(cids.parse(cid), b"tree", 1)], b"\x08\x01"), cids.DAG_PB)
    document = {"a": [1, {"/": cids.text(inline)}]}
    other = own_node.cmd("dag", "put", "--pin=false", stdin=json.dumps(document))
    sources = ("--from", to, "--from", "library")
    pushed = home.json("push", other, "--to", to, "--json", *sources)
    assert pinned(own_node, other)
    own_node.gc()
    below = own_node.cmd("refs", "--recursive", "--unique", cid).split()
    assert (pushed["present"], pushed["blocks"]) == (1, 1 + len(below))
    assert own_node.cmd("cat", f"{cid}/deep/er/small") == "small"


class OddNode(HttpAnswering):
    """A node that accepts all blocks and keeps none, or answers nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, tuple[int, bytes]] = {}

    @property
    def source(self) -> str:
        return f"kubo+{self.url}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers.get("content-length") or 0))
        command = request.path.partition("?")[0].removeprefix("/api/v0/")
        status, body = self.answers.get(command, (200, b""))
        request.send_response(status)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def odd() -> Iterator[OddNode]:
    with OddNode().serving() as node:
        yield node


MISSING = 500, b'{"Message": "block was not found locally (offline): ipld: could not find", "Code": 0}'


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        (MISSING, "lost blocks"),
        ((200, b'{"Progress":1}\n'), "lost blocks"),
        ((200, b"\xff"), "can't be understood"),
        ((200, b"[" * 100_000), "can't be understood"),
        ((403, b"no"), "refused us"),
    ],
)
def test_a_node_that_does_not_keep_the_blocks_gives_one_line_of_error(
    home: Home, odd: OddNode, pin: tuple[int, bytes], message: str
) -> None:
    cid = tree(home, 1000)
    odd.answers = {"block/stat": MISSING, "pin/add": pin}
    home.refused("push", cid, "--to", odd.source, names=message)


@pytest.mark.parametrize("stat", [b'{"Size": 1e999}', b'{"Size": -1}', b"[" * 60_000, b"\xff", b"null"])
def test_an_odd_answer_about_a_block_that_the_node_has_does_not_stop_a_push(
    home: Home, odd: OddNode, stat: bytes
) -> None:
    (home.folder / "file").write_text("small")
    cid = home.add(home.folder / "file")
    odd.answers = {"block/stat": (200, stat), "pin/add": (200, json.dumps({"Pins": [cid]}).encode())}
    assert home.json("push", cid, "--to", odd.source, "--json")["present"] == 1


def test_a_dag_that_can_not_be_pushed_gives_one_line_of_error(home: Home, odd: OddNode) -> None:
    absent = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"
    home.refused("push", absent, "--to", "https://gateway.example", names="not a Kubo node", code=2)
    home.refused("push", "nothing", "--to", odd.source, names="not a CID", code=2)
    home.refused("push", absent, "--to", "kubo", names="set IPFS_PATH")
    odd.answers = {"block/stat": MISSING}
    home.refused("push", absent, "--to", odd.source, names="in no source")
    began = time.monotonic()
    home.refused("push", absent, "--to", "kubo+http://127.0.0.1:9", names="127.0.0.1:9")
    assert time.monotonic() - began < 20
