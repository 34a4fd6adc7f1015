"""The interfaces of a source and of the pool of all sources, and the request of a user that they work for.

Concurrency: many tasks may call any method at once; cancelling a call cancels its request. Sources return
blocks unverified. The pool verifies them, and no other code needs to.
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
from ipfsfuse.sources import streams
from ipfsfuse.sources.streams import Delivery, Send, Stream, streaming
from ipfsfuse.structures import Buffer

Caller = int | None
"""The user id of a call; None for work of our own, and if the kernel does not say."""

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class Request:
    """A call of a user, as the code that fetches for it sees it. `current_request` is the request of the
    call's task and of the tasks that it starts. A fetch for several calls has a request of its own
    (`single_flight`)."""

    caller: Caller = None
    deadline: float = math.inf
    """When the call is answered at the latest, on trio's clock."""
    number: int = field(default_factory=partial(next, _numbers))
    """The call's number in the log."""
    others: set[Caller] = field(default_factory=set)
    """The other callers that wait for the same block."""
    wanted_until: float = math.inf
    """When the last call that waits for the block ends, on trio's clock."""
    on_join: set[Callable[[], None]] = field(default_factory=set)
    """Called when another call begins to wait for the same block, so that the limiter can move the request in
    its queue."""

    def for_background(self) -> "Request":
        """The request for work that outlives the call: it is charged to the same caller, and has no
        deadline."""
        return Request(self.caller, number=self.number)


NO_CALL = Request(number=0)
"""The request of work that is charged to no caller."""
current_request: ContextVar[Request] = ContextVar("request", default=NO_CALL)
"""The request that the current task works for. A task that sets it works for that request from then on, and
so do the tasks that it starts."""


@contextmanager
def request_of(caller: Caller, deadline: float = math.inf) -> Iterator[Request]:
    """The `with` block works for a call of `caller`."""
    token = current_request.set(request := Request(caller, deadline))
    try:
        yield request
    finally:
        current_request.reset(token)


current_source_request: ContextVar["SourceRequest | None"] = ContextVar("source request", default=None)


@dataclass(slots=True, eq=False)
class SourceRequest:
    """One request to a source: the clock of all that wait for its answer. `current_source_request` is the
    request of the task that made it and of the tasks that it starts.

    The clock stops while our own limits (--bwlimit) hold bytes back: in that time the source is not
    silent."""

    held: float = 0.0
    """Seconds for which our limits have held bytes back."""
    free_since: float = -math.inf
    """When our limits last released bytes, on trio's clock; infinite while they hold bytes back."""
    unpaid: int = 0
    """Bytes that have come and have not waited for the rate limit yet."""
    _outer: "SourceRequest | None" = field(default_factory=current_source_request.get)
    """The request that this one is a part of: a source may be a pool itself."""
    _holds: int = 0
    _held_at: float = 0.0
    _waits: dict[trio.CancelScope, float] = field(default_factory=dict)
    """While bytes are held back: the seconds of silence that each wait has left. They do not start again
    after that, or a source that sends a byte now and then would never be late."""

    @contextmanager
    def current(self) -> Iterator[None]:
        token = current_source_request.set(self)
        try:
            yield
        finally:
            current_source_request.reset(token)

    def limit(self, scope: trio.CancelScope, seconds: float) -> None:
        """Cancels `scope` when the source has been silent for so many seconds in all, from now on."""
        self._waits[scope] = seconds
        scope.deadline = math.inf if self._holds else trio.current_time() + seconds

    def shorten(self, scope: trio.CancelScope, seconds: float) -> None:
        """Like `limit`, for a `scope` that is limited already. Keeps the earlier end."""
        left = self._waits[scope] if self._holds else scope.deadline - trio.current_time()
        self.limit(scope, min(left, seconds))

    def patience(self, seconds: float) -> "_Patience":
        """A context manager: cancels its block when the source has been silent for so many seconds in all."""
        return _Patience(self, seconds, self._waits)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """A context manager for the time in which one of our limits holds bytes of this request back."""
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
    """A context manager for the time in which one of our limits holds bytes of the current request back."""
    request = current_source_request.get()
    return nullcontext() if request is None else request.held_back()


Clone = Callable[[Sequence[Leaf], Sequence[str], str], Awaitable[Sequence[Buffer]]]
"""Called with consecutive leaves, the files that hold their blocks, and the source's name. Makes the cache
share these files' extents (reflinks), and returns the blocks of the first leaves, as many as can be shared,
as it reads them from the cache."""


@dataclass(frozen=True, slots=True)
class LeafRange:
    """Consecutive leaves of one file that are wanted soon. A source sends them in the way that is fastest for
    it."""

    file: Cid
    """The file's root."""
    file_size: int
    """Bytes of the whole file's content."""
    leaves: Sequence[Leaf]
    clone: Clone | None = None
    """For a source that keeps each block in a file of its own."""


