"""Pins of ours at a Kubo node: one folder per mount in the node's own file tree, with batches of links in it.

    /ipfsfuse/<host>-<mount id>/owner         who holds this (`owners`)
                               /staged-<n>    what is staged, in batches (`batches`)
                               /pinned-<n>    what `ipfsfuse pin` keeps for good

Content stays at the node while it stands in any mount's folder; the node's own pins are never looked at, so a pin that
its user made is never touched. `add` and `remove` only change what is wanted. Two tasks follow: one writes wishes down,
one brings the node to them in rounds, behind the reads. A node that is down or hangs makes both wait, and nobody else.

Concurrency: one event loop. The node and the database are spoken to by these tasks alone.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import trio

from ipfsfuse.cache.pins import Copies, PinStatus, batches, owners
from ipfsfuse.cache.pins.batches import NOTHING, QUEUED, Change, Round
from ipfsfuse.cache.pins.holding import Holding
from ipfsfuse.cache.pins.nodefiles import NodeFiles
from ipfsfuse.cache.pins.pinstore import PinStore
from ipfsfuse.cache.pins.returning import Returning
from ipfsfuse.cache.pins.sweeping import PINNED, STAGED
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError, SourceFailed, StoreFailed
from ipfsfuse.fileio import threads

log = logging.getLogger(__name__)

LINGER = 0.5
"""Seconds in which pins are collected for one batch."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
"""Seconds until a node that failed is asked again: doubling."""
FAREWELL = 2.0
"""Seconds that an ending mount gives the node."""


