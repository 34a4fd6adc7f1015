"""What the layers above ask of a cache.

Concurrency: every method may be called by many tasks at once. A fetch belongs to no caller: a cancelled
caller leaves, the fetch goes on while anyone waits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.sources.base import Subtree


class FileRef(NamedTuple):
    """A file as the cache knows it."""

    cid: Cid
    """The root's canonical CID (version 1): one staging file for all spellings."""
    size: int
    """Content bytes."""


Content = bytes | memoryview
Seen = Callable[[Cid, bytes], Iterable[Cid]]
"""Called on the event loop with each verified block as it comes. Returns which other blocks are wanted
because of it."""
Arrived = Callable[[Leaf, Content], None]
"""Called on the event loop with the verified content of each leaf as it comes."""


class Pieces(NamedTuple):
    """How a verified leaf is read again from its staging file, where it lies at its place in the whole
    file."""

    folder: int
    """The descriptor of the folder of staging files."""
    name: bytes
    """The file's name in it now. Another read by Python tells of the next one."""
    tags: bytes
    """Those of the leaf's pieces (`fileio.tags`), by which each is recognized."""


class LeafPart(NamedTuple):
    """A part of a leaf."""

    content: Content
    pieces: Pieces | None
    """How the leaf may be read without the cache from now on; None where it is not staged, or was not
    verified lately."""


class CacheItem(NamedTuple):
    """What is staged of one CID, for `ipfsfuse ls` and the xattrs."""

    cid: Cid
    staged: int
    """Bytes on disk, in file-system blocks."""
    size: int
    """Content bytes of the whole."""
    complete: bool
    last_used: float
    """Seconds since 1970."""
    pinned: str
    """"" for nothing, "cache" for held at the node while staged, "user" for pinned."""
    source: str
    """The name of the source it came from, "" where that is not known any more."""


class SmallBlocks(NamedTuple):
    """What lies in packs: small files, directories, links, interior nodes."""

    blocks: int
    """Their number about a second ago."""
    bytes: int
    """On disk, with their CIDs."""


class Cache(Protocol):
    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        """From now on `call` is called whenever blocks leave the cache. What was made of them must then be
        forgotten, so that they are asked for again: the source may have lost them too."""
        ...

    async def block(self, cid: Cid, *, early: bool = False) -> bytes:
        """A whole verified block: of a directory, a file's root or interior node, a symlink, a small raw
        file.

        `early`: what is fetched may be given as soon as it is verified, and staged behind that.

        Raises what the sources raise, and Unavailable after the deadline; a failure is remembered for 5 s."""
        ...

    async def settle(self) -> None:
        """Returns when all that readers were given so far is staged, or was found not to be."""
        ...

    async def leaf(self, file: FileRef, leaf: Leaf, *, early: bool = False) -> Content:
        """The verified content of one whole leaf, `leaf.size` bytes: staged, in flight, or fetched and staged
        now.

        `early`: what is fetched may be given as soon as it is verified, and staged behind that."""
        ...

    async def part(
        self, file: FileRef, leaf: Leaf, start: int, stop: int, *, early: bool = False
    ) -> LeafPart:
        """The bytes [start, stop) of the leaf. What was verified before in this run of the daemon and is
        staged costs their part of the leaf, anything else the whole leaf. `early` as in `leaf`."""
        ...

    async def ahead(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None = None) -> None:
        """Brings consecutive leaves in, in one run where that is faster; skips what is staged or under way,
        unless `arrived` is given: then each leaf's content is handed to it once, wherever it came from. Never
        raises for a block that can't be had: a read of it will raise."""
        ...

    def gather(self, subtree: Subtree, wanted: Iterable[Cid], seen: Seen) -> trio.Event:
        """Begins to bring in `wanted`, blocks of `subtree`, by one answer where a source can, and what `seen`
        wants besides.

        From now on a caller that asks for one of them waits for that answer. The event is set when it has
        ended. A block that did not come is fetched when it is used."""
        ...

    def opened(self, file: FileRef) -> None:
        """Notes a use: takes the staging file, queues the pin. Does no I/O on the caller's time."""
        ...

    def item_of(self, cid: Cid) -> CacheItem | None:
        """What is staged of one CID, in any spelling; None where nothing is."""
        ...

    def used(self) -> int:
        """Bytes on disk now, in file-system blocks, as counted against the budget."""
        ...


class Pins(Protocol):
    """Pins content at the node it came from while it is staged here. Every method returns at once and does no
    I/O."""

    @property
    def anywhere(self) -> bool:
        """Whether there is a node to pin anything at: if not, `add` changes nothing."""
        ...

    def add(self, cid: Cid) -> None:
        """`cid` is in use: pin it and what is below it. Doing so again is free."""
        ...

    def remove(self, cid: Cid) -> None:
        """`cid` was evicted: release our pin, and nobody else's. Unknown CIDs are no error."""
        ...

    def state(self, cid: Cid) -> str:
        """One of "" (not pinned), "queued" (soon, or not known yet), "cache" (while it is staged), "user"
        (until unpinned)."""
        ...


class NoPins:
    """For nodes that are not ours and for sources that collect no garbage."""

    anywhere = False

    def add(self, cid: Cid) -> None:
        pass

    def remove(self, cid: Cid) -> None:
        pass

    def state(self, cid: Cid) -> str:
        return ""


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
        """A verified block that packs hold, or (of a large file's root) that is to be had; None for any
        other, and for what came from elsewhere than `node`. Raises what reading meets."""
        ...


@dataclass(frozen=True, slots=True)
class PinStatus:
    """For `status`: the pins at one node."""

    held: int
    """CIDs that the node holds for this mount."""
    queued: int
    """CIDs that it will be asked to pin, or has not been asked about yet."""
    batches: int
    requests: int
    """To the node, since the start."""
    folder: str
    """The folder in the node's MFS that lists what is pinned."""
    failing: str
    """Why the node can't be reached just now, "" where it can."""
