"""Fetches a whole DAG, for `ipfsfuse prefetch` and `ipfsfuse pin`. Staged blocks are not fetched again, so it
can be resumed.

Concurrency: some files in parallel. Memory holds all CIDs that were seen, and the remaining children of each
directory on the current path.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes, traversal
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Leaf, Node, Shard
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import NotALeaf
from ipfsfuse.structures import Buffer
from ipfsfuse.vfs.tree import Tree

FILES_TOGETHER = 8
"""Files that are fetched in parallel."""
REQUESTED_BYTES = 16 << 20
"""Bytes of one file that are requested together."""


@dataclass(slots=True)
class Totals:
    """What has been fetched so far."""

    files: int = 0
    directories: int = 0
    bytes: int = 0
    expected: int = 0
    """Bytes in all, as the links claim; 0 if they claim nothing."""


OnProgress = Callable[[Totals], Awaitable[None]]
OnFile = Callable[[FileRef], Awaitable[None]]


async def fetch_all(
    tree: Tree, root: Cid, depth: int | None, on_progress: OnProgress, on_file: OnFile | None = None
) -> Totals:
    """Fetches `root` and everything below it, down to `depth` levels of directories (None: all).

    Calls `on_file` for each file before its leaves are fetched. Raises the first error of any block."""
    job = _Job(tree, on_progress, on_file)
    node = await tree.node(root)
    if isinstance(node, File):
        job.totals.expected = node.size
    elif isinstance(node, Directory | Shard):
        job.totals.expected = sum(node.links.tsizes)
    await job.run(node, depth)
    await tree.cache.wait_until_staged()
    return job.totals


class _Job:
    def __init__(self, tree: Tree, on_progress: OnProgress, on_file: OnFile | None) -> None:
        self.totals = Totals()
        self._tree = tree
        self._on_progress = on_progress
        self._on_file = on_file
        self._free = trio.Semaphore(FILES_TOGETHER)
        self._failed: list[Exception] = []

    async def run(self, root: Node, depth: int | None) -> None:
        walk = BlockWalk([root.cid], depth)
        async with trio.open_nursery() as nursery:
            for cid, left in walk:
                if self._failed:
                    break
                node = await self._tree.node(cid)
                if isinstance(node, Directory | Shard):
                    self.totals.directories += 1
                    if left is None or left > 0:
                        walk.add(await self._entries(cid), None if left is None else left - 1)
                elif isinstance(node, File):
                    await self._free.acquire()
                    nursery.start_soon(self._file, node, nursery.cancel_scope)
                else:
                    await trio.lowlevel.checkpoint()  # an inline node comes without a checkpoint
        if self._failed:
            raise self._failed[0]

    async def _entries(self, cid: Cid) -> list[Cid]:
        after, end = 0, False
        found: list[Cid] = []
        while not end:
            page = await self._tree.entries(cid, after)
            found += [entry.cid for entry in page.entries]
            end, after = page.end, page.entries[-1].cookie if page.entries else after
        return found

    async def _file(self, file: File, scope: trio.CancelScope) -> None:
        try:
            if nodes.holds_values(file.cid):  # its content came with its block
                self.totals.bytes += file.size
            else:
                ref = FileRef(cids.canonical(file.cid), file.size)
                if self._on_file is not None:
                    await self._on_file(ref)
                await self._leaves(file, ref)
            self.totals.files += 1
            await self._on_progress(self.totals)
        except Exception as exc:
            self._failed.append(exc)
            scope.cancel()
        finally:
            self._free.release()

    async def _leaves(self, file: File, ref: FileRef) -> None:
        offset, sure = 0, False
        while offset < file.size:
            window = await traversal.drive(
                file_layout.leaves(file, offset, REQUESTED_BYTES, sure), self._tree.nodes
            )
            try:
                await self._window(ref, window)
            except NotALeaf:
                if sure:
                    raise
                sure = True
                continue
            offset = window[-1].offset + window[-1].size

    async def _window(self, ref: FileRef, window: list[Leaf]) -> None:
        came: set[Leaf] = set()

        def arrived(leaf: Leaf, content: Buffer) -> None:
            came.add(leaf)
            self.totals.bytes += len(content)

        await self._tree.cache.ahead(ref, window, arrived)
        for leaf in window:
            if leaf not in came:
                arrived(leaf, await self._tree.cache.leaf(ref, leaf))
        await self._on_progress(self.totals)
