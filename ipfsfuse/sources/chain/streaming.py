"""A run of leaves, taken from one source after the other, each in its fastest way; what all leave out stays `missing`.

Concurrency: one task and what the sources start; blocks are verified and delivered as they come.
"""

from collections.abc import Sequence

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import IpfsFuseError, SourceFailed, WrongBlock
from ipfsfuse.sources.base import DeliverFetched, Fetched, Run
from ipfsfuse.sources.chain.checking import check
from ipfsfuse.sources.chain.inline import INLINE
from ipfsfuse.sources.chain.member import Member
from ipfsfuse.sources.chain.pursuit import PATIENCE, Surroundings

PATIENCE_ALONE = 15.0
"""Seconds without a block after which a run is broken off where no other source could give it sooner."""


class Streaming:
    def __init__(self, chain: Surroundings, run: Run, deliver: DeliverFetched) -> None:
        self._chain = chain
        self._run = run
        self._deliver = deliver
        self._left = set(range(len(run.leaves)))

    @property
    def missing(self) -> Sequence[int]:
        return sorted(self._left)

    async def from_each(self) -> None:
        for place, leaf in enumerate(self._run.leaves):
            block = cids.known(leaf.cid)
            if block is not None:
                self._left.discard(place)
                await self._deliver(place, Fetched(block, INLINE))
        for member in [*self._chain.in_place(), *self._chain.network()]:
            if not self._left:
                return
            if member.health.wait(trio.current_time()) == 0:
                await self._from(member)

    async def _from(self, member: Member) -> None:
        taking = _Taking(self, member)
        with member.asked_for_many():
            if member.source.in_place:
                await taking.run(float("inf"))
            else:
                patience = PATIENCE if len(self._chain.network()) > 1 else PATIENCE_ALONE
                async with member.slots.enter():
                    await taking.run(patience)
        if taking.trouble is not None:
            raise taking.trouble

    # -- for the taking -----------------------------------------------------------------------------------------

    def part(self) -> tuple[Sequence[int], Run]:
        """What is still missing, as a run of its own, and which leaves of the whole its leaves are."""
        places = self.missing
        return places, Run(self._run.file, self._run.file_size, [self._run.leaves[place] for place in places])

    async def take(self, member: Member, place: int, block: bytes) -> bool:
        """Verifies and delivers one block. False if it was wrong."""
        cid = self._run.leaves[place].cid
        try:
            await check(cid, block)
        except WrongBlock:
            self._chain.wrong(member, cid)
            return False
        if place in self._left:
            self._left.discard(place)
            member.health.gave(-1, len(block))
            await self._deliver(place, Fetched(block, member.source))
        return True


class _Taking:
    """One source's share. Broken off when no block came for too long, and when a remote source sent a wrong one."""

    def __init__(self, streaming: Streaming, member: Member) -> None:
        self._streaming = streaming
        self._member = member
        self._scope = trio.CancelScope()
        self._busy = 0
        self.trouble: IpfsFuseError | None = None
        """What the reader raised: told to the reader, not held against the source."""

    async def run(self, patience: float) -> None:
        places, part = self._streaming.part()

        async def take(index: int, block: bytes) -> None:
            self._busy += 1
            self._scope.deadline = float("inf")  # the time that the reader takes is not the source's
            try:
                if not await self._streaming.take(self._member, places[index], block) and self._member.remote:
                    self._scope.cancel()
            except IpfsFuseError as exc:
                self.trouble = exc
                raise
            finally:
                self._busy -= 1
                if not self._busy:
                    self._scope.deadline = trio.current_time() + patience

        with self._scope:
            self._scope.deadline = trio.current_time() + patience
            try:
                await self._member.source.stream(part, take)
            except IpfsFuseError:
                if self.trouble is None:
                    raise
        if self._scope.cancelled_caught and trio.current_time() >= self._scope.deadline:
            raise SourceFailed(f"{self._member.source.name} sent no block for {patience:g} s", "timeout")
