"""What a source is, for those who ask one.

Concurrency: every method may be called by many tasks at once; cancelling a call cancels its request. Blocks
come back as they were sent: the pool verifies them, nobody else needs to.
"""

import itertools
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import BlockTooLarge

Caller = int | None
"""The user id of who made a call; None for what nobody's call asked for, and where the kernel did not say."""

_numbers = itertools.count(1)


class Request:
    """One call of a user, as far as those who fetch for it need to know of it. What runs in a call's task,
    and what that task starts, finds it by `current_request`."""

    __slots__ = ("caller", "callers", "deadline", "number", "on_join", "wanted_until")

    def __init__(self, caller: Caller = None, deadline: float = math.inf, number: int | None = None) -> None:
        """`deadline` on trio's clock: when the call is answered, with or without what it wants."""
        self.number = next(_numbers) if number is None else number
        """Of the call, for the log."""
        self.caller = caller
        self.deadline = deadline
        self.callers = {caller}
        """All whose calls wait for the same."""
        self.wanted_until = math.inf
        """When the last of those calls will have gone."""
        self.on_join: set[Callable[[], None]] = set()
        """Called when another call waits for the same: by those who have it wait in a queue."""

    def for_background(self) -> "Request":
        """The same for work that outlives the call: on the same caller's account, without its deadline."""
        return Request(self.caller, number=self.number)

    def for_fetch(self) -> "Request":
        """The same for a fetch that ends with the last call that waits for it (`join`)."""
        request = self.for_background()
        request.wanted_until = -math.inf
        return request

    def join(self, other: "Request", until: float) -> None:
        """Another call wants the same from now on, `until` then at most."""
        self.wanted_until = max(self.wanted_until, until)
        self.callers.add(other.caller)
        for call in list(self.on_join):
            call()


_request: ContextVar[Request] = ContextVar("request")
_NOBODY = Request(number=0)


def current_request() -> Request:
    """That of the call in whose task, or on whose account, this runs."""
    return _request.get(_NOBODY)


def set_request(request: Request) -> None:
    """From now on this task, and what it starts, works for `request`."""
    _request.set(request)


@contextmanager
def request_of(caller: Caller, deadline: float = math.inf) -> Iterator[Request]:
    """A call of `caller`, for the length of the block."""
    token = _request.set(request := Request(caller, deadline))
    try:
        yield request
    finally:
        _request.reset(token)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive leaves of one file, wanted soon: a source may send them as it does best."""

    file: Cid
    """The file's root."""
    file_size: int
    """Content bytes of the whole file."""
    leaves: Sequence[Leaf]


ENVELOPE = 64
"""Bytes that a dag-pb leaf may have beside its content: 14 as importers write it, some 30 with a mode and a
time."""


def fits(leaf: Leaf, size: int) -> bool:
    """Whether a block of `size` bytes can be the block of `leaf`.

    A source that knows the sizes of its blocks leaves the others out of a run, unread: then a run takes as
    much memory as its leaves say, whatever stands behind them. What is left out is asked for alone, where it
    has its error."""
    if cids.codec(leaf.cid) == cids.RAW:
        return size == leaf.size <= cids.MAX_BLOCK
    return leaf.size <= size <= min(leaf.size + ENVELOPE, cids.MAX_BLOCK)


def too_large(name: str, cid: Cid, size: int | None = None) -> BlockTooLarge:
    """What the source `name` raises for a block of over `cids.MAX_BLOCK` bytes, before it reads it; `size`
    where it is known."""
    what = f"a block of {size:,} bytes" if size is not None else "a larger block"
    return BlockTooLarge(
        f"{name} has {cids.text(cid)} as {what}: blocks of over {cids.MAX_BLOCK:,} bytes are not read"
    )


Block = bytes | memoryview
Deliver = Callable[[int, Sequence[Block]], Awaitable[None]]
"""Awaited with (index in `Run.leaves`, the block of that leaf and of those behind it that came with it), in
any order; it may wait, to slow the source down. What comes together is verified and written together: a
call in a thread costs 60 us."""


@dataclass(frozen=True, slots=True)
class Subtree:
    """The blocks of a directory, wanted soon: a source may send many in one answer."""

    root: Cid
    whole: bool
    """What lies in the directory too; else the nodes of the directory itself, of which a HAMT has many."""
    limit: int
    """Bytes after which enough has come."""


DeliverBlocks = Callable[[Sequence[tuple[Cid, bytes]]], Awaitable[None]]
"""Awaited with (CID by the source's word, block) of those that came together, parents before children; it may
wait."""


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
        """The block of `cid`, unverified. Raises NotHere, BlockTooLarge (by `too_large`), or SourceFailed
        with its kind."""
        ...

    async def stream(self, run: Run, deliver: Deliver) -> None:
        """Delivers the blocks of `run`, unverified, each at most once. Returns when it has no more to give,
        whether or not that is all (what is missing is asked for elsewhere). Raises SourceFailed if it broke
        off."""
        ...

    async def subtree(self, subtree: Subtree, deliver: DeliverBlocks) -> None:
        """Delivers blocks of `subtree`, unverified, others among them or none, as many as come together: what
        this source can send in one answer.

        Raises NotHere, SourceFailed."""
        ...

    def roots(self) -> Sequence[Cid]:
        """What this source would list in the mount's root: a library's or a CAR's roots; nothing for the
        network. It may block (a library's roots are files), so it is called in a worker thread."""
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
    """What the cache asks of the pool of sources: the same calls, verified, by whichever source can."""

    async def get(self, cid: Cid) -> Fetched:
        """The verified block. Keeps trying while some source may still give it: the caller sets the deadline.

        Raises Unavailable when no source can (offline, or all said no for good), WrongBlock when the last
        source that has it sent wrong bytes, BlockTooLarge when it is too large, Unsupported for a hash that
        is not allowed."""
        ...

    async def stream(self, run: Run, deliver: DeliverFetched) -> None:
        """Delivers every block of `run`, verified, in any order. Raises as `get` does for the first that
        can't be had, and Malformed for the first that does not fit its leaf: a file that lies shall not have
        its blocks read for nothing."""
        ...

    async def subtree(self, subtree: Subtree, taker: Taker) -> None:
        """Gives `taker` the blocks of `subtree`, verified, that it wants when they come: as many as one
        source sends in one answer without a stop. Raises nothing for what did not come: that is asked for
        alone."""
        ...

    def said(self, cid: Cid) -> str:
        """What the sources have said so far to a `get` of that block that is under way, for people; "" for no
        such call."""
        ...

    def roots(self) -> Sequence[Cid]:
        """The roots of all sources, in their order. In a worker thread, as `Source.roots`."""
        ...
