"""What is known of one staging file.

Concurrency: the event loop's; `seen`, `complete` and `dead` are set by worker threads too, which hold `lock`.
"""

import threading
import time
from dataclasses import dataclass, field

from ipfsfuse.cache.store.extents import Extents
from ipfsfuse.dag.cid import Cid


class Removed(Exception):
    """The entry was removed while a thread was about to write to it. Never leaves the cache."""


@dataclass(slots=True, eq=False)
class Entry:
    """One staging file."""

    cid: Cid
    size: int
    """Content bytes of the whole file."""
    complete: bool = False
    """It has been whole, and has its final name."""
    extents: Extents | None = None
    """Bytes that are (after a restart: may be) present; None until they were asked for."""
    proved: Extents | None = None
    """Of a file without its final name, the bytes that this run wrote or proved."""
    fresh: bool = True
    """Written in this run alone: what is wrong in it was not left so by a crash."""
    disk: int = 0
    """Bytes on disk, in file-system blocks, by the writes that were reported."""
    seen: int = 0
    """The same, as a thread saw it last: what grew since is reported once, with the write that it belongs to."""
    reserved: int = 0
    """Bytes on disk that writes under way may still take."""
    charged: int = 0
    """What the budget counts for it, reservations that its writers hold included."""
    dead: bool = False
    source: str = ""
    last_used: float = field(default_factory=time.time)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gone(self) -> bool:
        """`dead`, looked at anew: it may have become so between two takings of the lock."""
        return self.dead

    def all_proved(self) -> bool:
        """Whether it may be named as whole: what a crash left proves nothing by being there."""
        return not self.complete and self.proved is not None and self.proved.covers(0, self.size)

    def whole(self) -> bool:
        return self.extents.covers(0, self.size) if self.extents is not None else self.complete
