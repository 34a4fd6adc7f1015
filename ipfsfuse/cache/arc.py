"""The adaptive replacement cache (ARC), weighted in bytes: decides which items are evicted. Pure: the caller
removes them.

N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. The list T1 has the
items that were used once recently, T2 those that were used again. B1 and B2 remember the keys and sizes of
items that were evicted from either (ghosts). `target` is the size of T1: a use of an item in B1 raises it, a
use of an item in B2 lowers it. The paper counts pages; we count bytes, in the adaptation too. A ghost moves
the target by its size, times the ratio of the sizes of the ghost lists if that is above 1.

The paper does not consider an item that grows while it is cached, as a file does leaf by leaf. Growing is not
a new use. A growing item does not evict itself while another item can be evicted, until it takes half of the
capacity.

The paper does not consider owners either. Here each item is charged to the caller that brought it in. If
several callers own items and one of them owns more than half of the capacity, its items are evicted first, in
ARC's order, whoever needs the room. So a scan through more than the cache can hold does not evict other
callers' items. Nothing is evicted before the capacity is used up, so one caller may fill all of it. A single
caller gets plain ARC. One limit is enough, because two callers can't both own more than half. An item that
another caller uses is shared from then on, and charged to none.

Concurrency: none; one task at a time.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

Owner = Hashable
NO_OWNER: Owner = None
"""The owner of items of an earlier run, and of items that were read for no call."""
ALL = "all"
"""The owner of items that several callers use."""
OWNER_SHARE = 2
"""The part of the capacity, as a divisor. The items of an owner that has more are evicted first."""

MAX_GHOSTS = 65_536
"""The paper bounds ghosts by bytes. This bounds their number too, so that tiny items can't fill the
memory."""


class _Accounts(Generic[K]):
    """The owner of each item, and the bytes of each owner. Items without an owner are not listed: after a
    start they are most of the items."""

    def __init__(self) -> None:
        self.owners: dict[K, Owner] = {}
        self.bytes: Counter[Owner] = Counter()
        self._lead: dict[K, int] = {}
        """For items that several callers brought in: how many bytes more the owner brought than all
        others."""

    def charge(self, key: K, size: int) -> None:
        owner = self.owners.get(key)
        if owner is not NO_OWNER:
            self.bytes[owner] += size
            if not self.bytes[owner]:
                del self.bytes[owner]

    def winner(self, key: K, before: int, size: int, owner: Owner) -> Owner:
        """The owner of `key` after `owner` has added `size` bytes to its `before` bytes: the caller that
        brought most of it (R. Boyer, J. Moore, "A Fast Majority Vote Algorithm", 1981)."""
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
    """One of the four lists, least recently used first, and the sum of its sizes."""

    def __init__(self, accounts: _Accounts[K] | None = None) -> None:
        """`accounts`: None for a list of ghosts."""
        super().__init__()
        self.bytes = 0
        self._accounts = accounts or _Accounts()
        self._of: dict[Owner, OrderedDict[K, None]] = {}
        """The keys of each owner, in the same order."""

    def put(self, key: K, size: int) -> None:
        """Adds `key` as the most recently used."""
        if key in self:
            self.take(key)
        self.bytes += size
        self[key] = size
        owner = self._accounts.owners.get(key)
        if owner is not NO_OWNER:
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
        """Makes `key` the most recently used."""
        self.move_to_end(key)
        owner = self._accounts.owners.get(key)
        if owner is not NO_OWNER:
            self._of[owner].move_to_end(key)

    def reown(self, key: K, owner: Owner) -> None:
        size = self[key]
        self._accounts.charge(key, -size)
        self._unlist(key)
        if owner is NO_OWNER:
            self._accounts.forget(key)
        else:
            self._accounts.owners[key] = owner
        self._accounts.charge(key, size)
        if owner is not NO_OWNER:
            self._of.setdefault(owner, OrderedDict())[key] = None

    def oldest(self, but: K | None = None) -> K | None:
        return next((key for key in self if key != but), None)

    def oldest_of(self, owner: Owner, but: K | None = None) -> K | None:
        return next((key for key in self._of.get(owner, ()) if key != but), None)

    def _unlist(self, key: K) -> None:
        owner = self._accounts.owners.get(key)
        if owner is not NO_OWNER:
            del self._of[owner][key]
            if not self._of[owner]:
                del self._of[owner]


class Changes(Generic[K]):
    """The differences from the order in which items were restored. An order on disk needs only these
    changes."""

    def __init__(self, count: int) -> None:
        """`count`: the number of restored items."""
        self.count = count
        self.moved: set[K] = set()
        """Keys that were used or added since. In each list they follow all others."""
        self.came: set[K] = set()
        """Those of `moved` that were not restored."""
        self.left: set[K] = set()
        """Restored keys that are no longer cached."""
        self.too_many = False
        """Set when more than half as many keys have changed as were restored. From then on nothing is
        recorded."""

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
    """The policy. Sizes and capacity are in bytes."""

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
        """The sum of the sizes of all cached items."""
        return self._once.bytes + self._again.bytes

    def __contains__(self, key: object) -> bool:
        return key in self._once or key in self._again

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def size(self, key: K) -> int:
        """Bytes of `key`; 0 if it is not cached."""
        return self._once.get(key) or self._again.get(key, 0)

    def frequent(self, key: K) -> bool:
        return key in self._again

    def __iter__(self) -> Iterator[K]:
        """All cached keys: those used once, then those used again, least recently used first in each."""
        yield from self._once
        yield from self._again

    def used_once(self) -> Iterable[K]:
        """The cached keys that were used once, least recently used first."""
        return self._once

    def used_again(self) -> Iterable[K]:
        """The cached keys that were used again, least recently used first."""
        return self._again

    def bytes_by_owner(self) -> Mapping[Owner, int]:
        """Bytes by owner, without items that have none."""
        return self._accounts.bytes

    def owner(self, key: K) -> Owner:
        return self._accounts.owners.get(key)

    def follow(self) -> None:
        """Call it when all items are restored: from now on `changes` records what changes."""
        self.changes = Changes(len(self))

    def moved(self) -> tuple[list[K], list[K]]:
        """The keys that moved since `follow` (`changes`): those that were used once, and those that were used
        again, least recently used first in each."""
        moved = self.changes.moved
        once = list(takewhile(moved.__contains__, reversed(self._once)))
        again = list(takewhile(moved.__contains__, reversed(self._again)))
        return once[::-1], again[::-1]

    def use(self, key: K, owner: Owner = NO_OWNER) -> None:
        """A new use of a cached item, by `owner`."""
        part = self._part(key)
        if part is not None:
            self.changes.note_moved(key)
            before = self.owner(key)
            if owner is not NO_OWNER and before not in (owner, ALL):
                part.reown(key, owner if before is NO_OWNER else ALL)
            self._again.put(key, part.take(key))

    def refresh(self, key: K) -> None:
        """The same use goes on: makes `key` the most recently used of its list."""
        part = self._part(key)
        if part is not None:
            self.changes.note_moved(key)
            part.renew(key)

    def admit(self, key: K, size: int, owner: Owner = NO_OWNER) -> list[K]:
        """Adds `size` bytes to `key`, which may be cached already, and charges them to `owner`. Returns the
        keys to evict, in order.

        The returned keys are no longer cached. `key` itself may be among them: then its old bytes must be
        evicted, and the new ones stay. `size` must fit into the capacity."""
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
            if owner is not NO_OWNER:
                self._accounts.owners[key] = owner
            part.put(key, size)
        if self._once_ghosts or self._again_ghosts:
            self._forget()
        return leave

    def restore(self, key: K, size: int, frequent: bool) -> None:
        """Adds an item of an earlier run as the most recently used. It is no change (`changes`). Call
        `set_capacity` afterwards, which evicts what is too much."""
        (self._again if frequent else self._once).put(key, size)

    def bring_back(self, key: K, size: int, frequent: bool) -> None:
        """Adds an item that was removed for a while, as the most recently used. Evicts nothing."""
        self.restore(key, size, frequent)
        self.changes.note_moved(key, False)

    def set_size(self, key: K, size: int) -> None:
        """Corrects the size of a cached item."""
        part = self._part(key)
        if part is not None:
            part.resize(key, size)

    def remove(self, key: K) -> None:
        """Removes an item that is gone for another reason than eviction. It becomes no ghost."""
        part = self._part(key)
        if part is not None:
            part.take(key)
            self._accounts.forget(key)
            self.changes.note_left(key)

    def set_capacity(self, capacity: int) -> list[K]:
        """Returns the keys to evict, in order."""
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

    def _make_room(self, size: int, key: K | None, again_ghost: bool, owner: Owner = NO_OWNER) -> list[K]:
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
        """The paper's REPLACE, for an item that may be cached already. If an owner has too much, chooses
        among its items."""
        over = self._once.bytes > self.target or (again_ghost and self._once.bytes >= self.target)
        owner_over = self._over_share(size, owner)
        if owner_over is not NO_OWNER:
            once, again = self._once.oldest_of(owner_over, key), self._again.oldest_of(owner_over, key)
            found = once if once is not None and (over or again is None) else again
            if found is None and key is not None and self.owner(key) == owner_over:
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

    def _over_share(self, size: int, owner: Owner) -> Owner:
        """The owner that has more than its share after `owner` gets `size` bytes more, if others own items;
        NO_OWNER if there is none."""
        sizes = self._accounts.bytes
        if len(sizes) < 2 and not (sizes and owner not in sizes and owner is not NO_OWNER):
            return NO_OWNER
        for one in (owner, *sizes):
            if (
                one not in (NO_OWNER, ALL)
                and sizes[one] + (size if one == owner else 0) > self.capacity // OWNER_SHARE
            ):
                return one
        return NO_OWNER

    def _forget(self) -> None:
        once, again = self._once_ghosts, self._again_ghosts
        while once and self._once.bytes + once.bytes > self.capacity:
            once.take(next(iter(once)))
        while again and self.bytes + once.bytes + again.bytes > 2 * self.capacity:
            again.take(next(iter(again)))
        while len(once) + len(again) > self._max_ghosts:
            part = once if len(once) > len(again) else again
            part.take(next(iter(part)))
