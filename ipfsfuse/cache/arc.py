"""Which staged things leave first: the adaptive replacement cache, weighed in bytes. Pure: it decides, others
remove.

N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. T1 holds what was
used once lately, T2 what was used again; B1 and B2 remember what left either, without its bytes. `target` is
T1's share, which a use of something in B1 raises and one in B2 lowers. Where the paper counts pages we count
bytes, in the adaptation too: a ghost moves the target by its size, times the ratio of the ghost lists where
that favours it.

What the paper has no case for is a thing that grows while it is cached, as a file does leaf by leaf: growing
is no new use, and a thing does not push itself out while anything else can go, until it takes half of the
capacity.

Nor does the paper know of owners. Here each thing is on the account of who brought it in. While others have
something here, who holds more than half of the capacity gives up things of its own, in ARC's order, whoever
needs room: so a sweep through more than the cache can hold leaves others what they have. Until the capacity
is used up nobody gives up anything, so one caller may fill all of it; and one alone has plain ARC. One bound
is enough, because two can't both be over half. What another than its owner uses belongs to all from then on,
and is on nobody's account.

Concurrency: none; one task at a time.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

Owner = Hashable
NOBODY: Owner = None
"""The owner of what was there before anyone asked: of an earlier run, or read for no call."""
ALL = "all"
"""The owner of what several use."""
SHARE = 2
"""The part of the capacity, as a divisor, beyond which an owner gives up its own things first."""

MAX_GHOSTS = 65_536
"""Ghosts are bounded by bytes as the paper bounds them, and by this number, so that tiny things can't fill
the memory."""


class _Accounts(Generic[K]):
    """Who owns what, and how many bytes each. What nobody owns is not listed: it is most of what is there
    after a start."""

    def __init__(self) -> None:
        self.owners: dict[K, Owner] = {}
        self.bytes: Counter[Owner] = Counter()
        self._lead: dict[K, int] = {}
        """Of things that several brought in, how many bytes more the owner brought than all others."""

    def charge(self, key: K, size: int) -> None:
        owner = self.owners.get(key)
        if owner is not NOBODY:
            self.bytes[owner] += size
            if not self.bytes[owner]:
                del self.bytes[owner]

    def winner(self, key: K, before: int, size: int, owner: Owner) -> Owner:
        """Whose `key`, of which `before` bytes are there, is when `owner` brings `size` more: of who brought
        most of it (R. Boyer, J. Moore, "A Fast Majority Vote Algorithm", 1981)."""
        present = self.owners.get(key)
        if not before:
            return owner
        if present == ALL or (present == owner and key not in self._lead):
            return present
        lead = self._lead.get(key, before) + (size if present == owner else -size)
        self._lead[key] = abs(lead)
        return owner if lead < 0 else present

    def forget(self, key: K) -> None:
        self.owners.pop(key, None)
        self._lead.pop(key, None)


class _Part(OrderedDict[K, int]):
    """One of the four lists, least lately used first, with the sum of its sizes."""

    def __init__(self, accounts: _Accounts[K] | None = None) -> None:
        """`accounts` of what is cached; ghosts have none."""
        super().__init__()
        self.bytes = 0
        self._accounts = accounts or _Accounts()
        self._of: dict[Owner, OrderedDict[K, None]] = {}
        """The keys of each owner, in the same order."""

    def put(self, key: K, size: int) -> None:
        """At the end most lately used."""
        if key in self:
            self.take(key)
        self.bytes += size
        self[key] = size
        owner = self._accounts.owners.get(key)
        if owner is not NOBODY:
            self._accounts.bytes[owner] += size
            self._of.setdefault(owner, OrderedDict())[key] = None

    def take(self, key: K) -> int:
        size = super().pop(key)
        self.bytes -= size
        self._accounts.charge(key, -size)
        self._unlist(key)
        return size

    def resize(self, key: K, size: int) -> None:
        self.bytes += size - self[key]
        self._accounts.charge(key, size - self[key])
        self[key] = size

    def renew(self, key: K) -> None:
        """Most lately used."""
        self.move_to_end(key)
        owner = self._accounts.owners.get(key)
        if owner is not NOBODY:
            self._of[owner].move_to_end(key)

    def reown(self, key: K, owner: Owner) -> None:
        size = self[key]
        self._accounts.charge(key, -size)
        self._unlist(key)
        if owner is NOBODY:
            self._accounts.forget(key)
        else:
            self._accounts.owners[key] = owner
        self._accounts.charge(key, size)
        if owner is not NOBODY:
            self._of.setdefault(owner, OrderedDict())[key] = None

    def oldest(self, but: K | None = None) -> K | None:
        return next((key for key in self if key != but), None)

    def oldest_of(self, owner: Owner, but: K | None = None) -> K | None:
        return next((key for key in self._of.get(owner, ()) if key != but), None)

    def _unlist(self, key: K) -> None:
        owner = self._accounts.owners.get(key)
        if owner is not NOBODY:
            del self._of[owner][key]
            if not self._of[owner]:
                del self._of[owner]


class Changes(Generic[K]):
    """What differs from the order in which things were restored. Whoever wrote that order down needs to write
    no more than this."""

    def __init__(self, count: int) -> None:
        """`count`: things that were restored."""
        self.count = count
        self.moved: set[K] = set()
        """What was used since, or came: in each list it is all that stands behind the first of them."""
        self.came: set[K] = set()
        """What of it was not restored."""
        self.left: set[K] = set()
        """What was restored and is not there any more."""
        self.too_many = False
        """True once half as much has changed as was restored: from then on nothing is noted."""

    def note_moved(self, key: K, was_there: bool = True) -> None:
        if self.too_many:
            return
        if key in self.left:
            self.left.remove(key)
        elif not was_there:
            self.came.add(key)
        self.moved.add(key)
        self._check()

    def note_left(self, key: K) -> None:
        if self.too_many:
            return
        self.moved.discard(key)
        if key in self.came:
            self.came.remove(key)
        else:
            self.left.add(key)
            self._check()

    def _check(self) -> None:
        if 2 * (len(self.moved) + len(self.left)) > self.count:
            self.too_many = True
            self.moved, self.came, self.left = set(), set(), set()


class Arc(Generic[K]):
    """Sizes and capacity in bytes."""

    def __init__(self, capacity: int, max_ghosts: int = MAX_GHOSTS) -> None:
        self.capacity = capacity
        self.target = 0
        self._max_ghosts = max_ghosts
        self._accounts = _Accounts[K]()
        self._once, self._again = _Part[K](self._accounts), _Part[K](self._accounts)
        self._once_ghosts, self._again_ghosts = _Part[K](), _Part[K]()
        self.changes = Changes[K](0)
        """Since `follow` was called."""

    @property
    def bytes(self) -> int:
        """The sum of the sizes of all that is cached."""
        return self._once.bytes + self._again.bytes

    def __contains__(self, key: object) -> bool:
        return key in self._once or key in self._again

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def size(self, key: K) -> int:
        """Bytes of `key`, 0 for what is not cached."""
        return self._once.get(key) or self._again.get(key, 0)

    def frequent(self, key: K) -> bool:
        return key in self._again

    def __iter__(self) -> Iterator[K]:
        """All that is cached: used once, then used again, least lately used first in each."""
        yield from self._once
        yield from self._again

    def used_once(self) -> Iterable[K]:
        """Of what is cached, what was used once: least lately used first."""
        return self._once

    def used_again(self) -> Iterable[K]:
        """The same of what was used again."""
        return self._again

    def bytes_by_owner(self) -> Mapping[Owner, int]:
        """Bytes by owner, without what is nobody's."""
        return self._accounts.bytes

    def owner(self, key: K) -> Owner:
        return self._accounts.owners.get(key)

    def follow(self) -> None:
        """All is restored: from now on `changes` says what has changed."""
        self.changes = Changes(len(self))

    def moved(self) -> tuple[list[K], list[K]]:
        """What moved, as `changes` says, of what was used once and of what was used again: least lately used
        first."""
        moved = self.changes.moved
        once = list(takewhile(moved.__contains__, reversed(self._once)))
        again = list(takewhile(moved.__contains__, reversed(self._again)))
        return once[::-1], again[::-1]

    def use(self, key: K, owner: Owner = NOBODY) -> None:
        """A new use of something cached, by `owner`."""
        part = self._part(key)
        if part is not None:
            self.changes.note_moved(key)
            before = self.owner(key)
            if owner is not NOBODY and before not in (owner, ALL):
                part.reown(key, owner if before is NOBODY else ALL)
            self._again.put(key, part.take(key))

    def refresh(self, key: K) -> None:
        """More of the same use: most lately used in its list."""
        part = self._part(key)
        if part is not None:
            self.changes.note_moved(key)
            part.renew(key)

    def admit(self, key: K, size: int, owner: Owner = NOBODY) -> list[K]:
        """Takes in `size` bytes of `key` (`size` more where it is cached already) on the account of `owner`.
        Returns what must leave, in order.

        What is returned is cached no more. `key` itself may be there: the bytes that it had must leave, the
        new ones stay. `size` must fit the capacity."""
        if size > self.capacity:
            raise ValueError(f"{size} bytes can't fit {self.capacity}")
        again_ghost = key in self._again_ghosts
        part = self._once if key in self._once else self._again if key in self._again else None
        if part is None:
            part = self._once
            if again_ghost or key in self._once_ghosts:
                part = self._again
                self._adapt(key)
        leave: list[K] = []
        if self._once.bytes + self._again.bytes + size > self.capacity:
            leave = self._make_room(size, key, again_ghost, owner)
        self.changes.note_moved(key, key in part)
        if key in part:
            before = part[key]
            part.put(key, before + size)
            winner = self._accounts.winner(key, before, size, owner)
            if winner != self.owner(key):
                part.reown(key, winner)
        else:
            if owner is not NOBODY:
                self._accounts.owners[key] = owner
            part.put(key, size)
        if self._once_ghosts or self._again_ghosts:
            self._forget()
        return leave

    def restore(self, key: K, size: int, frequent: bool) -> None:
        """Takes in, most lately used, what an earlier run left: that is no change. What is too much leaves by
        `set_capacity`."""
        (self._again if frequent else self._once).put(key, size)

    def set_size(self, key: K, size: int) -> None:
        """Corrects the size of something cached."""
        part = self._part(key)
        if part is not None:
            part.resize(key, size)

    def remove(self, key: K) -> None:
        """Something left for other reasons: no ghost."""
        part = self._part(key)
        if part is not None:
            part.take(key)
            self._accounts.forget(key)
            self.changes.note_left(key)

    def set_capacity(self, capacity: int) -> list[K]:
        """Returns what must leave, in order."""
        self.capacity = max(0, capacity)
        self.target = min(self.target, self.capacity)
        leave = self._make_room(0, None, False)
        self._forget()
        return leave

    def _part(self, key: K) -> _Part[K] | None:
        return self._once if key in self._once else self._again if key in self._again else None

    def _adapt(self, key: K) -> None:
        """Moves the target for a use of a ghost, and forgets the ghost."""
        once, again = self._once_ghosts, self._again_ghosts
        if key in once:
            self.target = min(
                self.capacity, self.target + max(once[key], once[key] * again.bytes // max(1, once.bytes))
            )
            once.take(key)
        elif key in again:
            self.target = max(
                0, self.target - max(again[key], again[key] * once.bytes // max(1, again.bytes))
            )
            again.take(key)

    def _make_room(self, size: int, key: K | None, again_ghost: bool, owner: Owner = NOBODY) -> list[K]:
        leave: list[K] = []
        while self.bytes + size > self.capacity:
            victim = self._victim(key, again_ghost, size, owner)
            part = self._part(victim)
            assert part is not None
            if victim != key:
                (self._once_ghosts if part is self._once else self._again_ghosts).put(victim, part[victim])
            part.take(victim)
            self._accounts.forget(victim)
            self.changes.note_left(victim)
            leave.append(victim)
        return leave

    def _victim(self, key: K | None, again_ghost: bool, size: int, owner: Owner) -> K:
        """The paper's REPLACE, for a thing that may be cached already; among the things of one owner where
        that has too much."""
        over = self._once.bytes > self.target or (again_ghost and self._once.bytes >= self.target)
        greedy = self._greedy(size, owner)
        if greedy is not NOBODY:
            once, again = self._once.oldest_of(greedy, key), self._again.oldest_of(greedy, key)
            found = once if once is not None and (over or again is None) else again
            if found is None and key is not None and self.owner(key) == greedy:
                found = key
            if found is not None:
                return found
        once, again = self._once.oldest(key), self._again.oldest(key)
        if once is not None and (over or again is None):
            return once
        own = self.size(key) if key is not None else 0
        if again is None or 2 * own > self.capacity:
            assert key is not None
            return key
        return again

    def _greedy(self, size: int, owner: Owner) -> Owner:
        """Who has too much once `owner` has `size` bytes more, while others have something; NOBODY where no
        one does."""
        sizes = self._accounts.bytes
        if len(sizes) < 2 and not (sizes and owner not in sizes and owner is not NOBODY):
            return NOBODY
        for one in (owner, *sizes):
            if (
                one not in (NOBODY, ALL)
                and sizes[one] + (size if one == owner else 0) > self.capacity // SHARE
            ):
                return one
        return NOBODY

    def _forget(self) -> None:
        once, again = self._once_ghosts, self._again_ghosts
        while once and self._once.bytes + once.bytes > self.capacity:
            once.take(next(iter(once)))
        while again and self.bytes + once.bytes + again.bytes > 2 * self.capacity:
            again.take(next(iter(again)))
        while len(once) + len(again) > self._max_ghosts:
            part = once if len(once) > len(again) else again
            part.take(next(iter(part)))
