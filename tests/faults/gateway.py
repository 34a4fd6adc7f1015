"""A small trustless gateway of real blocks, on loopback. It can stall, send wrong bytes, and refuse."""

import errno
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from tests.dagging import Dag
from tests.mounting import Home, Mounted
from tests.sources.listening import HttpAnswering


def blocks_of(path: Path) -> dict[bytes, bytes]:
    """The blocks of a CARv1 file, by multihash."""
    data = path.read_bytes()
    at, found = car.header_length(data), {}
    while at < len(data):
        section = car.section(data, at)
        found[cids.multihash(section.cid)] = data[section.block : section.end]
        at = section.end
    return found


class Gateway(HttpAnswering):
    """Serves only `format=raw`. It refuses a CAR with 406, as the specification allows."""

    def __init__(self, blocks: dict[bytes, bytes]) -> None:
        super().__init__()
        self.blocks = blocks
        self.asked: Counter[str] = Counter()
        self.stalled: set[str] = set()
        """CIDs that are not answered while the server runs."""
        self.lying: set[str] = set()
        """CIDs that are answered with wrong bytes."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        name = path.removeprefix("/ipfs/")
        self.asked[name] += 1
        if name in self.stalled:
            self.ended.wait()
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
    """The name of the errno with which a read of `path` fails."""
    with pytest.raises(OSError) as raised:
        path.read_bytes()
    return errno.errorcode[raised.value.errno or 0]
