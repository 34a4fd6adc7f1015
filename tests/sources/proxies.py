"""An HTTP proxy on 127.0.0.1: CONNECT and absolute-form requests, to whichever server stands for a host's
name.

Concurrency: a thread per connection, all ended with the proxy.
"""

import select
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """`ports`: where each host's server really listens, on 127.0.0.1. `heads` are the first request's head of
    each connection."""

    def __init__(self, ports: dict[str, int]) -> None:
        self.ports = ports
        self.heads: list[str] = []
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in [self._accepting, *self._threads]:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
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
        while not self._stopping.is_set():
            for ready in select.select([one, other], [], [], 0.05)[0]:
                try:
                    piece = ready.recv(65536)
                    (other if ready is one else one).sendall(piece)
                except OSError:
                    return
                if not piece:
                    return
