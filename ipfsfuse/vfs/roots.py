"""The mount's root: which names it has, and which it lists.

A name is a CID in any spelling that fits a file name; a name that is none is proved absent without asking anyone.
"""

from collections.abc import Callable, Iterable, Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, NotAllowed, NotFound

Named = tuple[Cid, str]
"""A CID and how it is spelled."""


class Roots:
    """`listed` gives what the root lists, best known first; `opened` is told of each CID used by name."""

    def __init__(self, listed: Callable[[], Iterable[Named]], opened: Callable[[Cid, str], None], allow: frozenset[Cid] | None) -> None:
        self._listed = listed
        self._opened = opened
        self._allow = allow

    def parse(self, name: bytes) -> Cid:
        """The CID of a name. Raises NotFound for a name that is none, NotAllowed outside the allow-list."""
        try:
            cid = cids.parse(name.decode("utf-8"))
        except (NotACid, UnicodeDecodeError) as exc:
            raise NotFound(f"{name[:80]!r} is not a CID") from exc
        if self._allow is not None and cids.canonical(cid) not in self._allow:
            raise NotAllowed(f"{cids.text(cid)} is not on this mount's allow-list")
        return cid

    def note(self, cid: Cid, name: bytes) -> None:
        """`name` was opened and is really there."""
        self._opened(cid, name.decode("utf-8"))

    def entries(self) -> Sequence[Named]:
        """What the root lists now: each CID once, as first spelled."""
        seen: dict[Cid, str] = {}
        for cid, spelling in self._listed():
            key = cids.canonical(cid)
            if (self._allow is None or key in self._allow) and len(spelling.encode()) <= 255:
                seen.setdefault(key, spelling)
        return list(seen.items())
