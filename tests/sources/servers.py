"""An HTTP server on 127.0.0.1, over raw sockets. Each test chooses how it answers: correctly, or in any wrong
way.

    with Server(blocks) as server: ...              a trustless gateway that has `blocks`
    with Server(blocks, evil.wrong_bytes) as ...    one that misbehaves

Concurrency: a thread per connection. The threads end with the server.
"""

import os
import re
import select
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid
from tests.sources.content import SampleFile, SampleTree, encode_car
from tests.sources.listening import Listening

RAW = "application/vnd.ipld.raw"
CAR = "application/vnd.ipld.car; version=1; order=dfs; dups=n"


@dataclass
class Ask:
    """One request, and the ways to answer it."""

    server: "Server"
    connection: socket.socket
    method: str
    target: str
    headers: dict[str, str]
    closed: bool = field(default=False)

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def cid(self) -> Cid | None:
        try:
            return cids.parse(self.query.get("arg") or self.path.removeprefix("/ipfs/").split("/")[0])
        except NotACid:
            return None

    @property
    def block(self) -> bytes | None:
        return self.server.blocks.get(self.cid) if self.cid is not None else None

    def send(
        self, status: int, body: bytes = b"", type_: str = RAW, length: int | None = None, **headers: str
    ) -> None:
        """Sends a whole answer. `length`: a wrong Content-Length."""
        lines = [
            f"HTTP/1.1 {status} Whatever",
            f"Content-Type: {type_}",
            f"Content-Length: {len(body) if length is None else length}",
        ]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def send_chunked(self, pieces: list[bytes], type_: str = CAR, end: bool = True) -> None:
        self.connection.sendall(
            f"HTTP/1.1 200 OK\r\nContent-Type: {type_}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for piece in pieces:
            self.connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        if end:
            self.connection.sendall(b"0\r\n\r\n")
        else:
            self.hang_up()

    def stall(self) -> None:
        """Sends nothing more, and waits until the client or the server goes away."""
        while not self.server.stopping.is_set():
            if select.select([self.connection], [], [], 0.05)[0] and not self.connection.recv(
                1, socket.MSG_PEEK
            ):
                break
        self.hang_up()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        self.closed = True


Behaviour = Callable[[Ask], None]


class Server(Listening):
    """Serves `blocks`; `files` also whole, as ranges and as CARs; `trees` also as CARs. `asked`: all requests
    so far."""

    def __init__(
        self,
        blocks: Mapping[Cid, bytes],
        behave: Behaviour | None = None,
        *,
        files: tuple[SampleFile, ...] = (),
        trees: tuple[SampleTree, ...] = (),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.blocks = dict(blocks)
        self.files = {file.root: file for file in files}
        self.trees = {tree.root: tree for tree in trees}
        for each in (*files, *trees):
            self.blocks.update(each.blocks)
        self.behave = behave or answer_well
        self.asked: list[Ask] = []
        super().__init__(backlog=512)
        self._tls = tls
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._open: set[socket.socket] = set()

    @property
    def connections(self) -> int:
        return len(self._open)

    def _end(self) -> None:
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _serve(self, connection: socket.socket, _number: int, /) -> None:
        self._open.add(connection)
        served = connection
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                served = self._tls.wrap_socket(connection, server_side=True)
                self._open.add(served)
            while self._answer_one(served):
                pass
        except OSError:
            pass
        finally:
            for each in (connection, served):
                self._open.discard(each)
                each.close()

    def _answer_one(self, connection: socket.socket) -> bool:
        head = bytearray()
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return False
            head += piece
        first, *lines = bytes(head).partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        method, target, _version = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        ask = Ask(self, connection, method, target, headers)
        self.asked.append(ask)
        self.behave(ask)
        return not ask.closed


def answer_well(ask: Ask) -> None:
    """Answers as the trustless gateway specification says. Also sends the bytes of files, in ranges."""
    file = ask.server.files.get(ask.cid) if ask.cid is not None else None
    tree = ask.server.trees.get(ask.cid) if ask.cid is not None else None
    if tree is not None and ask.query.get("format") == "car":
        body = tree.car(whole=ask.query["dag-scope"] == "all")
        ask.send_chunked([body[at : at + 5000] for at in range(0, len(body), 5000)])
    elif file is not None and ask.query.get("format") == "car":
        first, last = (int(text) for text in ask.query["entity-bytes"].split(":"))
        within = [leaf.cid for leaf in file.leaves if leaf.offset <= last and leaf.offset + leaf.size > first]
        body = encode_car(file.root, [(cid, file.blocks[cid]) for cid in dict.fromkeys([file.root, *within])])
        ask.send_chunked([body[at : at + 50_000] for at in range(0, len(body), 50_000)])
    elif file is not None and "range" in ask.headers:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", ask.headers["range"])
        assert found
        first, last = int(found[1]), int(found[2])
        ask.send(
            206,
            file.data[first : last + 1],
            "application/octet-stream",
            Content_Range=f"bytes {first}-{last}/{len(file.data)}",
        )
    elif ask.block is None:
        ask.send(404, b"no such block\n", "text/plain")
    else:
        ask.send(200, ask.block)


def self_signed(folder: os.PathLike[str]) -> ssl.SSLContext:
    """A server's context with a certificate that no authority signed, made with the openssl program."""
    import subprocess

    key, certificate = os.path.join(folder, "key.pem"), os.path.join(folder, "cert.pem")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        *subject,
    ]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
