"""`ipfsfuse metrics`: the counts of a running mount as OpenMetrics text, printed, in a file, or over HTTP.

The file has the text format of Prometheus, since the node exporter refuses OpenMetrics.
"""

import argparse
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics

from ipfsfuse import client, units
from ipfsfuse.cli import console, folders
from ipfsfuse.errors import IpfsFuseError, UsageError
from ipfsfuse.text import printable

METRICS_SECONDS = 10.0
CLIENT_SECONDS = 10.0
"""A client may take so long to send its request or to receive the answer."""
MAX_CONNECTIONS = 32
OPENMETRICS = "application/openmetrics-text"
FORMATS: Mapping[bool, tuple[Callable[[Any], bytes], str]] = {
    True: (openmetrics.generate_latest, f"{OPENMETRICS}; version=1.0.0; charset=utf-8"),
    False: (generate_latest, "text/plain; version=0.0.4; charset=utf-8"),
}
"""OpenMetrics, and Prometheus' own format, with their media types."""


def run(arguments: argparse.Namespace) -> int:
    control = folders.control_socket(arguments)
    if arguments.listen is not None and arguments.textfile is not None:
        raise UsageError("metrics takes --listen or --textfile, not both")
    if arguments.listen is not None:
        return _serve(control, arguments)
    answer = client.call(control, "metrics", timeout=METRICS_SECONDS)
    if arguments.textfile is not None:
        console.write(arguments.textfile, text(answer, generate_latest))
        return console.answer(arguments, {"written": arguments.textfile})
    return console.answer(arguments, answer, *text(answer).splitlines())


def _serve(control: Path, arguments: argparse.Namespace) -> int:
    host, port = units.address(arguments.listen)
    try:
        server = _Server((host, port), control)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else None
        raise UsageError(f"--listen {arguments.listen}: {reason or exc}") from exc
    with server:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{server.server_address[1]}/metrics"
        console.listening(arguments, [url], f"serving metrics at {url}")
        server.serve_forever()
    return 0


class _Server(ThreadingHTTPServer):
    """Answers only `GET /metrics`, one request for each connection. So that slow clients don't keep others
    out, a new connection beyond MAX_CONNECTIONS ends the oldest."""

    request_queue_size = 128

    def __init__(self, address: tuple[str, int], control: Path) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.control = control
        self._open: dict[int, socket.socket] = {}
        self._changing = threading.Lock()
        super().__init__(address, _Handler)
        self.private = ip_address(str(self.server_address[0])).is_loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changing:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = self._open.pop(next(iter(self._open)))
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[id(request)] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._changing:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, _request: object, _client_address: object) -> None:
        """Reports failures, unless the client has gone."""
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):
            console.failure(error)


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    server: _Server

    def do_GET(self) -> None:
        if self.server.private and not units.names_this_machine(self.headers.get("Host", "localhost")):
            refusal = "a web page could use any name: ask by the address itself or as localhost\n"
            self._answer(403, refusal)
        elif self.path.partition("?")[0] != "/metrics":
            self._answer(404, "see /metrics\n")
        else:
            is_open = OPENMETRICS in self.headers.get("Accept", "")
            encode, kind = FORMATS[is_open]
            try:
                answer = client.call(self.server.control, "metrics", timeout=METRICS_SECONDS)
                self._answer(200, text(answer, encode), kind)
            except IpfsFuseError as exc:
                self._answer(503, f"{exc}\n")

    def _answer(self, code: int, body: str, kind: str = "text/plain; charset=utf-8") -> None:
        data = body.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        pass


def text(answer: Mapping[str, Any], encode: Callable[[Any], bytes] = openmetrics.generate_latest) -> str:
    """The answer to `metrics` as text, made by an encoder of the Prometheus client (default: OpenMetrics
    1.0)."""
    registry = CollectorRegistry()
    registry.register(_Collector(answer))
    return encode(registry).decode()


