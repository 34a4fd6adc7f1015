"""A Kubo node's own file tree (MFS), as far as pins need it: seven small commands of its RPC API.

Whatever stands there, with all below it that the node has, its garbage collection keeps; nothing here makes the node
fetch anything. Concurrency: any number of tasks; every call ends within `PATIENCE`.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, NotACid, NotHere, SourceFailed

PATIENCE = 10.0
"""Seconds for one command. All are local to the node and take milliseconds; a node that hangs is found out by this."""
MAX_LISTING = 16 << 20
MAX_FILE = 64 << 10
COLLECTED = "collected"
"""The kind of failure where the node's garbage collection took a block before it was linked."""
_NO_ENTRY = "does not exist"

Arguments = Sequence[tuple[str, str]]


class NodeRpc(Protocol):
    """POST /api/v0/`command`, arguments percent-encoded in the query (`sources.rpc.Rpc`)."""

    async def call(
        self, command: str, arguments: Arguments = (), limit: int = ..., body: bytes = b"", headers: Sequence[tuple[str, str]] = ()
    ) -> bytes: ...


class NodeFiles:
    """`rpc` is asked anew for each call, since a node may come back elsewhere.

    Every method raises SourceFailed where the node does not answer, refuses, or answers something else."""

    def __init__(self, rpc: Callable[[], NodeRpc]) -> None:
        self._rpc = rpc
        self.requests = 0

    async def put(self, cid: Cid, block: bytes) -> None:
        """Stores a block, unprotected until it is linked."""
        mark = secrets.token_hex(16)
        head = f'--{mark}\r\nContent-Disposition: form-data; name="data"; filename="data"\r\nContent-Type: application/octet-stream\r\n\r\n'
        body = b"".join((head.encode(), block, f"\r\n--{mark}--\r\n".encode()))
        codec = "raw" if cids.codec(cid) == cids.RAW else "dag-pb"
        arguments = [("cid-codec", codec), ("mhtype", "sha2-256"), ("pin", "false")]
        answer = await self._call("block/put", arguments, body=body, headers=[("Content-Type", f"multipart/form-data; boundary={mark}")])
        with _understood("block/put"):
            if cids.canonical(cids.parse(json.loads(answer)["Key"])) != cid:
                raise SourceFailed("the node stored another block than it was sent", "node")

    async def has(self, cid: Cid) -> bool:
        """Whether the node itself has the block: it asks no other."""
        try:
            await self._call("block/stat", [("arg", cids.text(cid)), ("offline", "true")])
            return True
        except NotHere:
            return False

    async def link(self, cid: Cid, path: str, *, parents: bool = False) -> None:
        """Makes `path` name `cid`, whose block must be at the node (what it links need not).

        While garbage is collected this waits, and then the block may be gone: SourceFailed of kind `COLLECTED`."""
        arguments = [("arg", f"/ipfs/{cids.text(cid)}"), ("arg", path), ("offline", "true")]
        try:
            await self._call("files/cp", arguments + [("parents", "true")] * parents)
        except NotHere as exc:
            raise SourceFailed(str(exc), "node" if _NO_ENTRY in str(exc) else COLLECTED) from exc

    async def remove(self, path: str) -> None:
        """Removes the entry and all below; there need not be any."""
        try:
            await self._call("files/rm", [("arg", path), ("force", "true")])
        except NotHere:
            pass

    async def entries(self, path: str) -> dict[str, Cid]:
        """The names in a folder and what they link; nothing for one that does not exist."""
        try:
            answer = await self._call("files/stat", [("arg", path), ("offline", "true")])
            with _understood("files/stat"):
                root = str(json.loads(answer)["Hash"])
            options = [("resolve-type", "false"), ("size", "false"), ("offline", "true")]
            answer = await self._call("ls", [("arg", f"/ipfs/{root}"), *options], MAX_LISTING)
        except NotHere:
            return {}
        with _understood("ls"):
            links = json.loads(answer)["Objects"][0]["Links"] or []
            return {str(link["Name"]): cids.canonical(cids.parse(link["Hash"])) for link in links}

    async def read(self, path: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            return await self._call("files/read", [("arg", path), ("offline", "true")])
        except NotHere:
            return None

    async def _call(self, command: str, arguments: Arguments, limit: int = MAX_FILE, body: bytes = b"", headers: Arguments = ()) -> bytes:
        self.requests += 1
        with trio.move_on_after(PATIENCE):
            try:
                return await self._rpc().call(command, arguments, limit, body, headers)
            except SourceFailed as exc:
                if _NO_ENTRY in str(exc) and exc.kind == "node":
                    raise NotHere(str(exc)) from exc
                raise
        raise SourceFailed(f"the node did not answer {command} within {PATIENCE:g} s", "timeout")


@contextmanager
def _understood(command: str) -> Iterator[None]:
    try:
        yield
    except IpfsFuseError as exc:
        if isinstance(exc, NotACid):
            raise SourceFailed(f"the node's answer to {command} can't be understood: {exc}", "node") from exc
        raise
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise SourceFailed(f"the node's answer to {command} can't be understood", "node") from exc
