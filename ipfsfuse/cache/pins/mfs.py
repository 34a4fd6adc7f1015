"""A Kubo node's own file tree (MFS), as far as pins need it: a few commands of its RPC API.

The node's garbage collection leaves alone what stands in this tree, with all below it that the node has.
Nothing here makes the node fetch anything. Concurrency: any number of tasks; one try of a command ends within
`REQUEST_TIMEOUT`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, NotHere, SourceFailed, Unsupported, WrongBlock
from ipfsfuse.fileio import threads

REQUEST_TIMEOUT = 10.0
"""Seconds for one try of a command. All are local to the node and take milliseconds: a node that hangs is
found out."""
PAUSES = (0.2, 1.0)
"""Seconds between the three tries of a command."""
COLLECTIONS = 30
"""How many garbage collections may come between one block and its link."""
MAX_ANSWER = 64 << 10
MAX_LISTING = 4 << 20
"""Bytes of a folder's listing: some 35,000 entries. A mount with a million pins has 1,000 to 6,000."""
MAX_BLOCK = 1 << 20
"""Twice what 1,000 links to the longest CIDs take."""
_NO_ENTRY = "does not exist"

Pairs = Sequence[tuple[str, str]]


class NodeRpc(Protocol):
    """POST /api/v0/`command`, arguments percent-encoded in the query (`sources.http.kubo`).

    Raises NotHere where the node says that it can't find something. Otherwise SourceFailed, of kind "node"
    for what the node says itself, and of kind "long" for an answer of more than `limit` bytes."""

    async def call(
        self, command: str, arguments: Pairs = (), limit: int = ..., file: bytes | None = None
    ) -> bytes: ...


class Mfs:
    """The file tree of one node. `rpc` is asked anew for each try, since a node may come back at another
    address.

    Each command is tried three times. Every method raises SourceFailed where the node does not answer,
    refuses, or answers something else."""

    def __init__(self, rpc: Callable[[], NodeRpc]) -> None:
        self._rpc = rpc
        self.requests = 0

    async def put(self, cid: Cid, block: bytes) -> None:
        """Stores a block, unprotected until it is linked."""
        codec = "raw" if cids.codec(cid) == cids.RAW else "dag-pb"
        arguments = [("cid-codec", codec), ("mhtype", "sha2-256"), ("pin", "false")]
        answer = await self._call("block/put", arguments, file=block)
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

    async def block(self, cid: Cid) -> bytes | None:
        """A verified block of at most `MAX_BLOCK` bytes that the node itself has; None for any other."""
        try:
            block = await self._call("block/get", [("arg", cids.text(cid)), ("offline", "true")], MAX_BLOCK)
            cids.verify(cid, block)
        except (NotHere, WrongBlock, Unsupported):
            return None
        except SourceFailed as exc:
            if exc.kind == "long":
                return None
            raise
        return block

    async def read(self, cid: Cid) -> bytes | None:
        """The first 64 KiB of a file; None for what is not a file, and for a file that the node does not have
        itself."""
        arguments = [("arg", f"/ipfs/{cids.text(cid)}"), ("length", str(MAX_ANSWER)), ("offline", "true")]
        try:
            return await self._call("cat", arguments)
        except NotHere:
            return None
        except SourceFailed as exc:
            if exc.kind == "node":
                return None
            raise

    async def write(self, path: str, data: bytes) -> None:
        """Makes `path` a file that holds `data`, in place of whatever stands there. Folders above it are
        made."""
        arguments = [("arg", path), ("create", "true"), ("truncate", "true"), ("parents", "true")]
        try:
            await self._call("files/write", arguments, file=data)
        except (NotHere, SourceFailed):  # a folder of that name, or a file whose block the node has lost
            await self.remove(path)
            try:
                await self._call("files/write", arguments, file=data)
            except NotHere as exc:
                raise SourceFailed(str(exc), "node") from exc

    async def place(self, cid: Cid, block: bytes, path: str) -> None:
        """Stores a directory's block and makes `path` name it; what it links need not be at the node."""
        tries, collections = len(PAUSES), COLLECTIONS
        while True:
            try:
                await self.put(cid, block)
                await self._once(
                    "files/cp", [("arg", f"/ipfs/{cids.text(cid)}"), ("arg", path), ("offline", "true")]
                )
                return
            except NotHere as exc:  # a collection that runs made the link wait, and took the block meanwhile
                if not collections or _NO_ENTRY in str(exc):  # or else the folder is gone
                    raise SourceFailed(str(exc), "node") from exc
                collections -= 1
            except SourceFailed:
                if not tries:
                    raise
                await trio.sleep(PAUSES[-tries])
                tries -= 1
                await self.remove(path)  # that try may have got through, and its answer not

    async def remove(self, path: str) -> None:
        """Removes the entry and all below it; there need not be any."""
        with suppress(NotHere):
            await self._call("files/rm", [("arg", path), ("force", "true")])

    async def entries(self, path: str) -> dict[str, Cid]:
        """The names in a folder and what they link; nothing for a folder that does not exist."""
        try:
            answer = await self._call("files/stat", [("arg", path), ("offline", "true")])
            with _understood("files/stat"):
                found = json.loads(answer)
                root, kind = str(found["Hash"]), str(found["Type"])
            if kind != "directory":
                raise SourceFailed(f"{path} is not a directory", "node")
            options = [("resolve-type", "false"), ("size", "false"), ("offline", "true")]
            answer = await self._call("ls", [("arg", f"/ipfs/{root}"), *options], MAX_LISTING)
        except NotHere:
            return {}
        except SourceFailed as exc:
            if exc.kind == "long":
                why = f"{path} in the node's MFS has too many entries: look who else writes there"
            elif exc.kind == "node" and "ot a directory" in str(exc):
                why = f"{path} in the node's MFS, or its parent, is a file: move it away with `ipfs files mv`"
            else:
                raise
            raise SourceFailed(why, exc.kind) from exc
        with _understood("ls"):
            return await threads.run_sync(_links, answer)

    async def _call(
        self, command: str, arguments: Pairs, limit: int = MAX_ANSWER, file: bytes | None = None
    ) -> bytes:
        for pause in PAUSES:
            try:
                return await self._once(command, arguments, limit, file)
            except SourceFailed as exc:
                if exc.kind == "long":  # as it will be the next time
                    raise
                await trio.sleep(pause)
        return await self._once(command, arguments, limit, file)

    async def _once(
        self, command: str, arguments: Pairs, limit: int = MAX_ANSWER, file: bytes | None = None
    ) -> bytes:
        self.requests += 1
        with trio.move_on_after(REQUEST_TIMEOUT):
            try:
                return await self._rpc().call(command, arguments, limit, file)
            except SourceFailed as exc:
                if _NO_ENTRY in str(exc) and exc.kind == "node":
                    raise NotHere(str(exc)) from exc
                raise
        raise SourceFailed(f"the node did not answer {command} within {REQUEST_TIMEOUT:g} s", "timeout")


def _links(answer: bytes) -> dict[str, Cid]:
    links = json.loads(answer)["Objects"][0]["Links"] or []
    return {str(link["Name"]): cids.canonical(cids.parse(link["Hash"])) for link in links}


@contextmanager
def _understood(command: str) -> Iterator[None]:
    try:
        yield
    except (NotACid, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as exc:
        raise SourceFailed(f"the node's answer to {command} can't be understood", "node") from exc
