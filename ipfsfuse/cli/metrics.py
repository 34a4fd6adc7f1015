"""`ipfsfuse metrics`: what a running mount counts, as OpenMetrics text; also in a file, or over HTTP.

The file is in Prometheus' own text format: the node exporter refuses OpenMetrics.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from prometheus_client.openmetrics import exposition as openmetrics_exposition

from ipfsfuse import client
from ipfsfuse.cli import console, folders
from ipfsfuse.errors import IpfsFuseError, StoreFailed, UsageError

METRICS_SECONDS = 10.0
OPENMETRICS = "application/openmetrics-text"
TYPES = {
    True: f"{OPENMETRICS}; version=1.0.0; charset=utf-8",
    False: "text/plain; version=0.0.4; charset=utf-8",
}
"""Of OpenMetrics, and of Prometheus' own format."""


def run(arguments: argparse.Namespace) -> int:
    control = folders.control_socket(arguments)
    if arguments.listen is not None and arguments.textfile is not None:
        raise UsageError("metrics takes --listen or --textfile, not both")
    if arguments.listen is not None:
        return _serve(control, arguments.listen, arguments.json)
    answer = client.call(control, "metrics", timeout=METRICS_SECONDS)
    if arguments.textfile is not None:
        _write(Path(arguments.textfile), text(answer, openmetrics=False))
        if arguments.json:
            console.values({"written": arguments.textfile})
    elif arguments.json:
        console.values(answer)
    else:
        for line in text(answer).splitlines():
            console.line(line)
    return 0


def _write(path: Path, content: str) -> None:
    """By a rename, because the node exporter may read at any time."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_text(content)
        fresh.replace(path)
    except OSError as exc:
        raise StoreFailed(f"{path} can't be written: {exc.strerror}") from exc


def _serve(control: Path, listen: str, as_json: bool) -> int:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{listen} is not HOST:PORT: write it as 127.0.0.1:9710")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = OPENMETRICS in self.headers.get("Accept", "")  # as Prometheus asks
            try:
                body = text(client.call(control, "metrics", timeout=METRICS_SECONDS), wanted).encode()
                code = 200
            except IpfsFuseError as exc:
                body, code = f"{exc}\n".encode(), 503
            self.send_response(code)
            self.send_header("Content-Type", TYPES[wanted] if code == 200 else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host.strip("[]"), int(port)), Handler)
    except OSError as exc:
        raise UsageError(f"--listen {listen}: {exc.strerror or exc}") from exc
    with server:
        url = f"http://{host}:{server.server_address[1]}/metrics"
        if as_json:
            console.values({"listening": [url], "pid": os.getpid()}, indent=None)
        else:
            console.line(f"serving metrics at {url}")
        console.flush()
        server.serve_forever()
    return 0


def text(answer: Mapping[str, Any], openmetrics: bool = True) -> str:
    """The answer to `metrics` as text: OpenMetrics 1.0, else Prometheus' format 0.0.4."""
    registry = CollectorRegistry()
    registry.register(_Collector(answer))
    generate: Any = openmetrics_exposition.generate_latest if openmetrics else generate_latest
    made: bytes = generate(registry)
    return made.decode()


class _Collector:
    def __init__(self, answer: Mapping[str, Any]) -> None:
        self._answer = answer

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
