"""One mount's folder in a node's file tree: what `kubopins` wants is done here, request by request.

Every request is tried three times. Concurrency: one task at a time; `KuboPins` sees to that.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import trio

from ipfsfuse.cache.pins import batches
from ipfsfuse.cache.pins.batches import Batches, Round
from ipfsfuse.cache.pins.nodefiles import COLLECTED, NodeFiles
from ipfsfuse.cache.pins.owners import RENEW, Owner
from ipfsfuse.cache.pins.pinstore import PinStore
from ipfsfuse.cache.pins.sweeping import OWNER, ROOT, sweep
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import SourceFailed
from ipfsfuse.fileio import threads

PAUSES = (0.2, 1.0)
"""Seconds between the three tries of one request."""


COLLECTIONS = 10
"""So many garbage collections may come between one block and its link."""

T = TypeVar("T")


class Holding:
    """Raises SourceFailed, from every method, after three tries."""

    def __init__(self, node: NodeFiles, store: PinStore) -> None:
        self._node = node
        self._store = store
        self._owner = Owner.this_process(store.folder)
        self._ours = False
        self._signed = -RENEW

    def _path(self, entry: str) -> str:
        return f"{ROOT}/{self._store.directory}/{entry}"

    async def look(self, shelves: Mapping[str, Batches]) -> None:
        """Takes the folder, and makes each shelf (by the prefix of its batches' names) agree with what stands there."""
        if not self._ours:
            await self._take_over()
        entries = await thrice(lambda: self._node.entries(f"{ROOT}/{self._store.directory}"))
        if OWNER not in entries:
            await self._sign(self._owner.now())
        for prefix, shelf in shelves.items():
            await self._agree(prefix, shelf, entries)

    async def _take_over(self) -> None:
        """The folder is ours, unless its owner may be alive: then our own side was copied, and we take a new name."""
        owner = Owner.parse(await thrice(lambda: self._node.read(self._path(OWNER))))
        same = owner is not None and (owner.pid, owner.started, owner.boot) == (self._owner.pid, self._owner.started, self._owner.boot)
        if owner is not None and not (owner.stopped or same or owner.proved_dead()):
            await threads.run_sync(self._store.rename)
        await self._sign(self._owner.now())
        self._ours = True
        await sweep(self._node, self._store.directory)

    async def _agree(self, prefix: str, shelf: Batches, entries: Mapping[str, Cid]) -> None:
        listed = {int(entry.removeprefix(prefix)): cid for entry, cid in entries.items() if _is_batch(entry, prefix)}
        known = dict(shelf.batches)
        blocks = await threads.run_sync(lambda: {number: _cid(cids.DAG_PB, batches.directory(known[number])) for number in known})
        right = {number for number, cid in blocks.items() if listed.get(number) == cid}
        shelf.restore(right, max(listed, default=0))
        for number in listed.keys() - right:
            await self.remove(f"{prefix}{number}")

    async def write(self, prefix: str, step: Round) -> None:
        """Writes the step's batches; nothing of the step may count as done before this returned."""
        for batch in step.writes:
            block = await threads.run_sync(batches.directory, batch.members)
            await self._place(block, cids.DAG_PB, f"{prefix}{batch.number}")

    async def drop(self, prefix: str, step: Round) -> None:
        for number in step.drops:
            await self.remove(f"{prefix}{number}")

    async def remove(self, entry: str = "") -> None:
        """Removes one entry, or the whole folder."""
        await thrice(lambda: self._node.remove(self._path(entry).rstrip("/")))

    async def sign_if_due(self) -> None:
        """Says that this mount lives, as often as `owners` demands."""
        if trio.current_time() - self._signed >= RENEW:
            await self._sign(self._owner.now())

    async def rest(self) -> None:
        """Leaves everything held for the next start of this mount."""
        await self._sign(self._owner.at_rest())

    async def _sign(self, owner: Owner) -> None:
        await self.remove(OWNER)
        await self._place(owner.encode(), cids.RAW, OWNER, parents=True)
        self._signed = trio.current_time()

    async def _place(self, block: bytes, codec: int, entry: str, *, parents: bool = False) -> None:
        cid, path = _cid(codec, block), self._path(entry)

        again = False

        async def once() -> None:
            nonlocal again
            if again:  # the last try may have got through, and its answer not
                await self._node.remove(path)
            again = True
            await self._put_and_link(block, cid, path, parents)

        await thrice(once)

    async def _put_and_link(self, block: bytes, cid: Cid, path: str, parents: bool) -> None:
        """A collection that runs makes the link wait and takes the block meanwhile: then at once again."""
        for left in range(COLLECTIONS, -1, -1):
            await self._node.put(cid, block)
            try:
                await self._node.link(cid, path, parents=parents)
                break
            except SourceFailed as exc:
                if not left or exc.kind != COLLECTED:
                    raise


async def thrice(call: Callable[[], Awaitable[T]]) -> T:
    """What `call` gives at one of three tries. Raises SourceFailed after the third."""
    for pause in PAUSES:
        try:
            return await call()
        except SourceFailed:
            await trio.sleep(pause)
    return await call()


def _is_batch(entry: str, prefix: str) -> bool:
    return entry.startswith(prefix) and entry.removeprefix(prefix).isdecimal()


def _cid(codec: int, block: bytes) -> Cid:
    return cids.make(codec, b"\x12\x20" + hashlib.sha256(block).digest())
