"""What a directory lists, page by page.

An entry's `place` is a function of where it stands alone (a basic directory: its index, a HAMT: its hash), so that a
reader goes on exactly where it stopped, after a restart too. Pure; a page is bounded whatever the blocks say.
"""

from typing import NamedTuple

from ipfsfuse.dag import hamt
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.front import Front, Unopened, Walk, known, open_first
from ipfsfuse.dag.hamt import Spot
from ipfsfuse.dag.nodes import Directory, Node, Shard
from ipfsfuse.dag.path import can_hold

PAGE = 2000
"""Entries after which a page is full; what one step has found is not cut off, so a HAMT's may have some more."""
AT_ONCE = 32
FIRST = 4
"""Nodes of a HAMT that are opened before anything tells how many entries one holds."""
MAX_FRONT = 4 * PAGE
"""Parts of a trie that one call keeps: nodes opened ahead could hold any number."""


class Entry(NamedTuple):
    """One name. `tsize` is its publisher's claim; 0 < `place` < 2**63, greater than that of every entry before it."""

    name: bytes
    cid: Cid
    tsize: int
    place: int


class Page(NamedTuple):
    """Entries in the directory's own order; only the last page (`end`) may be empty.

    `skipped` counts what is left out before the last entry: names that no file system can hold, and names that stand a
    second time.
    """

    entries: list[Entry]
    end: bool
    skipped: int = 0


def entries(directory: Directory | Shard, after: int) -> Walk[Page]:
    """The next entries whose place is greater than `after` (0 for the first page). Raises Malformed.

    In a HAMT, places follow the trie, depth first by bit index; nodes are fetched ahead side by side.
    """
    skipped = 0
    while True:
        if isinstance(directory, Directory):
            found, end = _stored(directory, after)
        else:
            found, end = yield from _in_trie(directory, after)
        kept = [entry for entry in found if can_hold(entry.name)]
        if kept and not end:  # the next page begins behind the last entry kept, and counts from there
            found = found[: found.index(kept[-1]) + 1]
        skipped += len(found) - len(kept)
        if kept or end:
            return Page(kept, end, skipped)
        after = found[-1].place


def _stored(directory: Directory, after: int) -> tuple[list[Entry], bool]:
    """Entries in the order stored. A name's second entry gets an empty name, which nothing can hold."""
    links, first = directory.links, directory.by_name
    stop = min(after + PAGE, len(links))
    found: list[Entry] = []
    for place, link in enumerate(links[after:stop], after + 1):
        name = link.name if first[link.name] is link else b""
        found.append(Entry(name, link.cid, link.tsize, place))
    return found, stop >= len(links)


_Front = Front[Entry, Spot]


def _in_trie(root: Shard, after: int) -> Walk[tuple[list[Entry], bool]]:
    def opened(part: Unopened[Spot], node: Node) -> _Front:
        return _slots(hamt.subshard(node), part.state, after)

    front = _slots(root, hamt.TOP, after)
    count, total, cut = FIRST, 0, False
    while len(done := known(front)) < min(PAGE, len(front)):
        yield from open_first(front, count, opened)
        total += count
        cut = cut or len(front) > MAX_FRONT
        del front[MAX_FRONT:]
        found = sum(1 for part in front if isinstance(part, Entry))
        count = min(max((PAGE - len(done)) * total // max(found, 1), FIRST), AT_ONCE)
    return _distinct(done), len(done) == len(front) and not cut


def _slots(shard: Shard, spot: Spot, after: int) -> _Front:
    """What of a node at `spot` stands behind `after`."""
    front: _Front = []
    for index, link in shard.slots:
        place = hamt.below(spot, shard, index)
        if hamt.last(place) >> 1 <= after:
            continue
        name = hamt.entry_name(shard, link)
        if not name:
            front.append(Unopened(link.cid, place))
        elif (key := max(hamt.placed(name, place, shard) >> 1, 1)) > after:
            front.append(Entry(name, link.cid, link.tsize, key))
    return front


def _distinct(found: list[Entry]) -> list[Entry]:
    """The same, without a name for an entry whose hash agrees with the one before in 63 bits: both have one place.

    By chance one directory in ten million of a million entries has such a pair. Each can still be looked up.
    """
    for index in range(1, len(found)):
        if found[index].place == found[index - 1].place:
            found[index] = found[index]._replace(name=b"")
    return found
