"""Names in the mount's root: what was opened there by name, as first spelled.

A name is listed while its own block or file is staged, or kept for good: whoever goes below it reads that
block, so it leaves after what is only below it. Concurrency: the event loop's; rows are written behind.
"""

from collections import deque
from collections.abc import Iterator

from ipfsfuse.cache.store.index import Damaged
from ipfsfuse.cache.store.store import Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import StoreFailed

MAX_NAMES = 10_000
"""Names kept; beyond them, those that are staged no more are looked for."""
LOOK_AT = 4
"""Names that are looked at when one more is noted: together with the noting it takes no longer for many than
for few."""


class RootNames:
    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            rows = store.index.rows(
                "SELECT cid, spelling FROM roots ORDER BY at", lambda cid, name: (cids.decode(cid), str(name))
            )
            self._names: dict[Cid, str] = dict(rows)
        except (StoreFailed, Damaged):
            self._names = {}
        self._round = deque(self._names)
        """All of them, the one that is to be looked at next first."""

    def note(self, cid: Cid, spelling: str) -> None:
        own = cids.canonical(cid)
        if own in self._names:
            return
        if len(self._names) >= MAX_NAMES:
            self._forget_some()
        self._names[own] = spelling
        self._round.append(own)
        self._store.write_later("INSERT OR IGNORE INTO roots (cid, spelling) VALUES (?, ?)", (own, spelling))

    def spelling(self, cid: Cid) -> str:
        """As it was opened first, else as usual."""
        return self._names.get(cids.canonical(cid)) or cids.text(cid)

    def staged(self) -> Iterator[tuple[Cid, str]]:
        for cid, spelling in list(self._names.items()):
            if self._store.holds(cid):
                yield cid, spelling

    def _forget_some(self) -> None:
        for _ in range(LOOK_AT):
            cid = self._round.popleft()
            if self._store.holds(cid):
                self._round.append(cid)
            else:
                del self._names[cid]
                self._store.write_later("DELETE FROM roots WHERE cid = ?", (cid,))
