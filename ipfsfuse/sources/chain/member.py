"""One source in the chain: asked within its bounds, its answers verified, its health kept.

Concurrency: any number of tasks.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, NotHere, SourceFailed, WrongBlock
from ipfsfuse.sources.base import Source
from ipfsfuse.sources.chain.checking import check
from ipfsfuse.sources.chain.health import Health, Statistics
from ipfsfuse.sources.chain.slots import Slots
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo

log = logging.getLogger(__name__)

IN_ALL = 64
"""Requests that are not late, over all network sources; shared out evenly, so that a stalled source keeps none from another."""
RUNNING = 16
"""Requests at one source that are not late. More made a node on this machine no faster."""
LATE = 128
"""Late requests at one source: a connection each."""
SLOW_HERE, SLOW_FAR = 0.01, 0.5
"""What a local node's and a remote gateway's slowest answers are taken for before we know."""


class Member:
    def __init__(self, source: Source, chance: random.Random, shared_by: int = 1) -> None:
        """One of `shared_by` sources that the bound over all is divided among."""
        self.source = source
        self.remote = isinstance(source, Gateway) and not source.local
        self.health = Health(chance, may_aside=self.remote, slow=SLOW_FAR if self.remote else SLOW_HERE)
        self.slots = Slots(max(1, min(RUNNING, IN_ALL // shared_by)), max(1, min(LATE, 8 * IN_ALL // shared_by)), self.health.slow_after)
        self._answered = float("-inf")

    async def ask(self, cid: Cid, *, hedge: bool = False) -> bytes:
        """The verified block. Raises NotHere, SourceFailed, WrongBlock. Waits for a slot; a source in place needs none."""
        if self.source.in_place:
            return await self._ask(cid, hedge)
        stale = False
        while True:
            async with self.slots.enter(stale=stale):
                return await self._ask(cid, hedge)
            stale = True  # it was late, and its slot went to another

    async def _ask(self, cid: Cid, hedge: bool) -> bytes:
        start = trio.current_time()
        self.health.asked(start, hedge=hedge)
        try:
            block = await self.source.get(cid)
            await check(cid, block)
        except NotHere:
            self._answered = trio.current_time()
            self.health.lacked()
            raise
        except SourceFailed as exc:
            self.note(exc)
            raise
        except WrongBlock:
            raise  # the chain knows what follows: whether another source is left
        except IpfsFuseError as exc:  # a library folder that can't be read
            failed = SourceFailed(f"{self.source.name}: {exc}", "store")
            self.note(failed)
            raise failed from exc
        except BaseException:
            self.health.left()
            raise
        self._answered = trio.current_time()
        self.health.gave(self._answered - start, len(block))
        return block

    def overtaken(self, asked: float) -> None:
        """Another source gave the block long after this one was `asked`. If nothing came from it meanwhile, that is a
        failure: else a source that takes requests and never answers would cost every read a wait, and look well."""
        if self._answered < asked:
            self.note(SourceFailed(f"{self.source.name} has not answered for {trio.current_time() - asked:.0f} s, and another source did", "timeout"))

    def note(self, failure: SourceFailed) -> None:
        self.health.failed(trio.current_time(), failure.kind, str(failure), failure.retry_after)

    @contextmanager
    def asked_for_many(self) -> Iterator[None]:
        """Around one answer that may hold many blocks: notes what it says about the source. What the source lacks and how it
        fails ends here: blocks that did not come are asked for elsewhere."""
        self.health.asked(trio.current_time())
        try:
            yield
        except NotHere:
            self.health.lacked()
        except SourceFailed as exc:
            log.debug("%s", exc)
            self.note(exc)
        finally:
            self.health.left()

    @property
    def repair(self) -> str:
        """What a user does about a wrong block in it."""
        if isinstance(self.source, Kubo):
            return "`ipfs repo verify --heal` at the node finds and mends it"
        if self.source.in_place:
            return "add its content again, or get the CAR file anew"
        return "the other blocks are still taken from it"

    def statistics(self) -> Statistics:
        return self.health.statistics(self.source.name, trio.current_time())