ENVELOPE = 64
"""Bytes that a dag-pb leaf may have besides its content: importers write 14, or about 30 with mode and
mtime."""


def has_claimed_size(leaf: Leaf, size: int) -> bool:
    """Whether a block of `size` bytes can be the block of `leaf`.

    A source that knows the sizes of its blocks leaves out those that don't fit, and does not read them. So a
    range takes no more memory than its leaves claim. A block that was left out is asked for alone, which
    reports its error."""
    if cids.codec(leaf.cid) == cids.RAW:
        return size == leaf.size <= cids.MAX_BLOCK
    return leaf.size <= size <= min(leaf.size + ENVELOPE, cids.MAX_BLOCK)


@dataclass(frozen=True, slots=True)
class Subtree:
    """The blocks of a directory that are wanted soon. A source may send many of them in one answer."""

    root: Cid
    whole: bool
    """Whether everything below the directory is wanted, or only the directory's own nodes (a HAMT has
    many)."""
    limit: int
    """Bytes after which the source may stop."""


class Source(ABC):
    """A place that may have blocks."""

    name: str
    """The SOURCE as the user wrote it, without secrets: `library`, `data.car`, `kubo`,
    `https://gateway.example`."""
    in_place = False
    """Whether it is files on this machine, which are read where they are and never staged."""

    @abstractmethod
    async def get(self, cid: Cid) -> bytes:
        """The block of `cid`, unverified. Raises NotHere, BlockTooLarge (by `cid.too_large`), and
        SourceFailed."""

    def stream(self, wanted: LeafRange) -> Stream[Delivery]:
        """The blocks of `wanted` that this source has, unverified, each at most once, in any order. Blocks
        that it lacks are left out. Raises SourceFailed if it broke off."""
        return streaming(partial(self.send_leaves, wanted))

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery]) -> None:
        """Sends the blocks of `stream`. The default gets one block after the other."""
        await streams.send_singly(self.get, wanted.leaves, send, 1)

    def subtree(self, subtree: Subtree) -> Stream[streams.BlockBatch]:
        """The blocks of `subtree` that this source can send in one answer, unverified; possibly none, or
        others among them. Raises NotHere, SourceFailed."""
        return streaming(partial(self.send_subtree, subtree), alternate=True)

    async def send_subtree(self, subtree: Subtree, send: Send[streams.BlockBatch]) -> None:
        """Sends the blocks of `subtree`. The default sends nothing, which is right for blocks in files: one
        is read as fast as many."""
        await trio.lowlevel.checkpoint()

    def roots(self) -> Sequence[Cid]:
        """The roots that the mount lists for this source: those of the library or a CAR; network sources have
        none. May block: call it in a worker thread."""
        return ()

    @abstractmethod
    async def aclose(self) -> None:
        """Closes files and connections."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A verified block, and the source that sent it."""

    block: Buffer
    source: Source


class Verified(NamedTuple):
    """A `Delivery` of verified blocks, and the source that sent them."""

    first: int
    blocks: Sequence[Buffer]
    source: Source
    release: Callable[[], None]


class Wanted(Protocol):
    """Decides which blocks of an answer are wanted. The blocks that arrive may change that."""

    def wants(self, cid: Cid) -> bool:
        """Whether the block that has just arrived shall be verified and sent on."""
        ...

    def came(self, cid: Cid, block: bytes) -> None:
        """Called with each verified block, whose links may change what is wanted next."""
        ...


class BlockFetcher(Protocol):
    """The pool of all sources, as the cache sees it. Any source may answer; every block is verified."""

    async def get(self, cid: Cid) -> Fetched:
        """The verified block. Tries as long as any source may have it; the caller sets the deadline.

        Raises Unavailable if no source can send it (offline, or all lack it), WrongBlock if the last source
        that has it sent wrong bytes, BlockTooLarge, and Unsupported for a hash function that is not
        allowed."""
        ...

    def stream(self, wanted: LeafRange) -> Stream[Verified]:
        """Every block of `wanted`, verified, in any order. For the first block that no source has, raises
        what `get` raises. Raises Malformed for the first block that does not fit its leaf: the file's claims
        are false, so the other blocks are not read."""
        ...

    def subtree(self, subtree: Subtree, wanted: Wanted) -> Stream[Mapping[Cid, Fetched]]:
        """The blocks of `subtree` that are `wanted`, verified, as many as one source sends in one answer
        without stalling. Blocks that did not arrive are no error: each is asked for alone when it is used."""
        ...

    def answers_so_far(self, cid: Cid) -> str:
        """The sources' answers so far to a running `get` of that block, for messages; "" if none runs."""
        ...

    def roots(self) -> Sequence[Cid]:
        """The roots of all sources, in the sources' order. May block: call it in a worker thread."""
        ...
