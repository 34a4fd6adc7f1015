"""All blocks below a directory from where each is looked up by its CID: some at a time, parents before
children.

Nothing is verified: who takes a block does that. One that lies about its links costs some reads.
"""

import time
from collections.abc import Callable, Sequence

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import IpfsFuseError

AT_ONCE = 8
"""Blocks that are looked up by one call: on a slow disk each takes 10 ms."""
SOON = 0.03
"""Seconds after which what came is given, however little: who waits gives up after some more."""
TOGETHER = 1 << 20
"""Bytes after which it is given too."""

Find = Callable[[Sequence[Cid]], Sequence[bytes | None]]
"""The blocks of some CIDs, or of the first of them; None for what is not there."""


class Descent:
    def __init__(self, find: Find, root: Cid, limit: int) -> None:
        """`limit`: bytes after which nothing more is looked up."""
        self._find = find
        self._left = limit
        self._waiting = [root]
        """Those that come next stand last."""
        self._seen = {root}
        self.lacking = False
        """Whether one was not there."""

    def some(self) -> Sequence[tuple[Cid, bytes]]:
        """The next few blocks; none where that was all."""
        came: list[tuple[Cid, bytes]] = []
        enough = max(self._left - TOGETHER, 0)
        until = time.monotonic() + SOON
        while self._waiting and self._left > enough and not (came and time.monotonic() >= until):
            wanted = self._waiting[: -AT_ONCE - 1 : -1]
            blocks = self._find(wanted)
            del self._waiting[-len(blocks) :]
            found = [(cid, block) for cid, block in zip(wanted, blocks, strict=False) if block is not None]
            self.lacking = self.lacking or len(found) < len(blocks)
            self._left -= sum(len(block) for _cid, block in found)
            for cid, block in reversed(found):
                self._waiting += reversed(self._below(cid, block))
            came += found
        return came

    def _below(self, cid: Cid, block: bytes) -> Sequence[Cid]:
        """What it links, of what was not met before."""
        if cids.codec(cid) != cids.DAG_PB:
            return ()
        try:
            children = nodes.children(nodes.parse(cid, block))
        except IpfsFuseError:  # who reads it will hear
            return ()
        new = [
            child
            for child in dict.fromkeys(children)
            if child not in self._seen and cids.known(child) is None
        ]
        self._seen.update(new)
        return new
