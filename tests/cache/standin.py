"""Sources for the cache's tests: they have blocks in memory, and answer or fail as a test says."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import trio

from ipfsfuse.cache.base import CacheItem, FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import varint
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import NotHere, Unavailable
from ipfsfuse.sources.base import Fetched, LeafRange, Source, Subtree, Verified, Wanted
from ipfsfuse.sources.streams import Send, Stream, nothing, streaming


class MemorySource(Source):
    """The `Fetched.source` of all blocks of a `Chain`."""

    def __init__(self, name: str, in_place: bool) -> None:
        self.name = name
        self.in_place = in_place

    async def get(self, cid: Cid) -> bytes:
        raise NotHere(cids.text(cid))

    async def aclose(self) -> None:
        pass


class Chain:
    """A `BlockFetcher` with the blocks of a dict. `asked` lists every CID in the order in which it was asked
    for. CIDs in `stalled` never come."""

    def __init__(self, in_place: bool = False) -> None:
        self.source = MemorySource("memory", in_place)
        self.blocks: dict[bytes, bytes] = {}
        self.asked: list[Cid] = []
        self.runs: list[LeafRange] = []
        self.stalled: set[Cid] = set()
        self.delay = 0.0
        self.cancelled: list[Cid] = []
        self.sends: list[Cid | trio.Event] = []
        """What one answer with the blocks of a directory sends, in order. At an event it waits until the
        event is set."""
        self.subtrees: list[Subtree] = []
        self.sent: list[Cid] = []
        """The blocks of such answers that were wanted."""

    def add(self, block: bytes, codec: int = cids.RAW) -> Cid:
        cid = cids.make(codec, b"\x12\x20" + hashlib.sha256(block).digest())
        self.blocks[cids.multihash(cid)] = block
        return cid

    async def get(self, cid: Cid) -> Fetched:
        self.asked.append(cid)
        try:
            await trio.sleep(self.delay)
            if cid in self.stalled:
                await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.append(cid)
            raise
        if cids.multihash(cid) not in self.blocks:
            raise Unavailable(f"{cids.text(cid)}: no source has it")
        return Fetched(self.blocks[cids.multihash(cid)], self.source)

    def stream(self, wanted: LeafRange) -> Stream[Verified]:
        self.runs.append(wanted)
        return streaming(partial(self._send_leaves, wanted))

    async def _send_leaves(self, wanted: LeafRange, send: Send[Verified]) -> None:
        for index, leaf in enumerate(wanted.leaves):
            fetched = await self.get(leaf.cid)
            await send.send(Verified(index, [fetched.block], fetched.source, nothing))

    def subtree(self, subtree: Subtree, wanted: Wanted) -> Stream[Mapping[Cid, Fetched]]:
        """Sends up to two blocks together."""
        self.subtrees.append(subtree)
        return streaming(partial(self._send_subtree, wanted))

    async def _send_subtree(self, wanted: Wanted, send: Send[Mapping[Cid, Fetched]]) -> None:
        together: dict[Cid, Fetched] = {}
        for each in self.sends:
            if not isinstance(each, trio.Event) and wanted.wants(each):
                self.sent.append(each)
                together[each] = Fetched(self.blocks[cids.multihash(each)], self.source)
                wanted.came(each, together[each].block)
            if together and (len(together) == 2 or isinstance(each, trio.Event)):
                await send.send(together)
                together = {}
            if isinstance(each, trio.Event):
                await each.wait()
        await send.send(together)

    def answers_so_far(self, cid: Cid) -> str:
        return ""

    def roots(self) -> Sequence[Cid]:
        return ()


class Recorder:
    """Pins that only record what they are asked to do, in order."""

    anywhere = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, Cid]] = []

    def add(self, cid: Cid) -> None:
        self.asked.append(("add", cid))

    def remove(self, cid: Cid) -> None:
        self.asked.append(("remove", cid))

    def state(self, cid: Cid) -> str:
        return "cache" if ("add", cid) in self.asked else ""


def dag_pb_leaf(content: bytes) -> bytes:
    """A leaf as Kubo writes it without raw leaves."""
    size = varint.put(len(content))
    message = b"\x08\x02\x12" + size + content + b"\x18" + size
    return b"\x0a" + varint.put(len(message)) + message


def staged_items(cache: PinsetCache) -> list[CacheItem]:
    """The staging files, the last used first."""
    items = [cache.store.item_of(cid) for cid in cache.store.staging.entries]
    return sorted((item for item in items if item is not None), key=lambda item: -item.last_used)


def staged(folder: Path, kind: str) -> list[Path]:
    """The files in one of the cache's folders, `staging` or `packs`."""
    return sorted((folder / kind).iterdir())


def staged_bytes(cache: PinsetCache, cid: Cid) -> int:
    """Bytes on disk of a staging file, or of a small block; 0 if it is not staged."""
    kept = cache.store.item_of(cid)
    return kept.staged if kept is not None else 0


def random_bytes(size: int, seed: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(8, "big")).digest(size)


def make_file(
    chain: Chain, size: int, chunk: int = 1 << 16, seed: int = 0, dag_pb: bool = False
) -> tuple[FileRef, list[Leaf], bytes]:
    """A file of random bytes in `chain`: (its reference, its leaves, its content). Its root block is
    opaque."""
    content = random_bytes(size, seed)
    made: list[Leaf] = []
    for offset in range(0, size, chunk):
        piece = content[offset : offset + chunk]
        cid = chain.add(dag_pb_leaf(piece), cids.DAG_PB) if dag_pb else chain.add(piece)
        made.append(Leaf(cid, offset, len(piece)))
    root = chain.add(b"root of " + content[:32], cids.DAG_PB)
    return FileRef(root, size), made, content


def flip(path: Path, at: int) -> None:
    """Changes one bit of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
