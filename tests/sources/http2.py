"""A simple gateway on 127.0.0.1 that speaks HTTP/2 over TLS. A request for a block that it lacks gets no
answer.

Concurrency: a thread per connection. The threads end with the server.
"""

import select
import socket
import ssl
from collections import Counter
from collections.abc import Mapping

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid
from tests.sources.listening import Listening

MAX_STREAMS = 100


class Http2Server(Listening):
    """`connections`: how many there were so far. `asked`: how many requests came over each."""

    def __init__(self, blocks: Mapping[Cid, bytes], tls: ssl.SSLContext) -> None:
        super().__init__(backlog=128)
        self._blocks = blocks
        self._tls = tls
        tls.set_alpn_protocols(["h2", "http/1.1"])
        self._asked: Counter[int] = Counter()
        self.url = f"https://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._threads)

    @property
    def asked(self) -> list[int]:
        return [self._asked[number] for number in range(len(self._threads))]

    def _serve(self, plain: socket.socket, number: int) -> None:
        try:
            with plain, self._tls.wrap_socket(plain, server_side=True) as connection:
                assert connection.selected_alpn_protocol() == "h2"
                state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
                state.local_settings.max_concurrent_streams = MAX_STREAMS
                state.initiate_connection()
                unsent: dict[int, bytes] = {}
                while not self.stopping.is_set():
                    connection.sendall(state.data_to_send())
                    if not connection.pending() and not select.select([connection], [], [], 0.05)[0]:
                        continue
                    data = connection.recv(65536)
                    if not data:
                        return
                    for event in state.receive_data(data):
                        if isinstance(event, h2.events.RequestReceived):
                            self._asked[number] += 1
                            self._answer(state, event, unsent)
                    for stream in list(unsent):
                        self._send(state, stream, unsent)
        except (OSError, h2.exceptions.ProtocolError):
            pass

    def _answer(
        self, state: h2.connection.H2Connection, event: h2.events.RequestReceived, unsent: dict[int, bytes]
    ) -> None:
        path = dict(event.headers)[b":path"].decode()
        try:
            block = self._blocks.get(cids.parse(path.partition("?")[0].rpartition("/")[2]))
        except NotACid:
            block = None
        if block is not None:  # a request for another block stalls
            headers = [
                (":status", "200"),
                ("content-type", "application/vnd.ipld.raw"),
                ("content-length", str(len(block))),
            ]
            state.send_headers(event.stream_id, headers)
            unsent[event.stream_id] = block

    def _send(self, state: h2.connection.H2Connection, stream: int, unsent: dict[int, bytes]) -> None:
        """Sends as much as flow control allows."""
        while True:
            size = min(
                state.local_flow_control_window(stream), state.max_outbound_frame_size, len(unsent[stream])
            )
            if size <= 0 and unsent[stream]:
                return
            piece, unsent[stream] = unsent[stream][:size], unsent[stream][size:]
            state.send_data(stream, piece, end_stream=not unsent[stream])
            if not unsent[stream]:
                del unsent[stream]
                return
