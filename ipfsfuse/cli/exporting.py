"""`ipfsfuse export`: a DAG to a CAR file, from the library and other sources, and from a running mount's cache."""

import argparse
import base64
import os
from pathlib import Path

import trio

from ipfsfuse import adding
from ipfsfuse.adding.exporting import GetBlock
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import folders, values
from ipfsfuse.cli.progress import Progress
from ipfsfuse.control import client
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import DaemonFailed, Unavailable
from ipfsfuse.sources.chain.chain import Chain
from ipfsfuse.sources.opening import opened
from ipfsfuse.sources.parse import OpenSettings

DEADLINE = 30.0
"""Seconds for one block."""


def run(arguments: argparse.Namespace) -> int:
    cache_dir = folders.cache_dir(arguments.cache_dir)
    with_cars = any(os.path.exists(source) for source in arguments.sources or ())
    indexes = cache_folder.indexes(cache_dir) if with_cars else cache_dir  # only CAR files need that folder
    return trio.run(_run, arguments, cache_dir, indexes)


async def _run(arguments: argparse.Namespace, cache_dir: Path, indexes: Path) -> int:
    cid, file = cid_alone(arguments.cid), Path(arguments.file)
    with Progress("indexing") as indexing, Progress("exporting") as progress:
        settings = OpenSettings(folders.library(arguments.library), indexes, progress=indexing.of_file)
        async with opened(arguments.sources or ["library"], settings) as sources:
            get = _getter(Chain(sources), cache_folder.socket_path(cache_dir))
            size = await adding.export(cid, get, file, arguments.v2, lambda _blocks, written: progress({"done": written}))
    print(f"exported {cids.text(cid)} to {file}, {values.human(size)}")
    return 0


def _getter(chain: Chain, control: Path) -> GetBlock:
    """Asks the sources, then a running mount, which has its cache and sources of its own."""

    async def get(wanted: Cid) -> bytes:
        try:
            with trio.fail_after(DEADLINE):
                return (await chain.get(wanted)).block
        except (Unavailable, trio.TooSlowError) as exc:
            block = await trio.to_thread.run_sync(_from_mount, control, wanted, abandon_on_cancel=True)
            if block is None:
                raise Unavailable(f"{cids.text(wanted)} is in no source and no running mount: name one that has it with --from") from exc
            return block

    return get


def _from_mount(control: Path, cid: Cid) -> bytes | None:
    """The block as a running mount has it or gets it; None where no mount runs."""
    try:
        return base64.b64decode(client.call(control, "block", cid=cids.text(cid))["data"])
    except DaemonFailed:
        return None
