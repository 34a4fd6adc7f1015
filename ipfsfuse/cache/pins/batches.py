"""Plans the batches that a node should hold: a pure policy over the desired CIDs and the existing batches.

A batch is one UnixFS directory that links up to `MAX_MEMBERS` CIDs. It is written or removed as a whole, so
that 10,000 pins are 10 entries at the node. A batch is never changed: its changed members are written into a
new batch, and then it is removed. A batch is removed when it is empty, when most of its members are not
desired, or when what must be written anyway is at least half its size. So below a third of `MAX_MEMBERS`,
each batch is at most half as large as the next larger one, and a CID is written again at most 17 times.

Each CID has one state, desired or not. There is no queue of commands, so a release and a new pin of one CID
can't overtake each other.

Not for several tasks at once. The caller does the I/O: it calls `begin`, writes each batch, calls `finish`,
and removes the dropped batches. If the node fails, it calls `abandon` instead of `finish`. It calls `adopt`
and `lose` when it finds a batch at the node, or finds that one is missing.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, unixfs
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed, NotACid

MAX_MEMBERS = 1000
MAX_PER_ROUND = 10
"""About how many batches one round writes or drops. With more, planning would block the event loop."""
QUEUED = 0


class PinBatch(NamedTuple):
    number: int
    """From 1; unique at the node."""
    members: tuple[Cid, ...]


class Round(NamedTuple):
    """The next step: write the batches `writes`, then remove the batches with the numbers `drops`."""

    writes: tuple[PinBatch, ...]
    drops: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.writes or self.drops)


NO_ROUND = Round((), ())


def directory(members: Sequence[Cid]) -> bytes:
    """The dag-pb block of a UnixFS directory that links `members` under short names."""
    links = [dagpb.Link(cid, b"%03d" % index, 0) for index, cid in enumerate(members)]
    return dagpb.encode(links, unixfs.encode(unixfs.UnixFS(unixfs.Type.DIRECTORY)))


def members_of(block: bytes) -> tuple[Cid, ...] | None:
    """The members of a batch's block; None for any block that `directory` would not write."""
    try:
        members = tuple(link.cid for link in dagpb.decode(block).links)
        right = len(members) <= MAX_MEMBERS and all(
            cids.canonical(cid) == cid and cids.inline_block(cid) is None for cid in members
        )
    except (Malformed, NotACid):
        return None
    return members if right and len(set(members)) == len(members) and directory(members) == block else None


class BatchPlanner:
    """Plans the batches of one kind at one node. `limit`: the most CIDs in a batch. `most`: about the most
    batches in a round."""

    def __init__(self, limit: int = MAX_MEMBERS, most: int = MAX_PER_ROUND) -> None:
        self.limit = limit
        self._most = most
        self._home: dict[Cid, int] = {}  # every desired CID -> the batch that holds it, or QUEUED
        self._unwanted: dict[Cid, int] = {}  # a CID that is not desired -> a batch that still links it
        self._queue: dict[Cid, None] = {}  # desired CIDs in no batch, oldest first
        self._members: dict[int, tuple[Cid, ...]] = {}
        self._live: dict[int, int] = {}  # batch -> how many desired CIDs have their home there
        self._round = NO_ROUND
        self._last = 0

    def __len__(self) -> int:
        """The number of desired CIDs."""
        return len(self._home)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def batches(self) -> Mapping[int, tuple[Cid, ...]]:
        return self._members

    def home(self, cid: Cid) -> int | None:
        """The number of the batch that holds a desired CID; QUEUED if it is in no batch yet; None if the CID
        is not desired."""
        return self._home.get(cid)

    # -- what is desired -------------------------------------------------------------------------------------

    def add(self, cid: Cid) -> bool:
        """Makes `cid` desired. Returns whether that is a change."""
        if cid in self._home:
            return False
        number = self._unwanted.get(cid, QUEUED)
        if number in self._round.drops:
            number = QUEUED  # that batch is being removed
        if number == QUEUED:
            self._queue[cid] = None
        else:
            del self._unwanted[cid]
            self._live[number] += 1
        self._home[cid] = number
        return True

    def remove(self, cid: Cid) -> bool:
        """Makes `cid` not desired. Returns whether that is a change."""
        number = self._home.pop(cid, None)
        if number is None:
            return False
        if number == QUEUED:
            del self._queue[cid]
        else:
            self._unwanted[cid] = number
            self._live[number] -= 1
        return True

    # -- what the node has -----------------------------------------------------------------------------------

    def adopt(self, batch: PinBatch) -> None:
        """The node has `batch`. If several batches link a CID, the newest one is its home: a round that broke
        off was about to drop the older ones. An older batch is kept if at least half of its members are
        desired and have their home in it. So there are never more than twice as many links as desired
        CIDs."""
        live = 0
        for cid in batch.members:
            home = self._home.get(cid)
            if home is None:
                self._unwanted.setdefault(cid, batch.number)
            elif home < batch.number:
                if home == QUEUED:
                    del self._queue[cid]
                else:
                    self._live[home] -= 1
                self._home[cid] = batch.number
                live += 1
        self._members[batch.number] = batch.members
        self._live[batch.number] = live
        self.skip(batch.number)

    def lose(self, number: int) -> None:
        """The node no longer has this batch. Queues its desired members."""
        for cid in self._members.pop(number):
            if self._home.get(cid) == number:
                self._home[cid] = QUEUED
                self._queue[cid] = None
            elif self._unwanted.get(cid) == number:
                del self._unwanted[cid]
        del self._live[number]

    def skip(self, number: int) -> None:
        """Numbers up to `number` may be in use at the node."""
        self._last = max(self._last, number)

    # -- rounds ----------------------------------------------------------------------------------------------

    def begin(self) -> Round:
        """The next round; empty if there is nothing to do. Nothing counts as done before `finish`.

        After a round of `most` writes or drops there may be more to do."""
        drops: list[int] = []
        queued = list(islice(self._queue, self._most * self.limit))
        if len(queued) == len(self._queue):
            drops = self._choose_drops()
        moved = [cid for number in drops for cid in self._members[number] if self._home.get(cid) == number]
        members = queued + moved
        pieces = [tuple(members[at : at + self.limit]) for at in range(0, len(members), self.limit)]
        writes = tuple(PinBatch(number, piece) for number, piece in enumerate(pieces, self._last + 1))
        self._last += len(writes)
        self._round = Round(writes, tuple(drops))
        return self._round

    def _choose_drops(self) -> list[int]:
        sparse = [number for number, live in self._live.items() if 2 * live < len(self._members[number])]
        if len(sparse) > self._most:
            return sparse[: self._most]
        drops = sparse
        pending = len(self._queue) + sum(self._live[number] for number in sparse)
        others = sorted(
            (live, number) for number, live in self._live.items() if 2 * live >= len(self._members[number])
        )
        for live, number in others:
            rest = pending % self.limit
            if live <= 2 * rest and live + rest <= self.limit:
                drops.append(number)
                pending += live
        return drops

    def finish(self) -> None:
        """All writes of the round are at the node. Now the caller must remove the drops."""
        done, self._round = self._round, NO_ROUND
        for number in done.drops:
            self.lose(number)
        for batch in done.writes:
            self.adopt(batch)

    def abandon(self) -> None:
        """The round failed. The state is as before, but the numbers of its batches are not used again."""
        self._round = NO_ROUND
