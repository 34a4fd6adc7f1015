"""One HTTP job of `scripts/bench http`, in a process of its own: prints seconds and CPU seconds of the
client, as JSON.

    python _http_jobs.py JOB URL PLAN.json

It runs with this tree on its path, or with an older one that still has `sources.web`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Leaf

try:
    from ipfsfuse.sources.base import LeafRange, Subtree
    from ipfsfuse.sources.http.client import Http
    from ipfsfuse.sources.http.gateway import Gateway
    from ipfsfuse.sources.http.origin import parse_origin
except ImportError:  # before httpx
    from ipfsfuse.sources.web.gateway import Gateway  # type: ignore[import-not-found,no-redef]
    from ipfsfuse.sources.web.http import Http  # type: ignore[import-not-found,no-redef]
    from ipfsfuse.sources.web.origin import parse_origin  # type: ignore[import-not-found,no-redef]

    from ipfsfuse.sources.base import Run as LeafRange  # type: ignore[attr-defined,no-redef]
    from ipfsfuse.sources.base import Subtree

CALLERS = 16
RANGE = 16
"""Leaves of 1 MiB that one request asks for."""


async def blocks(gateway: Gateway, plan: dict[str, Any]) -> None:
    left = iter([cids.parse(text) for text in plan["blocks"]])

    async def caller() -> None:
        for cid in left:
            await gateway.get(cid)

    async with trio.open_nursery() as nursery:
        for _ in range(CALLERS):
            nursery.start_soon(caller)


async def ranges(gateway: Gateway, plan: dict[str, Any]) -> None:
    leaves = [Leaf(cids.parse(text), at << 20, 1 << 20) for at, text in enumerate(plan["leaves"])]
    for start in range(0, len(leaves), RANGE):
        wanted = LeafRange(cids.parse(plan["file"]), len(leaves) << 20, leaves[start : start + RANGE])
        async with gateway.stream(wanted) as stream:
            async for delivery in stream:
                delivery.release()


async def directory(gateway: Gateway, plan: dict[str, Any]) -> None:
    async with gateway.subtree(Subtree(cids.parse(plan["directory"]), True, 1 << 30)) as stream:
        async for _blocks in stream:
            pass


JOBS = {"get-8KiB": blocks, "range-16MiB": ranges, "car-directory": directory}


async def main(job: str, url: str, plan: dict[str, Any]) -> None:
    gateway = Gateway(Http(parse_origin(url)), url, local=True)
    try:
        await gateway.get(cids.parse(plan["directory"]))  # connects
        begin, cpu = time.perf_counter(), time.process_time()
        await JOBS[job](gateway, plan)
        print(json.dumps({"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}))
    finally:
        await gateway.aclose()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
