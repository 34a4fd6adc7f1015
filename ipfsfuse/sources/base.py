"""The interface of a source of blocks, of the pool of all sources, and the user's request that they work for.

Concurrency: many tasks may call any method at once; cancelling a call cancels its request. Sources return
blocks as they were sent. The pool verifies them, so nobody else needs to.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import NamedTuple, Protocol

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.errors import BlockTooLarge
from ipfsfuse.sources import streams
from ipfsfuse.sources.streams import Block, Delivery, Send, Stream, streaming

Caller = int | None
"""The user id behind a call; None for work that no call asked for, and where the kernel does not say."""

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class Request:
    """One call of a user, for the code that fetches for it. The call's task, and tasks that it starts, find
    it by `current_request`. A fetch that several calls wait for is a request itself (`single_flight`)."""

    caller: Caller = None
    deadline: float = math.inf
    """On trio's clock: the call is answered then in any case."""
    number: int = field(default_factory=partial(next, _numbers))
    """Of the call, in the log."""
    others: set[Caller] = field(default_factory=set)
    """Who else waits for the same block."""
    wanted_until: float = math.inf
    """When the last of those calls ends."""
    on_join: set[Callable[[], None]] = field(default_factory=set)
    """Called when another call begins to wait for the same block: the limiter moves it in its queue."""

    def for_background(self) -> "Request":
        """The request of work that outlives the call: on the same caller's account, without its deadline."""
        return Request(self.caller, number=self.number)


NO_CALL = Request(number=0)
"""What runs on nobody's account."""
current_request: ContextVar[Request] = ContextVar("request", default=NO_CALL)
"""The request of the call in whose task, or on whose account, this runs. A task that sets it works for that
request from then on, and so do the tasks that it starts."""


@contextmanager
def request_of(caller: Caller, deadline: float = math.inf) -> Iterator[Request]:
    """A call of `caller`, for the length of a `with` block."""
    token = current_request.set(request := Request(caller, deadline))
    try:
        yield request
    finally:
        current_request.reset(token)


current_source_request: ContextVar["SourceRequest | None"] = ContextVar("source request", default=None)


@dataclass(slots=True, eq=False)
class SourceRequest:
    """One request to a source, for those who wait for its answer. Its task, and tasks that it starts, find
    it by `current_source_request`.

    It stops the waits while our own limits hold bytes back: that time is not the source's silence."""

    held: float = 0.0
    """Seconds for which they did so."""
    free_since: float = -math.inf
    """When they last let go, on trio's clock; infinite while they hold bytes back."""
    unpaid: int = 0
    """Bytes that have come, and have not waited for the rate limit yet."""
    _outer: "SourceRequest | None" = field(default_factory=current_source_request.get)
    """The one that this one is part of: a source may be a pool itself."""
    _holds: int = 0
    _held_at: float = 0.0
    _waits: dict[trio.CancelScope, float] = field(default_factory=dict)
    """While bytes are held back: the seconds of silence that each wait has left. They do not begin anew, or a
    source that sends a byte now and then would never be late."""

    @contextmanager
    def current(self) -> Iterator[None]:
        token = current_source_request.set(self)
        try:
            yield
        finally:
            current_source_request.reset(token)

    def limit(self, scope: trio.CancelScope, seconds: float) -> None:
        """Ends `scope` when the source has been silent for so many seconds in all from now on."""
        self._waits[scope] = seconds
        scope.deadline = math.inf if self._holds else trio.current_time() + seconds

    def shorten(self, scope: trio.CancelScope, seconds: float) -> None:
        """As `limit`, of a `scope` that ends already, and may end sooner than that."""
        left = self._waits[scope] if self._holds else scope.deadline - trio.current_time()
        self.limit(scope, min(left, seconds))

    def patience(self, seconds: float) -> "_Patience":
        """Ends its block when the source has been silent for so many seconds in all."""
        return _Patience(self, seconds, self._waits)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While one of our limits holds bytes of this request back."""
        outer = nullcontext() if self._outer is None else self._outer.held_back()
        with outer:
            if not self._holds:
                self._held_at, self.free_since = trio.current_time(), math.inf
                for scope in self._waits:
                    self._waits[scope] = scope.deadline - self._held_at
                    scope.deadline = math.inf
            self._holds += 1
            try:
                yield
            finally:
                self._holds -= 1
                if not self._holds:
                    self.free_since = now = trio.current_time()
                    self.held += now - self._held_at
                    for scope, seconds in self._waits.items():
                        scope.deadline = now + seconds


class _Patience:
    def __init__(self, request: SourceRequest, seconds: float, waits: dict[trio.CancelScope, float]) -> None:
        self._request, self._seconds, self._waits = request, seconds, waits
        self._scope = trio.CancelScope()

    def __enter__(self) -> trio.CancelScope:
        self._request.limit(self._scope, self._seconds)
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        del self._waits[self._scope]
        return self._scope.__exit__(kind, error, trace)


def held_back() -> AbstractContextManager[None]:
    """While one of our limits holds bytes back that came for what runs in this task."""
    request = current_source_request.get()
    return nullcontext() if request is None else request.held_back()


Clone = Callable[[Sequence[Leaf], Sequence[str], str], Awaitable[Sequence[Block]]]
"""Awaited with consecutive leaves, the files that hold their blocks, and the source's name. Has the file
system share these files' extents with the cache, and returns what it reads from there: the blocks of the
first leaves, as many as can be shared."""


@dataclass(frozen=True, slots=True)
class LeafRange:
    """Consecutive leaves of one file that are wanted soon: a source sends them as it does best."""

    file: Cid
    """The file's root."""
    file_size: int
    """Bytes of the whole file's content."""
    leaves: Sequence[Leaf]
    clone: Clone | None = None
    """For a source that keeps each block in a file of its own."""


