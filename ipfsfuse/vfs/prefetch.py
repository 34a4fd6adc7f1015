"""Prefetch in directories.

If a program lists a directory and then uses its children in that order, the next children are fetched ahead.
If it does so with several directories, the directories after them are fetched ahead too, with their contents.
A listing alone fetches nothing, and a program that picks single files causes no prefetch.

- `ScanTracker` is pure policy: it is told which children of a listed page were used, and says which to fetch.
- `SubtreePrefetcher` decides for which directories one request for all blocks (a CAR) is better than one
  request for each block.
- `DirectoryPrefetcher` carries out both.

Concurrency: on the event loop. At most FETCHED_TOGETHER blocks of one page are fetched at a time.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from itertools import count, repeat

import trio

from ipfsfuse.cache.base import Cache
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.dagpb import Links
from ipfsfuse.dag.nodes import Directory, Node, Shard
from ipfsfuse.errors import IpfsFuseError, Malformed, Unsupported
from ipfsfuse.sources.base import Subtree, current_request
from ipfsfuse.structures import Lru

SMALL_FILE = 64 << 10
"""Bytes of the largest child, as its link claims, that counts as small. For larger files there is
read-ahead."""

# Scans
STEPS_TO_SCAN = 2
"""Uses in order, after the first, that make a scan. From then on the next children are fetched."""
MAX_GAP = 4
"""How far the next use may be from the last one: the kernel may know some children already, or the program
may skip some."""
PREFETCH_CHILDREN = 64
"""Children that are fetched ahead of the reader."""
FETCHED_TOGETHER = 8
DIRECTORIES_AHEAD = 4
"""Directories that are fetched ahead of a reader that goes through the contents of each."""
MAX_TRACKED = 20_000
"""Children of the listed pages that are remembered."""

# Whole directories by one request
MAX_CONTENTS = 16 << 20
"""Bytes, as its links claim, of the largest directory whose contents are fetched by one request."""
MAX_NODES = 4 << 20
"""Bytes of HAMT nodes that one request fetches, enough for about 50,000 entries."""
FEW_NODES = 8
"""A HAMT with fewer nodes than this below its root is fetched node by node."""
CLAIM_SLACK = 1 << 20
"""Bytes that an answer may have beyond what the links claim."""
MAX_DONE = 10_000
"""Fetched directories that are remembered."""
MAX_SMALL_FILES = 16 << 20
"""Bytes of small files that were fetched and not read yet."""


class ScanTracker:
    """Follows a reader through the children of one listed page."""

    def __init__(self, directory: Cid, children: Sequence[Cid], above: "ScanTracker | None" = None) -> None:
        """`above` tracks the page on which `directory` itself was listed."""
        self.directory = directory
        self.children = children
        self.above = above
        self.running = False
        """Whether a task is fetching children of this page."""
        self.deep = False
        """Whether the reader also goes through the contents of the directories on this page."""
        self._last = -1
        self._steps = 0
        self._next = self._goal = self._next_deep = 0

    def note(self, index: int) -> bool:
        """Notes that child `index` was used. Returns whether children should be fetched now."""
        if index == self._last:
            return False
        follows = self._last < index <= self._last + MAX_GAP
        self._steps = self._steps + 1 if follows and self._last >= 0 else 0
        self._last = index
        if not self._steps:
            self._next = self._next_deep = 0
        if self._steps < STEPS_TO_SCAN:
            self._goal = 0
            self.deep = self.deep and self._steps > 0
            return self.deep
        self._next = max(self._next, index + 1)
        self._goal = min(index + 1 + PREFETCH_CHILDREN, len(self.children))
        return (
            self.deep
            or self._goal - self._next >= min(PREFETCH_CHILDREN // 4, len(self.children) - self._next) > 0
        )

    def take(self) -> Cid | None:
        """The next child to fetch; None if enough are fetched ahead of the reader."""
        if self._next >= self._goal:
            return None
        self._next += 1
        return self.children[self._next - 1]

    def take_deep(self) -> Cid | None:
        """The next child to fetch with its contents; None if enough are fetched ahead of the reader."""
        self._next_deep = max(self._next_deep, self._last + 1)
        if self._next_deep > self._last + DIRECTORIES_AHEAD or self._next_deep >= len(self.children):
            return None
        self._next_deep += 1
        return self.children[self._next_deep - 1]


class SmallFileBuffer:
    """Small files that arrived with their directory and were not read yet.

    Each is given away once: to the C thread when the reader comes near, or to the program that opens it. If
    there are too many, the oldest are dropped."""

    def __init__(self) -> None:
        self._files: OrderedDict[Cid, bytes] = OrderedDict()
        self._bytes = 0

    def put(self, cid: Cid, content: bytes) -> None:
        """Adds the verified content of a raw file that has just arrived."""
        if cid not in self._files:
            self._files[cid] = content
            self._bytes += len(content)
            while self._bytes > MAX_SMALL_FILES:
                self._bytes -= len(self._files.popitem(last=False)[1])

    def take(self, cid: Cid) -> bytes | None:
        content = self._files.pop(cid, None)
        if content is not None:
            self._bytes -= len(content)
        return content


class SubtreePrefetcher:
    """Fetches the blocks of a directory by one request if a request for each block would cost more."""

    def __init__(
        self, cache: Cache, remember: Callable[[Node, int], None], small_files: SmallFileBuffer
    ) -> None:
        """Calls `remember` with each node that arrives and the size of its block. Puts small files into
        `small_files`."""
        self._cache = cache
        self._remember = remember
        self._small_files = small_files
        self._done: Lru[Cid, bool] = Lru(MAX_DONE)

    def forget(self) -> None:
        """Forgets which directories were fetched. Called when blocks were evicted."""
        self._done.clear()

    def nodes_of(self, directory: Directory | Shard) -> None:
        """Starts to fetch the nodes of a HAMT. Called when `directory` is listed from its beginning, because
        all nodes will be needed."""
        if isinstance(directory, Shard):
            deeper = hamt.deeper(directory)
            if len(deeper) >= FEW_NODES:
                self._cache.gather(Subtree(directory.cid, False, MAX_NODES), deeper, self._node_arrived)

    def contents_of(self, directory: Node) -> trio.Event | None:
        """Starts to fetch the children of `directory`. The returned event is set when they have arrived.

        Returns None if they are too large to be fetched together, or if they were fetched before."""
        if self._done.get(directory.cid):
            return None
        self._done.put(directory.cid, True)
        links = _links(directory)
        total = sum(links.tsizes)
        small = sum(size for size in links.tsizes if size <= SMALL_FILE)
        if not links or total > MAX_CONTENTS or 2 * small < total:
            return None
        subtree = Subtree(directory.cid, True, 2 * total + CLAIM_SLACK)
        return self._cache.gather(subtree, links.cids(), self._content_arrived)

    def _node_arrived(self, cid: Cid, block: bytes) -> Sequence[Cid]:
        node = self._parsed(cid, block)
        return hamt.deeper(node) if isinstance(node, Shard) else ()

    def _content_arrived(self, cid: Cid, block: bytes) -> Sequence[Cid]:
        node = self._parsed(cid, block)
        if cids.codec(cid) == cids.RAW and len(block) <= SMALL_FILE:
            self._small_files.put(cid, block)
        return _links(node).cids() if node is not None else ()

    def _parsed(self, cid: Cid, block: bytes) -> Node | None:
        if len(block) > nodes.MAX_PARSED_ON_LOOP or nodes.holds_values(cid):
            return None
        try:
            node = nodes.parse(cid, block)
        except (Malformed, Unsupported):  # the program that reads it gets the error
            return None
        self._remember(node, len(block))
        return node


def _links(node: Node) -> Links:
    """The links of a UnixFS directory, or of one node of a HAMT. Empty for other nodes, because links of
    other codecs state no sizes."""
    return (
        node.links if isinstance(node, Directory | Shard) and cids.codec(node.cid) == cids.DAG_PB else Links()
    )


class DirectoryPrefetcher:
    """Tracks the pages that were listed last, and fetches what `ScanTracker` says.

    `fetch` fetches one child. It is not called if `known` returns something for the child. `contents_of` is
    `SubtreePrefetcher.contents_of`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        fetch: Callable[[Cid], Awaitable[Node]],
        known: Callable[[Cid], object | None],
        contents_of: Callable[[Node], trio.Event | None],
    ) -> None:
        self._nursery = nursery
        self._fetch = fetch
        self._known = known
        self._contents_of = contents_of
        self._pages: OrderedDict[tuple[Cid, int], ScanTracker] = OrderedDict()
        self._positions: dict[Cid, tuple[ScanTracker, int]] = {}

    def listed(self, directory: Cid, after: int, children: Sequence[tuple[Cid, int]]) -> None:
        """Notes that a page of `directory` was listed from place `after`, with these entries (CID, claimed
        size)."""
        key = (directory, after)
        if key in self._pages:
            self._pages.move_to_end(key)
            return
        above = self._positions.get(directory, (None, 0))[0]
        small = [cid for cid, size in children if cids.codec(cid) != cids.RAW or size <= SMALL_FILE]
        page = self._pages[key] = ScanTracker(directory, small, above)
        self._positions.update(zip(page.children, zip(repeat(page), count()), strict=False))
        while len(self._positions) > MAX_TRACKED and len(self._pages) > 1:
            _key, old = self._pages.popitem(last=False)
            for cid in old.children:
                if self._positions.get(cid, (None, 0))[0] is old:
                    del self._positions[cid]

    def following(self, cid: Cid) -> Sequence[Cid]:
        """The PREFETCH_CHILDREN children after `cid` on its page."""
        page, index = self._positions.get(cid, (None, 0))
        return page.children[index + 1 : index + 1 + PREFETCH_CHILDREN] if page is not None else ()

    def first(self, directory: Cid) -> Sequence[Cid]:
        """The first PREFETCH_CHILDREN children of `directory`."""
        page = self._pages.get((directory, 0))
        return page.children[:PREFETCH_CHILDREN] if page is not None else ()

    def used(self, cid: Cid) -> None:
        """Notes that a program used `cid`."""
        position = self._positions.get(cid)
        if position is not None and position[0].note(position[1]) and not position[0].running:
            position[0].running = True
            self._nursery.start_soon(self._run, position[0])

    async def _run(self, page: ScanTracker) -> None:
        current_request.set(current_request.get().for_background())
        try:
            if page.deep:
                while (cid := page.take_deep()) is not None:
                    await self._contents(cid)
                return
            if await self._contents(page.directory) and page.above is not None:
                page.above.deep = True
            async with trio.open_nursery() as nursery:
                for _ in range(FETCHED_TOGETHER):
                    nursery.start_soon(self._work, page, nursery.cancel_scope)
        except IpfsFuseError:
            pass  # the program that uses that directory gets the error
        finally:
            page.running = False

    async def _contents(self, directory: Cid) -> bool:
        """Fetches the contents of `directory` by one request. Returns False if that is not worth it."""
        arrived = self._contents_of(await self._fetch(directory))
        if arrived is None:
            return False
        await arrived.wait()
        return True

    async def _work(self, page: ScanTracker, scope: trio.CancelScope) -> None:
        while (cid := page.take()) is not None:
            if self._known(cid) is None:
                try:
                    await self._fetch(cid)
                except IpfsFuseError:
                    scope.cancel()  # the program that uses that child gets the error
                    return
