"""An HTTP proxy on 127.0.0.1. It takes CONNECT and absolute-form requests, and passes them to the server
that a test gave for the host's name.

Concurrency: a thread per connection. The threads end with the proxy.
"""

import select
import socket

from tests.sources.listening import Listening


class Proxy(Listening):
    """`ports`: the port on 127.0.0.1 where each host's server listens. `heads`: the head of the first request
    of each connection."""

    def __init__(self, ports: dict[str, int]) -> None:
        super().__init__()
        self.ports = ports
        self.heads: list[str] = []

    def _serve(self, client: socket.socket, number: int) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(65536)
                if not piece:
                    return
                head += piece
            self.heads.append(head.decode())
            method, target, _version = head.split(b"\r\n")[0].decode().split(" ")
            host = (target if method == "CONNECT" else target.split("/")[2]).partition(":")[0]
            if host not in self.ports:
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self.ports[host])) as server:
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                else:
                    server.sendall(head)
                self._pass_on(client, server)

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        while not self.stopping.is_set():
            for ready in select.select([one, other], [], [], 0.05)[0]:
                try:
                    piece = ready.recv(65536)
                    (other if ready is one else one).sendall(piece)
                except OSError:
                    return
                if not piece:
                    return
