"""What the cache tells whoever keeps content at a node: which CIDs are staged, and which no more.

Concurrency: every method here returns at once and does no I/O; what follows from it happens in tasks of the holder's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ipfsfuse.dag.cid import Cid


class Pins(Protocol):
    """Keeps content at the node it came from while we have it staged."""

    @property
    def anywhere(self) -> bool:
        """Whether there is a node to hold anything at: else to add it changes nothing."""
        ...

    def add(self, cid: Cid) -> None:
        """`cid` is in use: hold it and what is below it. Doing so again is free."""
        ...

    def remove(self, cid: Cid) -> None:
        """`cid` was evicted: let go of our hold, and of nobody else's. Unknown CIDs are no error."""
        ...

    def state(self, cid: Cid) -> str:
        """One of "" (not held), "queued" (held soon), "cache" (held while it is staged), "user" (kept for good)."""
        ...


class Copy(NamedTuple):
    """Our copy of a block, and those that it links of which we have copies too."""

    block: bytes
    children: Sequence[Cid]


class Copies(Protocol):
    """What we have of what a node may have lost."""

    def joins(self, cid: Cid) -> bool:
        """Whether `cid` holds together other blocks that are staged: the root of a large file."""
        ...

    async def copy(self, cid: Cid, node: str) -> Copy | None:
        """A verified block that packs hold, or (of a large file's root) that is to be had; None for any other, and for
        what came from elsewhere than `node`. Raises what reading meets."""
        ...


@dataclass(frozen=True, slots=True)
class PinStatus:
    held: int
    queued: int
    batches: int
    requests: int
    """To the node, since the start."""
    failing: str
    """Why the node can't be told just now, "" where it can."""


class NoPins:
    """For nodes that are not ours and for sources that collect no garbage."""

    anywhere = False

    def add(self, cid: Cid) -> None:
        pass

    def remove(self, cid: Cid) -> None:
        pass

    def state(self, cid: Cid) -> str:
        return ""
