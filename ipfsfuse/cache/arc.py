"""Which staged things leave first: the adaptive replacement cache, weighed in bytes. Pure: it decides, others remove.

N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. T1 holds what was used once
lately, T2 what was used again; B1 and B2 remember what left either, without its bytes. `target` is T1's share, which a
use of something in B1 raises and one in B2 lowers. Where the paper counts pages we count bytes, in the adaptation too:
a ghost moves the target by its size, times the ratio of the ghost lists where that favours it.

What the paper has no case for is a thing that grows while it is held, as a file does leaf by leaf: growing is no new
use, and a thing does not push itself out while anything else can go, until it holds half of the capacity.

Concurrency: none; one task at a time.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

MAX_GHOSTS = 65_536
"""Ghosts are bounded by bytes as the paper bounds them, and by this number, so that tiny things can't fill the memory."""


class _Part(OrderedDict[K, int]):
    """One of the four lists, least lately used first, with the sum of its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def put(self, key: K, size: int) -> None:
        """At the end most lately used."""
        self.bytes += size - super().pop(key, 0)
        self[key] = size

    def take(self, key: K) -> int:
        size = super().pop(key)
        self.bytes -= size
        return size

    def oldest(self, but: K | None = None) -> K | None:
        return next((key for key in self if key != but), None)


class Arc(Generic[K]):
    """Sizes and capacity in bytes."""

    def __init__(self, capacity: int, max_ghosts: int = MAX_GHOSTS) -> None:
        self.capacity = capacity
        self.target = 0
        self._max_ghosts = max_ghosts
        self._once, self._again = _Part[K](), _Part[K]()
        self._once_ghosts, self._again_ghosts = _Part[K](), _Part[K]()

    @property
    def bytes(self) -> int:
        """The sum of the sizes of all that is held."""
        return self._once.bytes + self._again.bytes

    @property
    def ghosts(self) -> int:
        return len(self._once_ghosts) + len(self._again_ghosts)

    def __contains__(self, key: object) -> bool:
        return key in self._once or key in self._again

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def size(self, key: K) -> int:
        """Bytes that `key` holds, 0 for what is not held."""
        return self._once.get(key) or self._again.get(key, 0)

    def frequent(self, key: K) -> bool:
        return key in self._again

    def __iter__(self) -> Iterator[K]:
        """All that is held: used once, then used again, least lately used first in each."""
        yield from self._once
        yield from self._again

    def use(self, key: K) -> None:
        """A new use of something held."""
        part = self._part(key)
        if part is not None:
            self._again.put(key, part.take(key))

    def refresh(self, key: K) -> None:
        """More of the same use: most lately used in its list."""
        part = self._part(key)
        if part is not None:
            part.move_to_end(key)

    def admit(self, key: K, size: int) -> list[K]:
        """Takes in `size` bytes of `key` (`size` more where it is held already). Returns what must leave, in order.

        What is returned is held no more. `key` itself may be there: what it held before must leave, the new bytes stay.
        `size` must fit the capacity."""
        if size > self.capacity:
            raise ValueError(f"{size} bytes can't fit {self.capacity}")
        again_ghost = key in self._again_ghosts
        part = self._part(key)
        if part is None:
            part = self._again if again_ghost or key in self._once_ghosts else self._once
            self._adapt(key)
        leave = self._make_room(size, key, again_ghost)
        part.put(key, part.get(key, 0) + size)
        self._forget()
        return leave

    def restore(self, key: K, size: int, frequent: bool) -> None:
        """Takes in, most lately used, what an earlier run held; what is too much leaves by `set_capacity`."""
        (self._again if frequent else self._once).put(key, size)

    def set_size(self, key: K, size: int) -> None:
        """Corrects the size of something held."""
        part = self._part(key)
        if part is not None:
            part.bytes += size - part[key]
            part[key] = size

    def remove(self, key: K) -> None:
        """Something left for other reasons: no ghost."""
        part = self._part(key)
        if part is not None:
            part.take(key)

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
            self.target = min(self.capacity, self.target + max(once[key], once[key] * again.bytes // max(1, once.bytes)))
            once.take(key)
        elif key in again:
            self.target = max(0, self.target - max(again[key], again[key] * once.bytes // max(1, again.bytes)))
            again.take(key)

    def _make_room(self, size: int, key: K | None, again_ghost: bool) -> list[K]:
        leave: list[K] = []
        while self.bytes + size > self.capacity:
            victim = self._victim(key, again_ghost)
            part = self._part(victim)
            assert part is not None
            if victim != key:
                (self._once_ghosts if part is self._once else self._again_ghosts).put(victim, part[victim])
            part.take(victim)
            leave.append(victim)
        return leave

    def _victim(self, key: K | None, again_ghost: bool) -> K:
        """The paper's REPLACE, for a thing that may be held already."""
        once, again = self._once.oldest(key), self._again.oldest(key)
        over = self._once.bytes > self.target or (again_ghost and self._once.bytes >= self.target)
        if once is not None and (over or again is None):
            return once
        own = self.size(key) if key is not None else 0
        if again is None or 2 * own > self.capacity:
            assert key is not None
            return key
        return again

    def _forget(self) -> None:
        once, again = self._once_ghosts, self._again_ghosts
        while once and self._once.bytes + once.bytes > self.capacity:
            once.take(next(iter(once)))
        while again and self.bytes + once.bytes + again.bytes > 2 * self.capacity:
            again.take(next(iter(again)))
        while len(once) + len(again) > self._max_ghosts:
            part = once if len(once) > len(again) else again
            part.take(next(iter(part)))
