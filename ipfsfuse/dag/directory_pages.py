"""Lists the entries of a directory, page by page.

The `cookie` of an entry is its index in a basic directory, and comes from its hash in a HAMT. So a reader
resumes exactly where it stopped, even after a restart. Pure. The size of a page is bounded for any blocks.
"""

from typing import NamedTuple

from ipfsfuse.dag import hamt
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.hamt import Spot
from ipfsfuse.dag.nodes import Directory, Node, Shard, holds_values
from ipfsfuse.dag.path import can_hold
from ipfsfuse.dag.traversal import Frontier, Unexpanded, Walk, expand, ready

PAGE_ENTRIES = 2000
"""Entries of a full page. A page of a HAMT may have some more, since the last step adds all its entries."""
MAX_PARALLEL_NODES = 32
"""The most HAMT nodes that are fetched in parallel."""
FIRST_NODES = 4
"""HAMT nodes that are expanded first, when the number of entries of a node is not known yet."""
MAX_TRIE_PARTS = 4 * PAGE_ENTRIES
"""The most parts of a trie that one call keeps: a node that is expanded ahead can have any number."""


class DirectoryEntry(NamedTuple):
    """One entry. `tsize` is its publisher's claim, or negative if there is none. `cookie` is between 0 and
    2**63, and greater than that of every earlier entry."""

    name: bytes
    cid: Cid
    tsize: int
    cookie: int


class Page(NamedTuple):
    """Entries in the directory's own order. Only the last page (`end`) may be empty.

    `skipped` counts the entries that were left out before the last entry: those with a name that no file
    system can hold, and second entries of a name.
    """

    entries: list[DirectoryEntry]
    end: bool
    skipped: int = 0


def entries(directory: Directory | Shard, after: int) -> Walk[Page]:
    """The next entries whose cookie is greater than `after` (0 for the first page). Raises Malformed.

    The cookies of a HAMT follow the trie, depth first by bit index. Its nodes are fetched ahead, in parallel.
    """
    skipped = 0
    while True:
        if isinstance(directory, Directory):
            found, end = _stored(directory, after)
        else:
            found, end = yield from _in_trie(directory, after)
        shown = [entry for entry in found if can_hold(entry.name)]
        if shown and not end:  # the next page begins after the last entry shown, and counts from there
            found = found[: found.index(shown[-1]) + 1]
        skipped += len(found) - len(shown)
        if shown or end:
            return Page(shown, end, skipped)
        after = found[-1].cookie


def _stored(directory: Directory, after: int) -> tuple[list[DirectoryEntry], bool]:
    """The entries in the order stored. A second entry of a name gets an empty name, so that it is left
    out."""
    links = directory.links
    stop = min(after + PAGE_ENTRIES, len(links))
    claims, distinct = not holds_values(directory.cid), directory.has_distinct_names
    found = [
        DirectoryEntry(
            name if distinct or directory.counts(cookie - 1) else b"", cid, tsize if claims else -1, cookie
        )
        for cookie, (cid, name, tsize) in enumerate(links.parts(after, stop), after + 1)
    ]
    return found, stop >= len(links)


_Frontier = Frontier[DirectoryEntry, Spot]


def _in_trie(root: Shard, after: int) -> Walk[tuple[list[DirectoryEntry], bool]]:
    def parts_of(part: Unexpanded[Spot], node: Node) -> _Frontier:
        return _slots(hamt.subshard(node), part.state, after)

    frontier = _slots(root, hamt.TOP, after)
    done = ready(frontier)
    count, total, cut = FIRST_NODES, 0, False
    while frontier and len(done) < PAGE_ENTRIES:
        yield from expand(frontier, count, parts_of)
        total += count
        cut = cut or len(done) + len(frontier) > MAX_TRIE_PARTS
        del frontier[MAX_TRIE_PARTS - len(done) :]
        done += ready(frontier)
        found = len(done) + sum(1 for part in frontier if isinstance(part, DirectoryEntry))
        count = min(max((PAGE_ENTRIES - len(done)) * total // max(found, 1), FIRST_NODES), MAX_PARALLEL_NODES)
    return _distinct(done), not frontier and not cut


def _slots(shard: Shard, spot: Spot, after: int) -> _Frontier:
    """The entries and subnodes of a node at `spot` that come after the cookie `after`."""
    frontier: _Frontier = []
    first = hamt.below(spot, shard, 0)
    shift = hamt.HASH_BITS - first.bits
    for index, cid, name, tsize in hamt.slots(shard):
        prefix = first.prefix + index
        if name:
            key = hamt.hash64(name)
            if key >> shift != prefix:
                raise hamt.misplaced(name, shard)
            cookie = key >> 1 or 1
            if cookie > after:
                frontier.append(DirectoryEntry(name, cid, tsize, cookie))
        elif ((prefix + 1) << shift) - 1 >> 1 > after:
            frontier.append(Unexpanded(cid, Spot(prefix, first.bits)))
    return frontier


def _distinct(found: list[DirectoryEntry]) -> list[DirectoryEntry]:
    """Removes the name of each entry with the same cookie as the entry before it: their hashes agree in 63
    bits.

    Of directories with a million entries, one in ten million has such a pair by chance. Both entries can be
    looked up.
    """
    for index in range(1, len(found)):
        if found[index].cookie == found[index - 1].cookie:
            found[index] = found[index]._replace(name=b"")
    return found
