"""Servers on 127.0.0.1: `Listening` for bare connections, `HttpAnswering` for requests.

Concurrency: a thread per connection. The threads end with the server.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


class Listening:
    """Calls `_serve` with each connection and its number, from 0. `_serve` must return soon after `stopping`
    is set, or after `_end` was called."""

    def __init__(self, backlog: int | None = None) -> None:
        self.stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.port = int(self._listener.getsockname()[1])
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self._end()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            number = len(self._threads)
            self._threads.append(threading.Thread(target=self._serve, args=(connection, number)))
            self._threads[-1].start()

    def _end(self) -> None:
        """Called when the server accepts no more connections."""

    def _serve(self, connection: socket.socket, number: int, /) -> None:
        raise NotImplementedError


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    """With the usual 5, the kernel drops most connections of a crowd. They are tried again seconds later."""


class HttpAnswering:
    """Calls `answer` with each request. An `answer` that sends nothing waits for `ended`."""

    def __init__(self) -> None:
        self.url = ""
        self.ended = threading.Event()

    @contextmanager
    def serving(self) -> Iterator[Self]:
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                ours.answer(self)

            def do_POST(self) -> None:
                ours.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = _HttpServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.ended.set()
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        raise NotImplementedError
