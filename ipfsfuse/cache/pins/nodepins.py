"""The Kubo nodes of one mount: each is told the same of what is staged, and held to it by tasks of its own.

A child that a node does not have does no harm there, so nothing needs to know which node a block came from.
"""

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

import trio

from ipfsfuse.cache.pins import Copies, PinStatus
from ipfsfuse.cache.pins.kubopins import FAREWELL, KuboPins
from ipfsfuse.cache.pins.nodefiles import NodeFiles, NodeRpc
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import SourceFailed

log = logging.getLogger(__name__)


class NodePins:
    """Implements `Pins` over any number of nodes, none included."""

    def __init__(self, nodes: Mapping[str, KuboPins]) -> None:
        self._nodes = nodes
        self.anywhere = bool(nodes)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, nodes: Mapping[str, Callable[[], NodeRpc]], folder: Path, *, isolated: bool) -> AsyncIterator["NodePins"]:
        """`nodes`: their RPC APIs by name. What is held stays held after the block, for the next start, unless the mount
        is `isolated`. Raises StoreFailed where `folder` can't be used."""
        async with trio.open_nursery() as nursery:
            opened: dict[str, KuboPins] = {}
            for name, rpc in nodes.items():
                opened[name] = await KuboPins.open(NodeFiles(rpc), folder / hashlib.sha256(name.encode()).hexdigest()[:16])
                nursery.start_soon(opened[name].run)
            try:
                yield cls(opened)
            finally:
                if isolated:
                    await _release(opened)
                nursery.cancel_scope.cancel()

    def add(self, cid: Cid) -> None:
        """As `Pins.add`."""
        for node in self._nodes.values():
            node.add(cid)

    def remove(self, cid: Cid) -> None:
        """As `Pins.remove`."""
        for node in self._nodes.values():
            node.remove(cid)

    def state(self, cid: Cid) -> str:
        """As `Pins.state`, of the node that holds it most firmly."""
        states = {node.state(cid) for node in self._nodes.values()}
        return next((state for state in ("user", "cache", "queued") if state in states), "")

    def keep(self, cid: Cid) -> None:
        """Holds `cid` and all below it for good."""
        for node in self._nodes.values():
            node.keep(cid)

    def unkeep(self, cid: Cid) -> None:
        for node in self._nodes.values():
            node.unkeep(cid)

    def settle(self, staged: Iterable[Cid], is_staged: Callable[[Cid], object], pinned: Iterable[Cid], copies: Copies) -> None:
        """Said at the start: holds the files `staged`, and for good what is `pinned`; lets go of what a crash left held
        that is neither any more. Nodes are given the `copies` that they have lost of what they hold."""
        files, for_good = list(staged), set(pinned)
        for name, node in self._nodes.items():
            for cid in set(node.kept()) - for_good:
                node.unkeep(cid)
            for cid in for_good:
                node.keep(cid)
            node.settle([*files, *filter(is_staged, node.held())], copies, name)

    def status(self) -> dict[str, PinStatus]:
        """By node."""
        return {name: node.status() for name, node in self._nodes.items()}


async def _release(nodes: Mapping[str, KuboPins]) -> None:
    """Lets go of everything; a node that does not answer is left to the next start on this host."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + FAREWELL):
        for name, node in nodes.items():
            try:
                await node.release_all()
            except SourceFailed as exc:
                log.warning("%s still holds what this mount had staged (%s): the next mount on this host lets go of it", name, exc)