class _Collector:
    def __init__(self, answer: Mapping[str, Any]) -> None:
        """Paths in `answer` may have bytes that are not UTF-8. The encoders refuse them."""
        self._answer = {
            **answer,
            "mountpoint": printable(answer["mountpoint"]),
            "sources": [{**each, "name": printable(each["name"])} for each in answer["sources"]],
            "latencies": {printable(name): each for name, each in answer["latencies"].items()},
        }

    def collect(self) -> Iterator[Metric]:
        answer, cache = self._answer, self._answer["cache"]
        yield InfoMetricFamily(
            "ipfsfuse", "The mount", value={"version": answer["version"], "mountpoint": answer["mountpoint"]}
        )
        yield GaugeMetricFamily("ipfsfuse_healthy", "1 if nothing is degraded", answer["health"] == "healthy")
        yield GaugeMetricFamily("ipfsfuse_uptime_seconds", "Since the mount began", answer["uptime"])
        for key, about in _CACHE_BYTES.items():
            yield GaugeMetricFamily(f"ipfsfuse_cache_{key}_bytes", about, cache[key])
        for key, about in _CACHE_COUNTS.items():
            yield CounterMetricFamily(f"ipfsfuse_cache_{key}", about, cache[key])
        yield GaugeMetricFamily(
            "ipfsfuse_stalled_requests", "Requests that wait for a source", answer["stalled"]
        )
        yield _histogram(
            "ipfsfuse_event_loop_lag_seconds", "How late the event loop is", [], {(): answer["lag"]}
        )
        yield _histogram(
            "ipfsfuse_operation_seconds", "Calls of the kernel that Python answered", ["operation"],
            {(name,): each for name, each in answer["operations"].items()},
        )  # fmt: skip
        given = CounterMetricFamily("ipfsfuse_operation_bytes", "What those calls gave", labels=["operation"])
        for name, count in answer["operation_bytes"].items():
            given.add_metric([name], count)
        yield given
        yield GaugeMetricFamily("ipfsfuse_pins", "CIDs kept until they are unpinned", answer["pinned"])
        yield _histogram(
            "ipfsfuse_source_seconds", "Verified blocks", ["source"],
            {(name,): each for name, each in answer["latencies"].items()},
        )  # fmt: skip
        for key, about in _SOURCE_COUNTS.items():
            family = CounterMetricFamily(f"ipfsfuse_source_{key}", about, labels=["source"])
            for source in answer["sources"]:
                family.add_metric([source["name"]], source[key])
            yield family
        failures = CounterMetricFamily("ipfsfuse_source_failures", "By kind", labels=["source", "kind"])
        state = GaugeMetricFamily("ipfsfuse_source_up", "1 unless open or quarantined", labels=["source"])
        for source in answer["sources"]:
            state.add_metric([source["name"]], source["state"] not in ("open", "quarantined"))
            for kind, count in source["failures"].items():
                failures.add_metric([source["name"], kind], count)
        yield failures
        yield state
        up = GaugeMetricFamily("ipfsfuse_node_up", "1 if the node takes pins", labels=["node"])
        held = GaugeMetricFamily("ipfsfuse_node_held", "CIDs held at the node", labels=["node"])
        queued = GaugeMetricFamily("ipfsfuse_node_queued", "CIDs that wait to be held there", labels=["node"])
        for node, each in answer["pins"].items():
            up.add_metric([node], not each["failing"])
            held.add_metric([node], each["held"])
            queued.add_metric([node], each["queued"])
        yield from (up, held, queued)


_CACHE_BYTES = {
    "budget": "As configured", "effective_budget": "Less where the disk is too full", "reserve": "Left free",
    "free": "Free on the disk", "used": "On disk", "pinned": "Pinned",
}  # fmt: skip
_CACHE_COUNTS = {
    "hits": "Blocks and leaves read from the disk", "misses": "Blocks and leaves asked of sources",
    "evictions": "What left to make room",
}  # fmt: skip
_SOURCE_COUNTS = {
    "requests": "Requests", "blocks": "Verified blocks", "bytes": "Verified bytes",
    "absent": "Blocks it lacked", "wrong": "Wrong blocks", "hedges": "Asked because another was slow",
}  # fmt: skip


def _histogram(
    name: str, about: str, labels: list[str], values: Mapping[tuple[str, ...], Mapping[str, Any]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, about, labels=labels)
    for key, each in values.items():
        total, buckets = 0, []
        for bound, count in zip([*map(str, each["bounds"]), "+Inf"], each["counts"], strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(list(key), buckets, each["sum"])
    return family
