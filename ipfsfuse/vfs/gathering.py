"""Directories brought in by one answer, where a request for each of their blocks would cost more than the blocks.

Pure policy over `Cache.gather`: what is worth it, and which blocks are wanted. Concurrency: the event loop's.
"""

from collections.abc import Callable, Sequence

import trio

from ipfsfuse.cache.base import Cache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, Link, Node, Shard
from ipfsfuse.errors import Malformed, Unsupported
from ipfsfuse.sources.base import Subtree
from ipfsfuse.vfs.handing import Handing
from ipfsfuse.vfs.lru import Lru

MAX_CONTENTS = 16 << 20
"""Bytes by its links' word of the largest directory whose contents are brought in at once: as far as a file is read ahead."""
SMALL = 64 << 10
"""Bytes of the largest child by its link's word that counts as small: larger files read ahead by themselves."""
MAX_NODES = 4 << 20
"""Bytes of HAMT nodes that are brought in at once: those of some 50,000 entries."""
FEW = 8
"""Nodes of a HAMT below its root that are rather asked for one by one."""
SLACK = 1 << 20
"""Bytes that an answer may have beyond what the links say."""
REMEMBERED = 10_000
"""Directories whose contents were brought in: not again, soon."""


class Gatherer:
    def __init__(self, cache: Cache, remember: Callable[[Node, int], None], handing: Handing) -> None:
        """`remember` is told each node that came, and its block's size; `handing` takes small files."""
        self._cache = cache
        self._remember = remember
        self._handing = handing
        self._done: Lru[Cid, bool] = Lru(REMEMBERED)

    def forget(self) -> None:
        """Blocks have left the cache: contents may have to be brought in anew."""
        self._done.clear()

    def nodes_of(self, directory: Directory | Shard) -> None:
        """`directory` is being listed from its beginning: all nodes of a HAMT will be wanted."""
        if isinstance(directory, Shard):
            deeper = _deeper(directory)
            if len(deeper) >= FEW:
                self._cache.gather(Subtree(directory.cid, False, MAX_NODES), deeper, self._node_seen)

    def contents_of(self, directory: Node) -> trio.Event | None:
        """The children of `directory` are being used one after the other. The event is set when they have come; None where
        they are too large to be brought in together, or were so already."""
        links = _links(directory)
        total = sum(link.tsize for link in links)
        small = sum(link.tsize for link in links if link.tsize <= SMALL)
        if not links or total > MAX_CONTENTS or 2 * small < total or self._done.get(directory.cid):
            return None
        self._done.put(directory.cid, True)
        return self._cache.gather(Subtree(directory.cid, True, 2 * total + SLACK), [link.cid for link in links], self._content_seen)

    def _node_seen(self, cid: Cid, block: bytes) -> Sequence[Cid]:
        node = self._parsed(cid, block)
        return _deeper(node) if isinstance(node, Shard) else ()

    def _content_seen(self, cid: Cid, block: bytes) -> Sequence[Cid]:
        node = self._parsed(cid, block)
        if cids.codec(cid) == cids.RAW and len(block) <= SMALL:
            self._handing.put(cid, block)
        return [link.cid for link in _links(node)] if node is not None else ()

    def _parsed(self, cid: Cid, block: bytes) -> Node | None:
        if len(block) > nodes.PARSED_AT_ONCE:
            return None
        try:
            node = nodes.parse(cid, block)
        except (Malformed, Unsupported):  # who reads it will hear
            return None
        self._remember(node, len(block))
        return node


def _deeper(shard: Shard) -> list[Cid]:
    return [link.cid for _index, link in shard.slots if not hamt.entry_name(shard, link)]


def _links(node: Node) -> Sequence[Link]:
    """What lies in a directory, or in one node of a HAMT; nothing for anything else."""
    if isinstance(node, Directory):
        return node.links
    return [link for _index, link in node.slots] if isinstance(node, Shard) else ()
