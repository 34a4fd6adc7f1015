"""A CAR file as a source: read where it lies, by multihash, never staged again.

Concurrency: as every source. Blocks that the page cache holds come at once on the event loop (10 us; a worker
thread costs 80); everything else is read in worker threads.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Deliver, DeliverBlocks, LeafRange, Subtree, too_large
from ipfsfuse.sources.files.carbuild import IndexProgress, ensure_index
from ipfsfuse.sources.files.carfile import CarFile, read_cached
from ipfsfuse.sources.files.carstreams import Found, stream_places


class CarSource:
    """One file. `whole` is False where it is damaged: what stands before the damage reads."""

    in_place = True

    def __init__(self, file: CarFile, whole: bool = True) -> None:
        """`file` with an index; it is closed with the source. Most callers want `open`."""
        self._file = file
        self.name = file.name
        self.path = file.path
        self.whole = whole

    @classmethod
    def open(cls, path: Path, indexes: Path, progress: IndexProgress | None = None) -> "CarSource":
        """Opens the CAR file at `path`. Blocks while an index is built, which then stays in the folder
        `indexes`.

        Raises SourceFailed: no such file, empty, not a CAR, a header that lies, an index that can't be
        written.
        """
        file = CarFile(path)
        try:
            return cls(file, ensure_index(file, indexes, progress))
        except BaseException:
            file.close()
            raise

    async def get(self, cid: Cid) -> bytes:
        await trio.lowlevel.checkpoint()
        if cids.inline(cid) is not None:
            raise NotHere("an identity CID is no block of a source")
        multihash = cids.multihash(cid)
        try:
            place = self._file.find(multihash, read_cached)
        except BlockingIOError:
            place = await threads.run_sync(self._file.find, multihash)
        if place is None:
            raise NotHere(f"{self.name} does not have {cids.text(cid)}")
        if place.size > cids.MAX_BLOCK:
            raise too_large(self.name, cid, place.size)
        with suppress(BlockingIOError):
            return self._file.read_small(place)
        return await threads.run_sync(self._file.read, place)

    async def stream(self, run: LeafRange, deliver: Deliver) -> None:
        await stream_places(run, self._find, deliver)

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        """Nothing: each block is at hand."""

    def _find(self, cid: Cid) -> Found | None:
        place = self._file.find(cids.multihash(cid))
        return Found(self._file, place) if place else None

    def roots(self) -> Sequence[Cid]:
        return self._file.roots

    async def aclose(self) -> None:
        await threads.run_sync(self._file.close)
