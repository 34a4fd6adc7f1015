"""Several sources as one, none of them trusted: order, failover, and the check of every block.

Concurrency: one event loop; any number of tasks. Cancelling a call cancels its requests. Sharing one fetch among
several readers is the cache's work, above.
"""

import logging
from collections.abc import Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hashes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotHere, SourceFailed, Unavailable, WrongBlock
from ipfsfuse.sources.base import Deliver, DeliverFetched, Fetched, Run, Source
from ipfsfuse.sources.checking import check

log = logging.getLogger(__name__)

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0


class Inline:
    """The source of blocks that are written in their own CIDs. Never asked: the chain answers for it."""

    name = "inline"
    in_place = True

    async def get(self, cid: Cid) -> bytes:
        block = cids.inline(cid)
        if block is None:
            raise NotHere(f"{cids.text(cid)} holds no block of its own")
        return block

    async def stream(self, run: Run, deliver: Deliver) -> None:
        for index, leaf in enumerate(run.leaves):
            block = cids.inline(leaf.cid)
            if block is not None:
                await deliver(index, block)

    def roots(self) -> Sequence[Cid]:
        return ()

    async def aclose(self) -> None:
        pass


INLINE = Inline()


class Chain:
    """Implements `base.Blocks`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources: list[Source] = sorted(sources, key=lambda source: not source.in_place)  # stable: else as given

    def roots(self) -> Sequence[Cid]:
        return [root for source in self._sources for root in source.roots()]

    async def aclose(self) -> None:
        for source in self._sources:
            await source.aclose()

    async def get(self, cid: Cid) -> Fetched:
        hashes.check_allowed(cids.multihash(cid))
        inline = cids.inline(cid)
        if inline is not None:
            return Fetched(inline, INLINE)
        pause = FIRST_PAUSE
        while True:
            fetched = await self._round(cid)
            if fetched is not None:
                return fetched
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _round(self, cid: Cid) -> Fetched | None:
        """Asks each source once. None if one of them may still give it later; raises if none can."""
        wrong: WrongBlock | None = None
        hope = False
        for source in self._sources:
            try:
                block = await source.get(cid)
                await check(cid, block)
                return Fetched(block, source)
            except NotHere:
                hope = hope or not source.in_place
            except WrongBlock as exc:
                log.warning("%s sent wrong bytes: %s", source.name, exc)
                wrong = exc
            except SourceFailed as exc:
                log.debug("%s: %s", source.name, exc)
                hope = hope or not source.in_place
        if wrong is not None:
            raise wrong
        if not hope:
            raise Unavailable(f"{cids.text(cid)} is in none of the sources ({', '.join(source.name for source in self._sources)})")
        return None

    async def stream(self, run: Run, deliver: DeliverFetched) -> None:
        missing = set(range(len(run.leaves)))
        for source in self._sources:
            if not missing:
                return
            await self._stream_from(source, run, missing, deliver)
        for index in sorted(missing):
            await deliver(index, await self.get(run.leaves[index].cid))

    async def _stream_from(self, source: Source, run: Run, missing: set[int], deliver: DeliverFetched) -> None:
        """Takes what `source` gives of the leaves still missing; `missing` shrinks by what was delivered."""
        wanted = sorted(missing)

        async def take(index: int, block: bytes) -> None:
            leaf = wanted[index]
            try:
                await check(run.leaves[leaf].cid, block)
            except WrongBlock as exc:
                log.warning("%s sent wrong bytes: %s", source.name, exc)
                return
            if leaf in missing:
                missing.discard(leaf)
                await deliver(leaf, Fetched(block, source))

        try:
            await source.stream(Run(run.file, run.file_size, [run.leaves[leaf] for leaf in wanted]), take)
        except (SourceFailed, NotHere) as exc:
            log.debug("%s: %s", source.name, exc)
