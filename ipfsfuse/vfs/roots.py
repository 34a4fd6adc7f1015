"""The mount's root: which names it has, and which it lists.

A name is a CID in any spelling that fits a file name; a name that is none is proved absent without asking
anyone.
"""

from collections.abc import Callable, Iterable, Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import NotACid, NotAllowed, NotFound
from ipfsfuse.fileio import threads

Named = tuple[Cid, str]
"""A CID and how it is spelled."""
Listed = tuple[Cid, str | Cid]
"""A canonical CID and its name: as it is spelled, or a CID whose usual spelling it is. `name_of` gives it: a
text for each of 200,000 roots would take more memory and time than the rest."""


def name_of(listed: Listed) -> bytes:
    """What the root calls it; longer than NAME_MAX where no file system can hold that."""
    spelled = listed[1]
    return (spelled if isinstance(spelled, str) else cids.text(spelled)).encode()


class Roots:
    """`of_sources` gives the roots of all sources, and is called in a worker thread: a library's are files.
    `named` gives what else is listed, on the event loop. `opened` is told of each CID used by name."""

    def __init__(
        self,
        of_sources: Callable[[], Iterable[Cid]],
        named: Callable[[], Iterable[Named]],
        opened: Callable[[Cid, str], None],
        allow: frozenset[Cid] | None,
    ) -> None:
        self._of_sources = of_sources
        self._named = named
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

    async def entries(self) -> Sequence[Listed]:
        """What the root lists now: each CID once, as first spelled."""
        return await threads.run_sync(self._entries, list(self._named()))

    def _entries(self, named: Sequence[Named]) -> Sequence[Listed]:
        seen: dict[Cid, str | Cid] = {}
        for root in self._of_sources():
            seen.setdefault(cids.canonical(root), root)
        for cid, spelling in named:
            seen.setdefault(cids.canonical(cid), spelling)
        return [item for item in seen.items() if self._allow is None or item[0] in self._allow]