ENVELOPE = 64
"""Bytes that a dag-pb leaf may have beside its content: 14 as importers write it, some 30 with mode and
mtime."""


def fits(leaf: Leaf, size: int) -> bool:
    """Whether a block of `size` bytes can be the block of `leaf`.

    A source that knows the sizes of its blocks leaves out those that don't fit, unread. So a range takes as
    much memory as its leaves claim. A block that was left out is asked for alone, and its error is reported
    there."""
    if cids.codec(leaf.cid) == cids.RAW:
        return size == leaf.size <= cids.MAX_BLOCK
    return leaf.size <= size <= min(leaf.size + ENVELOPE, cids.MAX_BLOCK)


def too_large(name: str, cid: Cid, size: int | None = None) -> BlockTooLarge:
    """The error of the source `name` for a block of over `cids.MAX_BLOCK` bytes, raised before it is read;
    `size` if it is known."""
    what = f"a block of {size:,} bytes" if size is not None else "a larger block"
    return BlockTooLarge(
        f"{name} has {cids.text(cid)} as {what}: blocks of over {cids.MAX_BLOCK:,} bytes are not read"
    )


@dataclass(frozen=True, slots=True)
class Subtree:
    """The blocks of a directory that are wanted soon: a source may send many in one answer."""

    root: Cid
    whole: bool
    """With everything below the directory; else only the directory's own nodes, of which a HAMT has many."""
    limit: int
    """Bytes after which the source may stop."""


class Source(ABC):
    """A place that may have blocks."""

    name: str
    """As the user wrote it, without secrets: `library`, `data.car`, `kubo`, `https://gateway.example`."""
    in_place = False
    """Whether its blocks are files on this machine, which are read there and never staged."""

    @abstractmethod
    async def get(self, cid: Cid) -> bytes:
        """The block of `cid`, unverified. Raises NotHere, BlockTooLarge (by `too_large`), SourceFailed."""

    def stream(self, wanted: LeafRange) -> Stream[Delivery]:
        """The blocks of `wanted` that this source has, unverified, each at most once, in any order. Those
        that are missing are asked for elsewhere. Raises SourceFailed if it broke off."""
        return streaming(partial(self.send_leaves, wanted))

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        """Sends what `stream` gives. This one gets each block by itself."""
        await streams.send_singly(self.get, wanted.leaves, send, 1)

    def subtree(self, subtree: Subtree) -> Stream[streams.Blocks]:
        """The blocks of `subtree` that this source can send in one answer, unverified; possibly none, or
        others among them. Raises NotHere, SourceFailed."""
        return streaming(partial(self.send_subtree, subtree), turns=True)

    async def send_subtree(self, subtree: Subtree, send: Send[streams.Blocks]) -> None:
        """Sends what `subtree` gives. This one sends nothing: blocks in files are at hand singly."""
        await trio.lowlevel.checkpoint()

    def roots(self) -> Sequence[Cid]:
        """The roots that the mount lists for this source: those of a library or a CAR, none for the network.
        Called in a worker thread, since it may block."""
        return ()

    @abstractmethod
    async def aclose(self) -> None:
        """Closes files and connections."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified block, and the source that sent it."""

    block: bytes
    source: Source


class Verified(NamedTuple):
    """A `Delivery` of blocks that are verified, and the source that sent them."""

    first: int
    blocks: Sequence[Block]
    source: Source
    release: Callable[[], None]


class Wanted(Protocol):
    """Which blocks of an answer are wanted. What arrives may change that."""

    def wants(self, cid: Cid) -> bool:
        """Whether the block that has just arrived is to be verified and taken."""
        ...

    def came(self, cid: Cid, block: bytes) -> None:
        """The block is verified. Its links may change what is wanted from now on."""
        ...


class Blocks(Protocol):
    """The pool of sources, for the cache: the same calls, answered by any source, and verified."""

    async def get(self, cid: Cid) -> Fetched:
        """The verified block. Tries for as long as some source may still have it; the caller sets the
        deadline.

        Raises Unavailable if no source can send it (offline, or all lack it), WrongBlock if the last source
        that has it sent wrong bytes, BlockTooLarge, and Unsupported for a hash function that is not
        allowed."""
        ...

    def stream(self, wanted: LeafRange) -> Stream[Verified]:
        """Every block of `wanted`, verified, in any order. Raises as `get` does for the first that no source
        has, and Malformed for the first that does not fit its leaf: then the file's claims are false, and the
        other blocks are not read."""
        ...

    def subtree(self, subtree: Subtree, wanted: Wanted) -> Stream[Mapping[Cid, Fetched]]:
        """The blocks of `subtree` that are `wanted`, verified, as many as one source sends in one answer
        without a pause. A block that did not arrive is not an error: it is asked for alone."""
        ...

    def said(self, cid: Cid) -> str:
        """What the sources have answered so far to a `get` of that block, for people; "" if no such call
        runs."""
        ...

    def roots(self) -> Sequence[Cid]:
        """The roots of all sources, in their order; called in a worker thread, as `Source.roots`."""
        ...
