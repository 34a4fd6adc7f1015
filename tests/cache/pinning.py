"""Helpers for the tests of pins at a real node. The pins run in this process, or in a child that is
killed."""

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from ipfsfuse.cache.pins.kubo_pins import KuboPins
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.cache.pins.mfs import Mfs
from ipfsfuse.cache.store.folder import lock_folder
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.sources.http.client import Http, HttpSettings
from ipfsfuse.sources.http.kubo import Rpc
from ipfsfuse.sources.http.origin import parse_origin
from tests.kubo.node import Node

PATIENCE = 60.0
"""The longest wait in seconds. On an idle machine the waits take milliseconds."""


@asynccontextmanager
async def pinning(
    node: Node | str,
    folder: Path,
    staged: Iterable[Cid] = (),
    pinned: Iterable[Cid] = (),
    is_staged: Callable[[Cid], object] = lambda _cid: False,
) -> AsyncIterator[KuboPins]:
    """A context manager with the pins of a mount at a node, or at the URL of the node's RPC API. `folder` is
    the mount's cache folder. At the end of the block the pins rest. `staged`, `pinned` and `is_staged` say
    what the mount finds in its cache folder at its start."""
    async with rpc_of(node) as rpc:
        with lock_folder(folder):
            pins = KuboPins("kubo", Mfs(lambda: rpc), MountId.open(folder))
            pins.reconcile(staged, pinned, is_staged, NoCopies())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pins.run)
                yield pins
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def rpc_of(node: Node | str) -> AsyncIterator[Rpc]:
    http = Http(parse_origin(node if isinstance(node, str) else node.api_url), HttpSettings())
    try:
        yield Rpc(http, "kubo")
    finally:
        with trio.CancelScope(shield=True):
            await http.aclose()


async def settled(pins: KuboPins) -> None:
    """Waits until the node holds all that the mount wants it to hold."""
    with trio.fail_after(PATIENCE):
        while pins._changed.is_set() or pins._busy.locked() or pins._failing:  # noqa: ASYNC110
            await trio.sleep(0.005)


class NoCopies:
    """A mount that has no copies of blocks that a node may have lost."""

    def is_file_root(self, cid: Cid) -> bool:
        return False

    async def copy(self, cid: Cid, node: str) -> None:
        return None


def mounts(node: Node) -> list[str]:
    """The names of the mounts' folders at the node."""
    return sorted(entry["Name"] for entry in node.rpc("files/ls", arg="/ipfsfuse")["Entries"] or [])


def folder_of(node: Node, mount: str) -> dict[str, str]:
    """A mount's batches at the node: name -> CID."""
    entries = node.rpc("files/ls", arg=f"/ipfsfuse/{mount}", long=True)["Entries"] or []
    return {entry["Name"]: entry["Hash"] for entry in entries if entry["Name"] != "lease"}


def held(node: Node, mount: str, prefix: str = "staged-") -> list[Cid]:
    """The CIDs that a mount's batches link, one for each link."""
    batches = [cid for name, cid in folder_of(node, mount).items() if name.startswith(prefix)]
    links = [
        link
        for cid in batches
        for link in node.rpc("ls", arg=cid, resolve_type=False, size=False)["Objects"][0]["Links"]
    ]
    return [cids.canonical(cids.parse(link["Hash"])) for link in links]


CHILD = """
import sys, trio
from pathlib import Path
from ipfsfuse.cache.pins import kubo_pins
from tests.cache.pinning import pinning, settled
from ipfsfuse.dag import cid as cids

kubo_pins.COLLECT_SECONDS = 0.02

async def main():
    async with pinning(sys.argv[1], Path(sys.argv[2])) as pins:
        {body}
        await trio.sleep_forever()

trio.run(main)
"""


def child(node: Node, folder: Path, *body: str) -> "subprocess.Popen[str]":
    """A process with its own pins. It runs the lines of `body`, and then waits to be killed."""
    code = CHILD.replace("{body}", "\n        ".join(body))
    return subprocess.Popen(
        [sys.executable, "-c", code, node.api_url, str(folder)], stdout=subprocess.PIPE, text=True
    )


def until(condition: Callable[[], bool], message: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.01)


def add(node: Node, data: bytes, *options: str) -> Cid:
    """Adds content that nothing at the node protects from its garbage collection."""
    return cids.parse(node.add(data, "--pin=false", *options))


def made_up(index: int) -> Cid:
    return cids.make(cids.RAW, b"\x12\x20" + index.to_bytes(32, "big", signed=True))


def blocks(texts: Iterable[str]) -> set[bytes]:
    return {cids.multihash(cids.parse(text)) for text in texts}


def has(node: Node, cid: Cid) -> bool:
    return node.has(cids.text(cid))
