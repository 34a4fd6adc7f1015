"""What a source is, for those who ask one.

Concurrency: every method may be called by many tasks at once; cancelling a call cancels its request. Blocks come back
as they were sent: the chain verifies them, nobody else needs to.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive leaves of one file, wanted soon: a source may send them as it does best."""

    file: Cid
    """The file's root."""
    file_size: int
    """Content bytes of the whole file."""
    leaves: Sequence[Leaf]


Block = bytes | memoryview
Deliver = Callable[[int, Sequence[Block]], Awaitable[None]]
"""Awaited with (index in `Run.leaves`, the block of that leaf and of those behind it that came with it), in any order; it
may wait, to slow the source down. What comes together is verified and written together: a thread's errand costs 60 us."""


@dataclass(frozen=True, slots=True)
class Subtree:
    """The blocks of a directory, wanted soon: a source may send many in one answer."""

    root: Cid
    whole: bool
    """What lies in the directory too; else the nodes of the directory itself, of which a HAMT has many."""
    limit: int
    """Bytes after which enough has come."""


DeliverBlock = Callable[[Cid, bytes], Awaitable[None]]
"""Awaited with (CID by the source's word, block), depth first; it may wait."""


class Source(Protocol):
    """One place that may have blocks."""

    @property
    def name(self) -> str:
        """As the user gave it, without secrets: `library`, `data.car`, `kubo`, `https://gateway.example`."""
        ...

    @property
    def in_place(self) -> bool:
        """True for files on this machine that are read where they lie and never staged again."""
        ...

    async def get(self, cid: Cid) -> bytes:
        """The block of `cid`, unverified. Raises NotHere, or SourceFailed with its kind."""
        ...

    async def stream(self, run: Run, deliver: Deliver) -> None:
        """Delivers the blocks of `run`, unverified, each at most once. Returns when it has no more to give, whether
        or not that is all (what is missing is asked for elsewhere). Raises SourceFailed if it broke off."""
        ...

    async def subtree(self, subtree: Subtree, deliver: DeliverBlock) -> None:
        """Delivers blocks of `subtree`, unverified, others among them or none: what this source can send in one answer.

        Raises NotHere, SourceFailed."""
        ...

    def roots(self) -> Sequence[Cid]:
        """What this source would list in the mount's root: a library's or a CAR's roots; nothing for the network."""
        ...

    async def aclose(self) -> None:
        """Lets go of files and connections."""
        ...


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified block and where it came from."""

    block: bytes
    source: Source


DeliverFetched = Callable[[int, Sequence[Block], Source], Awaitable[None]]
"""As `Deliver`, of verified blocks and where they came from."""
DeliverFetchedBlock = Callable[[Cid, Fetched], Awaitable[None]]
Wants = Callable[[Cid], bool]


class Blocks(Protocol):
    """What the cache asks of the chain of sources: the same calls, verified, by whichever source can."""

    async def get(self, cid: Cid) -> Fetched:
        """The verified block. Keeps trying while some source may still give it: the caller sets the deadline.

        Raises Unavailable when no source can (offline, or all said no for good), WrongBlock when the last source that
        has it sent wrong bytes, Unsupported for a hash that is not allowed."""
        ...

    async def stream(self, run: Run, deliver: DeliverFetched) -> None:
        """Delivers every block of `run`, verified, in any order. Raises as `get` does for the first that can't be had."""
        ...

    async def subtree(self, subtree: Subtree, wants: Wants, deliver: DeliverFetchedBlock) -> None:
        """Delivers blocks of `subtree`, verified, that `wants` says yes to when they come: as many as one source sends in
        one answer without a stop. Raises nothing for what did not come: that is asked for alone."""
        ...

    def roots(self) -> Sequence[Cid]:
        """The roots of all sources, in their order."""
        ...
