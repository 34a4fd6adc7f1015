"""`push`: sends a DAG to a Kubo node, in CARs of some blocks each, and pins it there.

Concurrency: one task per push. It asks the node about some blocks in parallel, so that blocks of an earlier
push are not sent again.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio

from ipfsfuse.dag import car, dagpb
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.traversal import BlockWalk, Unexpanded
from ipfsfuse.errors import NotHere, SourceFailed
from ipfsfuse.importer.cars import links
from ipfsfuse.importer.export import GetBlock, verified
from ipfsfuse.sources.http.kubo import Rpc

_TOGETHER = 32
"""Blocks that the node is asked about together."""
_ASKED_TOGETHER = 8
"""Requests to the node at a time. With more it answers no faster."""
_BATCH = 8 << 20
"""Bytes of blocks that are sent in one CAR."""
_ROUNDS = 3
"""How often blocks are sent, in case the node's garbage collection removes some meanwhile."""
_ANSWER = 4 << 20
"""Bytes of the answer to a pin, which reports its progress twice a second."""

PushProgress = Callable[[int, int | None], None]
"""Called with the bytes done so far, and the bytes in all as the root's links claim."""


class Pushed(NamedTuple):
    """The numbers of blocks and bytes that were sent, and of blocks that the node had already."""

    blocks: int
    bytes: int
    present: int


async def push(root: Cid, get: GetBlock, node: Rpc, progress: PushProgress) -> Pushed:
    """Sends the blocks of the DAG `root` that the node does not have, and pins `root` there recursively.

    After a failure, the next push goes on where this one ended, unless the node collects its garbage in
    between. Raises what `get` raises, WrongBlock, Malformed, Unsupported for a codec whose links can't be
    read, and SourceFailed."""
    job = _Pusher(root, get, node, progress)
    for last in [False] * (_ROUNDS - 1) + [True]:
        await job.send_all()
        try:
            await _pin(root, node)
            break
        except NotHere as exc:
            if last:
                raise SourceFailed(
                    f"{node.name} lost blocks while it got others: push again while it collects no garbage",
                    "node",
                ) from exc
    return Pushed(job.blocks, job.bytes, job.present)


async def _pin(root: Cid, node: Rpc) -> None:
    """Pins `root`. Raises NotHere if the node lacks a block."""
    text = cids.text(root)
    answer = await node.call("pin/add", [("arg", text), ("progress", "true"), ("offline", "true")], _ANSWER)
    try:
        pins = [str(pin) for line in answer.splitlines() for pin in json.loads(line).get("Pins") or ()]
        if [cids.canonical(cids.parse(pin)) for pin in pins] == [cids.canonical(root)]:
            return
    except Exception as exc:  # the node may send anything
        raise SourceFailed(f"{node.name} pin/add: its answer can't be understood", "node") from exc
    raise NotHere(f"{node.name}: the pin of {text} was not made")  # the pin failed after the answer had begun


class _Pusher:
    def __init__(self, root: Cid, get: GetBlock, node: Rpc, progress: PushProgress) -> None:
        self.blocks = self.bytes = self.present = 0
        self._root, self._get, self._node, self._progress = root, get, node, progress
        self._done = 0
        self._total: int | None = None
        self._batch: list[bytes] = []
        self._waiting = 0

    async def send_all(self) -> None:
        self._done = self.present = 0
        walk = BlockWalk([self._root], None)
        while items := walk.take(_TOGETHER):
            present = await self._present([item.cid for item in items])
            below: list[Cid] = []
            for item in items:
                below += await self._one(item, item.cid in present)
            walk.add(below, None)
        await self._send()

    async def _one(self, item: Unexpanded[None], present: bool) -> list[Cid]:
        """Sends one block if it is not `present`. Returns its links."""
        cid = item.cid
        if present and cids.codec(cid) == cids.RAW:
            self.present += 1
            return []
        block = await verified(cid, self._get)
        if self._total is None:
            self._total = _claimed(cid, block)
        if present:
            self.present += 1
        elif cids.inline_block(cid) is None:
            section = car.section_head(cid, len(block)) + block
            self._batch.append(section)
            self._waiting += len(section)
            self.blocks += 1
            self.bytes += len(block)
            if self._waiting >= _BATCH:
                await self._send()
        self._done += len(block)
        self._progress(self._done, self._total)
        return links(cid, block)

    async def _present(self, wanted: Sequence[Cid]) -> set[Cid]:
        """Those of `wanted` that the node itself has."""
        found: set[Cid] = set()
        limit = trio.Semaphore(_ASKED_TOGETHER)
        failed: list[Exception] = []

        async def one(cid: Cid, scope: trio.CancelScope) -> None:
            async with limit:
                try:
                    answer = await self._node.call(
                        "block/stat", [("arg", cids.text(cid)), ("offline", "true")]
                    )
                    found.add(cid)
                    if cids.codec(cid) == cids.RAW:
                        self._done += _size(answer)
                except NotHere:
                    pass
                except Exception as exc:
                    failed.append(exc)
                    scope.cancel()

        async with trio.open_nursery() as nursery:
            for cid in wanted:
                if cids.inline_block(cid) is None:
                    nursery.start_soon(one, cid, nursery.cancel_scope)
        if failed:
            raise failed[0]
        return found

    async def _send(self) -> None:
        if self._batch:
            data = b"".join([car.encode_header([self._root]), *self._batch])
            self._batch, self._waiting = [], 0
            await self._node.call("dag/import", [("pin-roots", "false"), ("silent", "true")], file=data)


def _size(answer: bytes) -> int:
    """Bytes of a block according to the node; 0 if that is not a possible size."""
    try:
        size = json.loads(answer)["Size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return size if type(size) is int and 0 < size <= cids.MAX_BLOCK else 0


def _claimed(cid: Cid, block: bytes) -> int | None:
    """Bytes of the whole DAG, as its root's links claim."""
    if cids.codec(cid) != cids.DAG_PB:
        return None
    return len(block) + sum(link.tsize for link in dagpb.decode(block).links)
