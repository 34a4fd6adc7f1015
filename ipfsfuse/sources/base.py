"""What a source is, for those who ask one.

Concurrency: every method may be called by many tasks at once; cancelling a call cancels its request. Blocks come back
as they were sent: the chain verifies them, nobody else needs to.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import BlockTooLarge


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive leaves of one file, wanted soon: a source may send them as it does best."""

    file: Cid
    """The file's root."""
    file_size: int
    """Content bytes of the whole file."""
    leaves: Sequence[Leaf]


def too_large(name: str, cid: Cid, size: int | None = None) -> BlockTooLarge:
    """What the source `name` raises for a block of over `cids.MAX_BLOCK` bytes, before it reads it; `size` where it is known."""
    what = f"a block of {size:,} bytes" if size is not None else "a larger block"
    return BlockTooLarge(f"{name} has {cids.text(cid)} as {what}: blocks of over {cids.MAX_BLOCK:,} bytes are not read")


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


DeliverBlocks = Callable[[Sequence[tuple[Cid, bytes]]], Awaitable[None]]
"""Awaited with (CID by the source's word, block) of those that came together, parents before children; it may wait."""


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
        """The block of `cid`, unverified. Raises NotHere, BlockTooLarge (by `too_large`), or SourceFailed with its kind."""
        ...

    async def stream(self, run: Run, deliver: Deliver) -> None:
        """Delivers the blocks of `run`, unverified, each at most once. Returns when it has no more to give, whether
        or not that is all (what is missing is asked for elsewhere). Raises SourceFailed if it broke off."""
        ...

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        """Delivers blocks of `subtree`, unverified, others among them or none, as many as come together: what this source can
        send in one answer.

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


class Taker(Protocol):
    """Who takes the blocks of one answer."""

    def wants(self, cid: Cid) -> bool:
        """Whether the block that has just come is to be verified and taken."""
        ...

    def came(self, cid: Cid, block: bytes) -> None:
        """It is verified; what it says may change what is wanted from now on."""
        ...

    async def take(self, blocks: Mapping[Cid, Fetched]) -> None:
        """All of them that came together."""
        ...


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

    async def subtree(self, subtree: Subtree, taker: Taker) -> None:
        """Gives `taker` the blocks of `subtree`, verified, that it wants when they come: as many as one source sends in one
        answer without a stop. Raises nothing for what did not come: that is asked for alone."""
        ...

    def roots(self) -> Sequence[Cid]:
        """The roots of all sources, in their order."""
        ...
