"""Which batches a node should hold: a pure policy over CIDs that are wanted and batches that exist.

A batch is one UnixFS directory that links up to `LIMIT` CIDs and is held or let go as a whole, so that 10,000 pins
cost a node 10 entries. A batch is never changed: what changes is written into a new one, and then the old one goes.
A batch goes when it is empty, when most of it is unwanted, or when what is written anyway is at least half its size:
so sizes at least halve from batch to batch below a third of `LIMIT`, and a CID is written again at most 17 times.

Wanted and unwanted are one state per CID, not a queue of orders: a release and a fresh pin of one CID can't cross.

Not for several tasks at once. The caller does the I/O: `begin`, write each batch, `finish`, remove what went; or
`abandon` when the node failed, and `restore` once it has been asked what it has.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ipfsfuse.dag import dagpb, unixfs
from ipfsfuse.dag.cid import Cid

LIMIT = 1000
QUEUED = 0


class Batch(NamedTuple):
    number: int
    """Never one that the node has already."""
    members: tuple[Cid, ...]


class Round(NamedTuple):
    """What to do next: write each of `writes`, then remove the batches with the numbers in `drops`."""

    writes: tuple[Batch, ...]
    drops: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.writes or self.drops)


NOTHING = Round((), ())


class Change(NamedTuple):
    """How a CID's wish differs from what the batches say: wanted and in none (True), unwanted in one (False), or not."""

    cid: Cid
    wanted: bool | None


def directory(members: Sequence[Cid]) -> bytes:
    """The dag-pb block of a UnixFS directory that links `members` under short names."""
    links = [dagpb.Link(cid, b"%03d" % index, 0) for index, cid in enumerate(members)]
    return dagpb.encode(links, unixfs.encode(unixfs.UnixFS(unixfs.Type.DIRECTORY)))


class Batches:
    """One shelf of batches. `limit` is how many CIDs a batch may link."""

    def __init__(self, held: Iterable[Batch] = (), changes: Iterable[Change] = (), limit: int = LIMIT) -> None:
        self.limit = limit
        self._home: dict[Cid, int] = {}  # every wanted CID -> the batch that holds it, or QUEUED
        self._dead: dict[Cid, int] = {}  # unwanted ones that a batch still links -> that batch
        self._queue: dict[Cid, None] = {}  # wanted ones in no batch, oldest first
        self._members: dict[int, tuple[Cid, ...]] = {}
        self._live: dict[int, int] = {}
        self._round = NOTHING
        self._changed: set[Cid] = set()
        self._last = 0
        for batch in held:
            self._hold(batch, batch.members)
        for cid, wanted in changes:
            self.add(cid) if wanted else self.remove(cid)
        self._changed.clear()

    def __len__(self) -> int:
        """How many CIDs are wanted."""
        return len(self._home)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def batches(self) -> Mapping[int, tuple[Cid, ...]]:
        return self._members

    def wanted(self) -> Iterable[Cid]:
        return self._home.keys()

    def home(self, cid: Cid) -> int | None:
        """The number of the batch that holds a wanted CID, QUEUED for none yet; None for one that is not wanted."""
        return self._home.get(cid)

    # -- wishes --------------------------------------------------------------------------------------------------

    def add(self, cid: Cid) -> bool:
        """Whether that changed anything."""
        if cid in self._home:
            return False
        number = self._dead.get(cid, QUEUED)
        if number in self._round.drops:
            number = QUEUED  # what goes now can't be revived
        if number == QUEUED:
            self._queue[cid] = None
        else:
            del self._dead[cid]
            self._live[number] += 1
        self._home[cid] = number
        self._changed.add(cid)
        return True

    def remove(self, cid: Cid) -> bool:
        """Whether that changed anything."""
        number = self._home.pop(cid, None)
        if number is None:
            return False
        if number == QUEUED:
            self._queue.pop(cid, None)
        else:
            self._dead[cid] = number
            self._live[number] -= 1
        self._changed.add(cid)
        return True

    # -- rounds --------------------------------------------------------------------------------------------------

    def begin(self) -> Round:
        """The next round, empty where nothing is to do. Nothing counts as done before `finish`."""
        drops = [number for number, live in self._live.items() if 2 * live < len(self._members[number])]
        pending = len(self._queue) + sum(self._live[number] for number in drops)
        others = sorted((live, number) for number, live in self._live.items() if 2 * live >= len(self._members[number]))
        for live, number in others:
            rest = pending % self.limit
            if live <= 2 * rest and live + rest <= self.limit:
                drops.append(number)
                pending += live
        going = [cid for number in drops for cid in self._members[number] if self._home.get(cid) == number]
        members = [*self._queue, *going]
        pieces = [tuple(members[at : at + self.limit]) for at in range(0, len(members), self.limit)]
        writes = tuple(Batch(number, piece) for number, piece in enumerate(pieces, self._last + 1))
        self._last += len(writes)
        self._round = Round(writes, tuple(drops))
        return self._round

    def finish(self) -> None:
        """All of the round's writes stand: what they hold is held, and the drops are no batches any more."""
        written, self._round = self._round, NOTHING
        for number in written.drops:
            self._forget(number)
        for batch in written.writes:
            self._hold(batch, [cid for cid in batch.members if cid in self._home])
            self._changed.update(batch.members)

    def abandon(self) -> None:
        """The round failed: everything is as it was, and the numbers it used stay used."""
        self._round = NOTHING

    def restore(self, present: Iterable[int], last: int) -> None:
        """The node has no batches but `present`, of ours or not, and numbers up to `last` are taken there."""
        here = set(present)
        for number in [number for number in self._members if number not in here]:
            members = self._members[number]
            orphans = [cid for cid in members if self._home.get(cid) == number]
            self._forget(number)
            for cid in orphans:
                self._home[cid] = QUEUED
                self._queue[cid] = None
            self._changed.update(members)
        self._last = max(self._last, last)

    def changes(self) -> list[Change]:
        """What to write down since this was last asked: see `Change`."""
        changed, self._changed = self._changed, set()
        return [Change(cid, self._wish(cid)) for cid in changed]

    def _wish(self, cid: Cid) -> bool | None:
        if cid in self._home:
            return True if self._home[cid] == QUEUED else None
        return False if cid in self._dead else None

    def _hold(self, batch: Batch, wanted: Sequence[Cid]) -> None:
        self._members[batch.number] = batch.members
        self._live[batch.number] = len(wanted)
        self._last = max(self._last, batch.number)
        for cid in wanted:
            self._home[cid] = batch.number
            self._queue.pop(cid, None)
            self._dead.pop(cid, None)
        if len(wanted) < len(batch.members):
            self._dead.update((cid, batch.number) for cid in batch.members if cid not in self._home)

    def _forget(self, number: int) -> None:
        for cid in self._members.pop(number):
            if self._dead.get(cid) == number:
                del self._dead[cid]
                self._changed.add(cid)
        del self._live[number]
