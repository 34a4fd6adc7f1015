"""Ways through a DAG, without I/O: the generators that the layers above drive (`front` says how).

`child` and `resolve` go down by name, `entries` lists a directory, `leaves` says which leaves hold a range of a file.
"""

from ipfsfuse.dag import hamt
from ipfsfuse.dag.front import Walk as Walk
from ipfsfuse.dag.front import node as node
from ipfsfuse.dag.front import nodes as nodes
from ipfsfuse.dag.listing import Entry as Entry
from ipfsfuse.dag.listing import Page as Page
from ipfsfuse.dag.listing import entries as entries
from ipfsfuse.dag.nodes import Directory, Link, Node, Shard
from ipfsfuse.dag.path import IpfsPath, can_hold
from ipfsfuse.dag.ranges import leaves as leaves
from ipfsfuse.errors import NotADirectory, NotFound


def child(parent: Directory | Shard, name: bytes) -> Walk[Link | None]:
    """The entry `name` of a directory, its link's name being `name`; None if it is proved absent.

    A HAMT is followed along one path. Of two entries with one name the first counts, as in Kubo. A name that no file
    system can hold is in no directory.
    """
    if not can_hold(name):
        return None
    if isinstance(parent, Directory):
        return parent.by_name.get(name)
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
    """The node at `path`; a symlink is not followed. Raises NotFound, NotADirectory, naming the part of the path."""
    here: Node = yield from node(path.root)
    for depth, name in enumerate(path.names):
        if not isinstance(here, Directory | Shard):
            raise NotADirectory(f"{IpfsPath(path.root, path.names[:depth])} is not a directory")
        link = yield from child(here, name)
        if link is None:
            raise NotFound(f"{IpfsPath(path.root, path.names[: depth + 1])}: no such entry")
        here = yield from node(link.cid)
    return here
