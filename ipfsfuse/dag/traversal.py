"""Traversals of a DAG without I/O.

A `Walk` is a generator. It yields the CIDs of the nodes that it needs next, to be fetched in parallel. Those
nodes must be sent to it in the same order. It returns its result. The CIDs that it yields are distinct, and
none is an identity CID. A walk that computes for long yields an empty sequence, so that other tasks can run.
A walk can be dropped at any yield. Since it does no I/O, it can be tested without a network. `drive` runs it.

`child` and `resolve` go down by name. `directory_pages.entries` lists a directory, and `file_layout.leaves`
finds the leaves that hold a range of a file; both expand a `Frontier`.

`BlockWalk` visits all blocks of a DAG in order.
"""

from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Generic, NamedTuple, TypeVar, cast

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, Link, Node, Shard, parse
from ipfsfuse.dag.path import IpfsPath, can_hold
from ipfsfuse.errors import NotADirectory, NotFound

T = TypeVar("T")
Ready = TypeVar("Ready")
State = TypeVar("State")

Walk = Generator[Sequence[Cid], Sequence[Node], T]


async def drive(walk: Walk[T], fetch: Callable[[Sequence[Cid]], Awaitable[Sequence[Node]]]) -> T:
    """Runs a walk to its result. `fetch` returns the nodes of its CIDs in order. Without CIDs, it should let
    other tasks run."""
    try:
        wanted = next(walk)
        while True:
            wanted = walk.send(await fetch(wanted))
    except StopIteration as stop:
        return cast(T, stop.value)
    finally:
        walk.close()


def nodes(wanted: Sequence[Cid]) -> Walk[list[Node]]:
    """The nodes of `wanted`. Identity CIDs are decoded here. Raises Malformed, Unsupported."""
    found: dict[Cid, Node] = {}
    ask: list[Cid] = []
    for cid in dict.fromkeys(wanted):
        inline = cids.inline_block(cid)
        if inline is None:
            ask.append(cid)
        else:
            found[cid] = parse(cid, inline)
    if ask:
        found.update(zip(ask, (yield ask), strict=True))
    return [found[cid] for cid in wanted]


def node(cid: Cid) -> Walk[Node]:
    """The node that `cid` names."""
    return (yield from nodes([cid]))[0]


# -- by name -------------------------------------------------------------------------------------------------


def child(parent: Directory | Shard, name: bytes) -> Walk[Link | None]:
    """The entry `name` of a directory, as a link with the name `name`. None if it is proved absent.

    In a HAMT only the nodes on the way to the name are read. If a directory has two entries of one name, the
    first counts, as in Kubo. A name that no file system can hold is in no directory.
    """
    if not can_hold(name):
        return None
    if isinstance(parent, Directory):
        return parent.find(name)
    key, spot, shard = hamt.hash64(name), hamt.TOP, parent
    while True:
        spot, link = hamt.slot(shard, spot, key)
        if link is None:
            return None
        found = hamt.entry_name(shard, link)
        if found:
            hamt.placed(found, spot, shard)
            return Link(link.cid, name, link.tsize) if found == name else None
        shard = hamt.subshard((yield from node(link.cid)))


def resolve(path: IpfsPath) -> Walk[Node]:
    """The node at `path`. Symlinks are not followed. Raises NotFound or NotADirectory, which name the part of
    the path that failed."""
    here: Node = yield from node(path.root)
    for depth, name in enumerate(path.names):
        if not isinstance(here, Directory | Shard):
            raise NotADirectory(f"{IpfsPath(path.root, path.names[:depth])} is not a directory")
        link = yield from child(here, name)
        if link is None:
            raise NotFound(f"{IpfsPath(path.root, path.names[: depth + 1])}: no such entry")
        here = yield from node(link.cid)
    return here


# -- in order ------------------------------------------------------------------------------------------------


MAX_PARTS_AT_A_TIME = 4000
"""Parts that are made before other tasks can run: about 10 ms."""
NODE_COST = 100
"""A node counts as so many more parts, since parts that are left out take time too."""


class Unexpanded(NamedTuple, Generic[State]):
    """A node of a frontier that has not been fetched yet. `state` describes its position."""

    cid: Cid
    state: State


Frontier = list[Ready | Unexpanded[State]]
"""Consecutive parts of a tree, in order: known parts, and nodes to be expanded."""


def expand(
    frontier: Frontier[Ready, State],
    count: int,
    parts_of: Callable[[Unexpanded[State], Node], Frontier[Ready, State]],
) -> Walk[None]:
    """Fetches the first `count` unexpanded nodes in parallel, and replaces each by its parts."""
    unexpanded = ((index, part) for index, part in enumerate(frontier) if isinstance(part, Unexpanded))
    chosen = list(islice(unexpanded, count))
    fetched = yield from nodes([part.cid for _index, part in chosen])
    left = MAX_PARTS_AT_A_TIME
    for (index, part), node in reversed(list(zip(chosen, fetched, strict=True))):
        parts = parts_of(part, node)
        frontier[index : index + 1] = parts
        left -= len(parts) + NODE_COST
        if left <= 0:
            left = MAX_PARTS_AT_A_TIME
            yield ()


def ready(frontier: Frontier[Ready, State]) -> list[Ready]:
    """Removes the parts before the first unexpanded node, and returns them."""
    parts: list[Ready] = []
    for part in frontier:
        if isinstance(part, Unexpanded):
            break
        parts.append(part)
    del frontier[: len(parts)]
    return parts


# -- all blocks ----------------------------------------------------------------------------------------------


class BlockWalk(Generic[State]):
    """Visits the blocks of some DAGs: depth first, parents before their children, the children in order, each
    CID once.

    Iterate over it, get each block, and `add` the children. Two CIDs of one block with different codecs are
    both visited, since only one of them may have links. Raw identity CIDs are left out. Another identity CID
    may have links (`cid.inline_or_empty_block` has its block). The caller may keep any `state` with a CID.
    """

    def __init__(self, roots: Iterable[Cid], state: State) -> None:
        self.seen: set[Cid] = set()
        """The CIDs that were visited, in canonical form."""
        self._waiting: list[Unexpanded[State]] = []
        """A stack: the last item is visited next."""
        self.add(roots, state)

    def __iter__(self) -> Iterator[Unexpanded[State]]:
        while found := self.take(1):
            yield found[0]

    def take(self, count: int) -> list[Unexpanded[State]]:
        """The next `count` items to visit, or fewer at the end."""
        found: list[Unexpanded[State]] = []
        while self._waiting and len(found) < count:
            item = self._waiting.pop()
            if (cid := cids.canonical(item.cid)) not in self.seen:
                self.seen.add(cid)
                found.append(item)
        return found

    def put_back(self, items: Sequence[Unexpanded[State]]) -> None:
        """Undoes `take` for the last of its items."""
        self.seen.difference_update(cids.canonical(item.cid) for item in items)
        self._waiting += reversed(items)

    def upcoming(self, count: int) -> list[Cid]:
        """At most `count` CIDs that are to be visited soon."""
        return [item.cid for item in self._waiting[: -count - 1 : -1] if not self._is_done(item.cid)]

    def add(self, children: Iterable[Cid], state: State) -> None:
        """Adds `children`, to be visited next."""
        new = [Unexpanded(cid, state) for cid in dict.fromkeys(children) if not self._is_done(cid)]
        new.reverse()
        self._waiting += new

    def _is_done(self, cid: Cid) -> bool:
        if cids.codec(cid) == cids.RAW and cids.multihash(cid)[:1] == b"\0":
            return True
        return cids.canonical(cid) in self.seen
