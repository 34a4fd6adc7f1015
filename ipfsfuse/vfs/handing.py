"""Small files on their way to the kernel: they came with their directory, and their reader is not there yet.

In flight, not cached: each is given away once, to the page cache when the reader comes near or to who opens
it, and the oldest are dropped where there are too many. Concurrency: the event loop's.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from ipfsfuse.dag.cid import Cid

LIMIT = 16 << 20
"""Bytes."""


class Handing:
    def __init__(self) -> None:
        self._waiting: OrderedDict[Cid, bytes] = OrderedDict()
        self._bytes = 0

    def put(self, cid: Cid, content: bytes) -> None:
        """The verified content of a raw file, just come."""
        if cid not in self._waiting:
            self._waiting[cid] = content
            self._bytes += len(content)
            while self._bytes > LIMIT:
                self._bytes -= len(self._waiting.popitem(last=False)[1])

    def take(self, cid: Cid) -> bytes | None:
        content = self._waiting.pop(cid, None)
        if content is not None:
            self._bytes -= len(content)
        return content

    def take_all(self, following: Iterable[Cid]) -> Iterator[tuple[Cid, bytes]]:
        """Those of `following` that have come."""
        for cid in following:
            content = self.take(cid)
            if content is not None:
                yield cid, content
