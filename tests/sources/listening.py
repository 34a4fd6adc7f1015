"""A listener on 127.0.0.1 with a thread per connection, all ended with it."""

import socket
import threading
from types import TracebackType
from typing import Self


class Listening:
    """`_serve` gets each connection and its number, from 0. It returns soon after `stopping` is set, or when
    `_end` makes it."""

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
        """Called once nobody can connect any more."""

    def _serve(self, connection: socket.socket, number: int, /) -> None:
        raise NotImplementedError
