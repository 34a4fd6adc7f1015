"""A small trustless gateway of real blocks, on loopback, that can be told to stall, to lie and to refuse."""

import errno
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.dagging import Dag
from tests.mounting import Home, Mounted


def blocks_of(path: Path) -> dict[bytes, bytes]:
    """The blocks of a CARv1 file, by multihash."""
    data = path.read_bytes()
    at, found = car.header_length(data), {}
    while at < len(data):
        section = car.section(data, at)
        found[cids.multihash(section.cid)] = data[section.block : section.end]
        at = section.end
    return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    """With the usual 5, a crowd's connections are dropped by the kernel and tried again seconds later."""


class Gateway:
    """Serves `format=raw` alone (a CAR is refused with 406, as the specification allows)."""

    def __init__(self, blocks: dict[bytes, bytes]) -> None:
        self.blocks = blocks
        self.asked: Counter[str] = Counter()
        self.stalled: set[str] = set()
        """CIDs whose answer never comes while the server lives."""
        self.lying: set[str] = set()
        """CIDs that are answered with other bytes."""
        self.url = ""
        self._end = threading.Event()

    @contextmanager
    def serving(self) -> Iterator["Gateway"]:
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gateway._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            server.shutdown()
            server.server_close()
            thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        name = path.removeprefix("/ipfs/")
        self.asked[name] += 1
        if name in self.stalled:
            self._end.wait()
            request.close_connection = True
            return
        block = self.blocks.get(cids.multihash(Cid(cids.parse(name))))
        status = 404 if block is None else 406 if "format=raw" not in query else 200
        body = block if block is not None and status == 200 else b""
        if name in self.lying:
            body = bytes(len(body))
        request.send_response(status)
        request.send_header("Content-Type", "application/vnd.ipld.raw")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@contextmanager
def mounted(home: Home, dag: Dag, *options: str) -> Iterator[tuple[Gateway, Mounted]]:
    gateway = Gateway(dag.blocks)
    with gateway.serving(), home.mounted("--from", gateway.url, "--deadline", "4s", *options) as mount:
        yield gateway, mount


def errno_of(path: Path) -> str:
    """What reading or listing `path` fails with."""
    with pytest.raises(OSError) as raised:
        path.read_bytes()
    return errno.errorcode[raised.value.errno or 0]