class KuboPins:
    """Made by `open`; follows what is wished for while `run` runs."""

    def __init__(self, node: NodeFiles, store: PinStore) -> None:
        self._node = node
        self._store = store
        self._holding = Holding(node, store)
        self._shelves = {STAGED: store.load(STAGED), PINNED: store.load(PINNED)}
        self._returning = Returning(node)
        self._known = False  # whether we know what the node has in our folder
        self._released = False
        self._failing = ""
        self._wishes, self._done = 1, 0  # so far, and of them so at the node: the first is to look at what is there
        self._changed, self._full, self._unsaved, self._done_more = (trio.Event() for _ in range(4))
        self._disk = trio.Lock()
        self._busy = trio.Lock()  # with the node
        self._tasks = trio.CancelScope()
        self._changed.set()

    @classmethod
    async def open(cls, node: NodeFiles, folder: Path) -> "KuboPins":
        """Pins whose own side lives in `folder`, of one process at a time. Raises StoreFailed."""
        return await threads.run_sync(lambda: cls(node, PinStore(folder)))

    async def run(self) -> None:
        """Until it is cancelled: what is held then stays held for the next start."""
        try:
            with self._tasks:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_saving)
                    nursery.start_soon(self._keep_holding)
        finally:
            with trio.CancelScope(shield=True):
                await self._close()

    # -- Pins ----------------------------------------------------------------------------------------------------

    def add(self, cid: Cid) -> None:
        """As `Pins.add`."""
        self._wish(STAGED, cid, True)

    def remove(self, cid: Cid) -> None:
        """As `Pins.remove`."""
        self._wish(STAGED, cid, False)

    def state(self, cid: Cid) -> str:
        """As `Pins.state`."""
        cid = cids.canonical(cid)
        pinned, staged = self._shelves[PINNED].home(cid), self._shelves[STAGED].home(cid)
        if pinned:
            return "user"
        if staged:
            return "cache"
        return "queued" if QUEUED in (pinned, staged) else ""

    # -- more than that ------------------------------------------------------------------------------------------

    def keep(self, cid: Cid) -> None:
        """Holds `cid` and all below it for good, until `unkeep`, whatever is staged."""
        self._wish(PINNED, cid, True)

    def unkeep(self, cid: Cid) -> None:
        self._wish(PINNED, cid, False)

    def kept(self) -> Iterable[Cid]:
        """What is held for good."""
        return list(self._shelves[PINNED].wanted())

    def held(self) -> Iterable[Cid]:
        """What is held, or soon will be, because it is staged."""
        return list(self._shelves[STAGED].wanted())

    def settle(self, staged: Iterable[Cid], copies: Copies | None = None, name: str = "") -> None:
        """Exactly `staged` is staged: holds it, and lets go of what a crash left held. Said at the start; `copies` are
        given back to the node, which they know as `name`."""
        self._returning.know(copies, name)
        now = {cids.canonical(cid) for cid in staged}
        for cid in [cid for cid in self._shelves[STAGED].wanted() if cid not in now]:
            self.remove(cid)
        for cid in now:
            self.add(cid)

    def status(self) -> PinStatus:
        shelves = self._shelves.values()
        queued = sum(shelf.queued for shelf in shelves)
        return PinStatus(sum(map(len, shelves)) - queued, queued, sum(len(shelf.batches) for shelf in shelves), self._node.requests, self._failing)

    async def settled(self) -> None:
        """Returns when all that was wished for until now is so at the node."""
        wishes = self._wishes
        while self._done < wishes:
            await self._done_more.wait()

    async def release_all(self) -> None:
        """Lets go of everything, for good, and follows no wish any more: at the end of an isolated mount.

        Raises SourceFailed after three tries: then the next start on this host sweeps it."""
        self._tasks.cancel()
        async with self._busy:
            self._released = True
            await self._holding.remove()

    # -- the two tasks -------------------------------------------------------------------------------------------

    def _wish(self, prefix: str, cid: Cid, wanted: bool) -> None:
        cid = cids.canonical(cid)
        if cids.inline(cid) is not None:
            return
        shelf = self._shelves[prefix]
        if shelf.add(cid) if wanted else shelf.remove(cid):
            self._wishes += 1
            self._changed.set()
            self._unsaved.set()
            if shelf.queued >= batches.LIMIT:
                self._full.set()

    async def _keep_saving(self) -> None:
        while True:
            await self._unsaved.wait()
            await trio.sleep(LINGER / 5)
            self._unsaved = trio.Event()
            await self._save()

    async def _save(self) -> None:
        for prefix, shelf in self._shelves.items():
            if changes := shelf.changes():
                await self._write_down(prefix, changes)

    async def _write_down(self, prefix: str, changes: list[Change], done: Round = NOTHING) -> None:
        """A disk that takes nothing costs what a crash would lose, no more: the next start asks the node."""
        with trio.CancelScope(shield=True):  # the shelf counts the changes as written: nobody would write them later
            async with self._disk:
                try:
                    await threads.run_sync(self._store.save, prefix, changes, done.writes, done.drops)
                except StoreFailed as exc:
                    log.warning("pins are not written down: %s", exc)

    async def _keep_holding(self) -> None:
        wait = FIRST_WAIT
        while True:
            with trio.move_on_after(owners.RENEW):
                await self._changed.wait()
            with trio.move_on_after(LINGER):
                await self._full.wait()
            self._changed, self._full = trio.Event(), trio.Event()
            if await self._try_round():
                wait = FIRST_WAIT
            else:
                self._changed.set()
                await trio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    async def _try_round(self) -> bool:
        wishes = self._wishes
        try:
            async with self._busy:
                await self._round()
        except Exception as exc:  # the unforeseen too: it may cost the pins, never the mount
            if not isinstance(exc, IpfsFuseError):
                log.exception("pins meet an error that no one foresaw")
            elif not self._failing:
                log.warning("pins wait until the node takes them: %s", exc)
            self._failing, self._known = str(exc) or repr(exc), False
            return False
        if self._failing:
            log.info("the node takes pins again")
        self._failing, self._done = "", wishes
        self._done_more.set()
        self._done_more = trio.Event()
        return True

    async def _round(self) -> None:
        if not self._known:
            await self._holding.look(self._shelves)
            self._known = True
        for prefix, shelf in self._shelves.items():
            step = shelf.begin()
            if not step:
                continue
            try:
                await self._holding.write(prefix, step)
            except BaseException:
                shelf.abandon()
                raise
            self._returning.note(shelf, step, all_of_it=prefix == PINNED)
            shelf.finish()
            await self._write_down(prefix, shelf.changes(), step)
            await self._holding.drop(prefix, step)
        await self._returning.give_back(self.state)
        await self._holding.sign_if_due()

    async def _close(self) -> None:
        await self._save()
        if self._known and not self._failing and not self._released:
            with trio.move_on_after(FAREWELL):
                try:
                    await self._holding.rest()
                except SourceFailed as exc:
                    log.info("the node was not told that this mount rests: %s", exc)
        await threads.run_sync(self._store.close)
