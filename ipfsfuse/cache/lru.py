"""A dictionary that forgets what was used least lately, bounded by weight. Pure."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `limit` of weight; one item heavier than that is not kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        found = self._items.get(key)
        if found is None:
            return None
        self._items.move_to_end(key)
        return found[0]

    def clear(self) -> None:
        self._items.clear()
        self._weight = 0

    def put(self, key: K, value: V, weight: int = 1) -> None:
        old = self._items.pop(key, None)
        self._weight -= old[1] if old else 0
        if weight > self._limit:
            return
        self._items[key] = (value, weight)
        self._weight += weight
        while self._weight > self._limit:
            self._weight -= self._items.popitem(last=False)[1][1]
