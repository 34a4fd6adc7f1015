"""The interfaces of the cache, for the layers above it.

Concurrency: every method may be called by many tasks at once. A fetch belongs to no caller: if a caller is
cancelled, the fetch goes on while others wait for it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import trio

from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.sources.base import Subtree
from ipfsfuse.structures import Buffer


class FileRef(NamedTuple):
    """A file."""

    cid: Cid
    """The root's canonical CID (version 1), so that all spellings have one staging file."""
    size: int
    """Bytes of its content."""


Seen = Callable[[Cid, bytes], Iterable[Cid]]
"""Called on the event loop with each verified block that arrives. Returns the blocks that are wanted because
of it."""
Arrived = Callable[[Leaf, Buffer], None]
"""Called on the event loop with the verified content of each leaf that arrives."""


class Pieces(NamedTuple):
    """What the C thread needs to read a verified leaf from its staging file. The leaf lies there at its
    offset in the file."""

    folder: int
    """The descriptor of the folder of staging files."""
    name: bytes
    """The staging file's name now. It may change; the next read by Python returns the new one."""
    tags: bytes
    """The tags of the leaf's pieces (`fileio.tags`), by which each is verified."""


class LeafPart(NamedTuple):
    """A part of a leaf."""

    content: Buffer
    pieces: Pieces | None
    """How the leaf may be read without the cache from now on. None if it is not staged, or was not verified
    recently."""


class CacheItem(NamedTuple):
    """The staged part of one CID, for `ipfsfuse ls` and the xattrs."""

    cid: Cid
    staged: int
    """Bytes on disk, in file-system blocks."""
    size: int
    """Bytes of the whole content."""
    complete: bool
    last_used: float
    """Seconds since 1970."""
    pinned: str
    """"cache" if it is held at the node while it is staged, "user" if it is pinned, else ""."""
    source: str
    """The name of the source that it came from; "" if that is no longer known."""


class SmallBlocks(NamedTuple):
    """The content of packs: small files, directories, symlinks, interior nodes."""

    blocks: int
    """Their number about a second ago."""
    bytes: int
    """On disk, with their CIDs."""


class Cache(Protocol):
    def when_blocks_leave(self, call: Callable[[], None]) -> None:
        """Registers `call`, which is called whenever blocks are evicted. The caller must then forget what it
        made of them, so that they are asked for again: the source may have lost them too."""
        ...

    async def block(self, cid: Cid, *, early: bool = False) -> bytes:
        """A whole verified block: of a directory, a file's root or interior node, a symlink, a small raw
        file.

        `early`: a fetched block may be returned as soon as it is verified, and staged after that.

        Raises what the sources raise, and Unavailable after the deadline. A failure is remembered for 5 s."""
        ...

    async def block_size(self, cid: Cid, *, early: bool = False) -> int:
        """The size of a verified block. Works and raises as `block`, but copies nothing."""
        ...

    def arrived(self, cid: Cid) -> Buffer | None:
        """The verified block, if it has just been fetched and is not staged yet."""
        ...

    async def wait_until_staged(self) -> None:
        """Returns when all blocks that readers got so far are staged, or could not be staged."""
        ...

    async def leaf(self, file: FileRef, leaf: Leaf, *, early: bool = False) -> Buffer:
        """The verified content of one whole leaf, `leaf.size` bytes. It is read from its staging file,
        awaited if it is in flight, or fetched and staged.

        `early`: as in `block`."""
        ...

    async def part(
        self, file: FileRef, leaf: Leaf, start: int, stop: int, *, early: bool = False
    ) -> LeafPart:
        """The bytes [start, stop) of the leaf. If the leaf is staged and was verified before in this run of
        the daemon, only these bytes are read and verified, otherwise the whole leaf. `early`: as in
        `block`."""
        ...

    async def ahead(self, file: FileRef, leaves: Sequence[Leaf], arrived: Arrived | None = None) -> None:
        """Fetches and stages consecutive leaves, by one request if that is faster. Skips leaves that are
        staged or under way. With `arrived`, calls it once with each leaf's content, also with that of staged
        leaves. Never raises for a block that can't be had: a read of it will."""
        ...

    def gather(self, subtree: Subtree, wanted: Iterable[Cid], seen: Seen) -> trio.Event:
        """Starts to fetch `wanted`, blocks of `subtree`, and those that `seen` returns, by one answer of a
        source if possible.

        A caller that asks for one of them meanwhile waits for that answer. The returned event is set when the
        answer has ended. Blocks that did not come are fetched when they are used."""
        ...

    def opened(self, file: FileRef) -> None:
        """Notes a use of a file: ARC counts it, and the pin at the node is queued. Does no I/O."""
        ...

    def item_of(self, cid: Cid) -> CacheItem | None:
        """The staged part of one CID, in any spelling; None if there is none."""
        ...

    def used(self) -> int:
        """Bytes on disk now, in file-system blocks, as they count in the budget."""
        ...


class Pins(Protocol):
    """Pins content at the Kubo node that it came from, while it is staged here. Every method returns at once
    and does no I/O."""

    @property
    def anywhere(self) -> bool:
        """Whether there is a node to pin at. If not, `add` does nothing."""
        ...

    def add(self, cid: Cid) -> None:
        """Pins `cid`, which is in use, and everything below it. Calling it again costs nothing."""
        ...

    def remove(self, cid: Cid) -> None:
        """Releases our pin of `cid`, which was evicted. Unknown CIDs are no error."""
        ...

    def state(self, cid: Cid) -> str:
        """One of "" (not pinned), "queued" (to be pinned, or not known yet), "cache" (pinned while it is
        staged), "user" (pinned until it is unpinned)."""
        ...


class NoPins:
    """Pins nothing: for a cache that has no Kubo node to pin at."""

    anywhere = False

    def add(self, cid: Cid) -> None:
        pass

    def remove(self, cid: Cid) -> None:
        pass

    def state(self, cid: Cid) -> str:
        return ""


class Copy(NamedTuple):
    """Our copy of a block, and its links to blocks of which we have copies too."""

    block: bytes
    children: Sequence[Cid]


class Copies(Protocol):
    """Our copies of blocks that a node may have lost."""

    def is_file_root(self, cid: Cid) -> bool:
        """Whether `cid` is the root of a large file that is staged."""
        ...

    async def copy(self, cid: Cid, node: str) -> Copy | None:
        """A verified block from a pack, or the root block of a large staged file. None for other blocks, and
        for files from another source than `node`. Raises what a read raises."""
        ...


@dataclass(frozen=True, slots=True)
class PinStatus:
    """For `status`: the pins at one node."""

    held: int
    """CIDs that the node holds for this mount."""
    queued: int
    """CIDs that the node will be asked to pin, or has not been asked about yet."""
    batches: int
    requests: int
    """Requests to the node since the start."""
    folder: str
    """The folder in the node's MFS that lists what is pinned."""
    failing: str
    """Why the node can't be reached now; "" if it can."""
