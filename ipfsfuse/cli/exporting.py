"""`ipfsfuse export`: a DAG to a CAR file, from the library and other sources, and from a running mount's cache."""

import argparse
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import trio

from ipfsfuse import adding
from ipfsfuse.cli import cidargs, folders, values
from ipfsfuse.cli.progress import Progress
from ipfsfuse.control import client, socket_path
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import DaemonFailed, Unavailable
from ipfsfuse.sources.chain import Chain
from ipfsfuse.sources.parse import OpenSettings, open_source, parse_sources

DEADLINE = 30.0
"""Seconds for one block."""


def run(arguments: argparse.Namespace) -> int:
    return trio.run(_run, arguments)


async def _run(arguments: argparse.Namespace) -> int:
    cid, file = cidargs.one(arguments.cid), Path(arguments.file)
    cache_dir = folders.cache_dir(arguments.cache_dir)
    async with _chain(arguments, cache_dir) as chain:

        async def get(wanted: Cid) -> bytes:
            try:
                with trio.fail_after(DEADLINE):
                    return (await chain.get(wanted)).block
            except (Unavailable, trio.TooSlowError) as exc:
                block = await trio.to_thread.run_sync(_from_mount, socket_path(cache_dir), wanted)
                if block is None:
                    raise Unavailable(f"{cids.text(wanted)} is in no source and no running mount: name one that has it with --from") from exc
                return block

        with Progress("exporting") as progress:
            size = await adding.export(cid, get, file, arguments.v2, lambda _blocks, written: progress({"done": written}))
    print(f"exported {cids.text(cid)} to {file}, {values.human(size)}")
    return 0


@asynccontextmanager
async def _chain(arguments: argparse.Namespace, cache_dir: Path) -> AsyncIterator[Chain]:
    settings = OpenSettings(folders.library(arguments.library), cache_dir / "indexes")
    async with AsyncExitStack() as stack:
        sources = []
        for spec in parse_sources(arguments.sources or ["library"]):
            source = await trio.to_thread.run_sync(open_source, spec, settings)
            if source is not None:
                stack.push_async_callback(source.aclose)
                sources.append(source)
        yield Chain(sources)


def _from_mount(control: Path, cid: Cid) -> bytes | None:
    """The block as a running mount has it or gets it; None where no mount runs."""
    try:
        return base64.b64decode(client.call(control, "block", cid=cids.text(cid))["data"])
    except DaemonFailed:
        return None
