"""Reads the blocks of a Kubo repository on this machine in place, without a request to the node.

By default a repository keeps its blocks in flatfs: one file for each block, named by the base32 of its
multihash, in folders named by some of the last characters of that name. The node writes a block under another
name and then renames it, so a file is whole until the node deletes it. Source: Kubo's docs/datastores.md,
go-ds-flatfs. This module writes nothing to the repository, and verifies no block.

The synchronous methods of `Flatfs` block. Any number of threads and tasks may use it.
"""

import json
import logging
import os
import pwd
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import trio

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import multihash as multihashes
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Leaf
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import IpfsFuseError
from ipfsfuse.fileio import threads
from ipfsfuse.fileio.buffers import lend
from ipfsfuse.fileio.files import Direct, read_file, regular, size_of
from ipfsfuse.fileio.flatfs import MISSING, BlockFiles, Read
from ipfsfuse.sources.base import LeafRange, Subtree, has_claimed_size
from ipfsfuse.sources.streams import BlockBatch, Delivery, Hashed, JobOrder, Leases, Send, all_of, segments_of
from ipfsfuse.structures import Buffer

log = logging.getLogger("ipfsfuse.sources")

SHARDING = "/repo/flatfs/shard/v1/next-to-last/"
"""The start of a shard function; a number N follows. A folder is named by the N characters before the last
one of its files' names. Kubo uses no other scheme."""


MAX_CONFIG = 1 << 20
"""Bytes of the largest file of a repository's configuration that is read."""
READ_WAIT_SECONDS = 0.002
"""Seconds that the event loop waits for a block of a quick disk, if no other block is being read: to go to a
thread and back takes 0.4 ms."""
SEGMENTS_IN_MEMORY = 8
"""Segments of leaves (of up to 4 MiB each) that may be in memory at a time, for all readers."""
REPO_THREADS = 4
READ_TASKS = 2
"""Segments of one range that are read at a time."""
DENYLIST_CHECK_SECONDS = 1.0
"""How late a new denylist is noticed while the repository is read."""


class Denylists:
    """Whether the repository's owner or this machine has denylists for the node. A block that the node would
    refuse must not be read past the node.

    Looks into the folders where the node looks, at most once in DENYLIST_CHECK_SECONDS. Source: Kubo's
    docs/content-blocking.md."""

    def __init__(self, repository: Path) -> None:
        homes = [Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))]
        with suppress(OSError, KeyError):  # this process may be root's, and the node another user's
            homes.append(Path(pwd.getpwuid(repository.stat().st_uid).pw_dir) / ".config")
        self.folders = [
            repository / "denylists",
            *(home / "ipfs" / "denylists" for home in homes),
            Path("/etc/ipfs/denylists"),
        ]
        self._repository = repository
        self._looked = float("-inf")
        self.found = False
        """Whether the last look found a denylist."""

    def any(self) -> bool:
        now = time.monotonic()
        if now - self._looked >= DENYLIST_CHECK_SECONDS:
            where = next((folder for folder in self.folders if _has_denylist(folder)), None)
            if where is not None and not self.found:
                log.warning(
                    "%s: content is blocked by a list in %s: the node is asked for every block",
                    self._repository,
                    where,
                )
            self.found = where is not None
            self._looked = now  # set last: until then another thread must look itself
        return self.found

    def none_lately(self) -> bool:
        """Whether the last look was less than DENYLIST_CHECK_SECONDS ago and found none."""
        return not self.found and time.monotonic() - self._looked < DENYLIST_CHECK_SECONDS


class Flatfs:
    def __init__(self, folder: Path, characters: int, denylists: Denylists | None = None) -> None:
        """`characters` is the length of the folders' names. While `denylists` finds one, no block is found
        here."""
        self._folder = os.fspath(folder)
        self._characters = characters
        self._denylists = denylists
        self._direct = Direct()
        self.files = BlockFiles(self._folder, characters)
        self._segments = trio.Semaphore(SEGMENTS_IN_MEMORY)
        self._threads = trio.CapacityLimiter(REPO_THREADS)

    async def get(self, cid: Cid) -> Buffer | Hashed | None:
        """Reads a block as `read_hashed` does. Uses no thread for a block that was read ahead, or comes
        within READ_WAIT_SECONDS."""
        block = self.take_hashed(cid)
        if block is None:
            block = await threads.run_sync(self.read_hashed, cid, limiter=self._threads)
        return block

    async def send_leaves(self, wanted: LeafRange, send: Send[Delivery], name: str) -> int:
        """Sends the blocks of `wanted` in order, for the source `name`, up to the first that is missing here.
        Returns its index. A block that does not fit its leaf is left out, and so are those after it in the
        same segment."""
        if not await self._has(wanted.leaves[0]):
            return 0
        segments = segments_of(wanted.leaves)
        end = len(wanted.leaves)
        order = JobOrder()

        async def work() -> None:
            nonlocal end
            for index, segment in segments:
                slot = order.take()
                await self._segments.acquire()  # in order, since each segment waits for those before it
                release = leases.take(1)
                blocks: list[Buffer] = []
                if wanted.clone is not None and not self._is_blocked():
                    blocks += await wanted.clone(segment, [self._path(leaf.cid) for leaf in segment], name)
                if rest := segment[len(blocks) :]:
                    blocks += await threads.run_sync(self.read_each, rest, limiter=self._threads)
                is_all_here = len(blocks) == len(segment) or await self._has(segment[len(blocks)])
                async with slot:
                    if index < end:
                        await send.send(Delivery(index, blocks, release))
                        if not is_all_here:
                            end = index + len(blocks)
                if end < len(wanted.leaves):
                    return

        with closing(Leases(lambda _one: self._segments.release())) as leases:
            await all_of([work] * min(READ_TASKS, len(wanted.leaves)))
        return end

    async def _has(self, leaf: Leaf) -> bool:
        return await threads.run_sync(self.have, [leaf.cid], limiter=self._threads)

    async def send_subtree(self, subtree: Subtree, send: Send[BlockBatch]) -> bool:
        """Sends the blocks below a directory. False if one of them is missing here."""
        walk = RepoWalk(self.read_some, subtree.root, subtree.limit)
        while blocks := await threads.run_sync(walk.next_blocks, limiter=self._threads):
            await send.send(blocks)
        return not walk.incomplete

    def _is_blocked(self) -> bool:
        if self._denylists is None:
            return False
        blocked = self._denylists.any()
        self.files.block_names(blocked)
        return blocked

    def have(self, wanted: Iterable[Cid]) -> bool:
        """Whether each block has a file that can be read."""
        return not self._is_blocked() and all(
            os.access(self._path(cid), os.R_OK, effective_ids=True) for cid in wanted
        )

    def read(self, cid: Cid) -> Buffer | None:
        """Reads a block. None if it is missing or can't be read: then the node is to be asked.

        Raises BlockTooLarge."""
        found = self.read_hashed(cid)
        return found.block if isinstance(found, Hashed) else found

    def read_hashed(self, cid: Cid) -> Buffer | Hashed | None:
        """Reads a block, and hashes it meanwhile if its CID uses SHA-256. None as for `read`.

        Raises BlockTooLarge."""
        if self._is_blocked():
            return None
        multihash = cids.multihash(cid)
        if multihash[:2] == multihashes.SHA2_256_PREFIX:
            return _block(cid, self.files.read(multihash[2:], cids.codec(cid)))
        block = read_file(self._path(cid), cids.MAX_BLOCK)
        if block is None and (size := size_of(self._path(cid))) is not None and size > cids.MAX_BLOCK:
            raise cids.too_large("kubo", cid, size)
        return block

    def take_hashed(self, cid: Cid) -> Buffer | Hashed | None:
        """The block if it was read ahead, or comes within READ_WAIT_SECONDS; for the event loop. None if a
        thread must look for denylists first."""
        multihash = cids.multihash(cid)
        if multihash[:2] != multihashes.SHA2_256_PREFIX or (self._denylists and self._denylists.found):
            return None
        sure = self._denylists is None or self._denylists.none_lately()
        read = self.files.take(multihash[2:], cids.codec(cid), READ_WAIT_SECONDS if sure else -1.0)
        return None if read is None else _block(cid, read)

    def read_some(self, wanted: Sequence[Cid]) -> Sequence[Buffer | Hashed | None]:
        """Reads the first blocks of `wanted`, as many as one call reads but at least one: for many small
        blocks. A block that is missing or too large is None."""
        if self._is_blocked():
            return [None] * len(wanted)
        digests: list[bytes] = []
        for multihash in map(cids.multihash, wanted):
            if multihash[:2] != multihashes.SHA2_256_PREFIX:
                break
            digests.append(multihash[2:])
        if digests:
            return [_hashed(read) for read in self.files.read_many(digests, cids.MAX_BLOCK)]
        return [read_file(self._path(wanted[0]), cids.MAX_BLOCK)]

    def read_each(self, leaves: Sequence[Leaf]) -> Sequence[Buffer]:
        """The blocks of `leaves` in order, up to the first that is missing or does not fit."""
        blocks: list[Buffer] = []
        for leaf in () if self._is_blocked() else leaves:
            block = self._into_buffer(leaf)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _into_buffer(self, leaf: Leaf) -> memoryview | None:
        try:
            with regular(self._path(leaf.cid), cids.MAX_BLOCK) as (file, size):
                if not has_claimed_size(leaf, size):
                    return None
                block = lend(max(size, 1))[:size]
                if block:
                    self._direct.read(file, [block], 0)
                return block
        except FileNotFoundError:
            return None
        except OSError as exc:
            log.warning("%s: the node's file can't be read: %s", cids.text(leaf.cid), exc)
            return None

    def _path(self, cid: Cid) -> str:
        name = cids.multihash_base32(cid)
        return f"{self._folder}/{name[-1 - self._characters : -1]}/{name}.data"


def _block(cid: Cid, read: Read | int) -> Buffer | Hashed | None:
    """Raises BlockTooLarge."""
    if isinstance(read, int) and read != MISSING:
        raise cids.too_large("kubo", cid, -read)
    return _hashed(read)


def _hashed(read: Read | int) -> Buffer | Hashed | None:
    if isinstance(read, int):
        return None
    return read.block if read.digest is None else Hashed(read.block, read.digest)


def open_flatfs(repository: Path) -> Flatfs | None:
    """The blocks of `repository`. None if they are not in flatfs or can't be read, and if there is a
    denylist."""
    denylists = Denylists(repository)
    if denylists.any():
        return None
    try:
        kept = _flatfs_of(json.loads(_config(repository / "datastore_spec")))
        if kept is None:
            return None
        folder = repository / kept[0]
        if _config(folder / "SHARDING").strip() != f"{SHARDING}{kept[1]}" or not os.access(
            folder, os.R_OK | os.X_OK, effective_ids=True
        ):
            return None
    except OSError:
        return None
    except (ValueError, RecursionError) as exc:
        log.warning(
            "%s is left alone, the node is asked for every block: its datastore_spec is not what Kubo "
            "writes: %s",
            repository,
            exc,
        )
        return None
    return Flatfs(folder, kept[1], denylists)


def files(repository: Path) -> list[Path]:
    """All files and folders that are read of a repository. Some may not exist. The blocks may be on another
    disk."""
    lists = Denylists(repository).folders
    found = [repository, *lists, *(each.parent for each in lists if each.parent.name == "ipfs")]
    with suppress(OSError, ValueError, RecursionError):  # `open_flatfs` says so
        kept = _flatfs_of(json.loads(_config(repository / "datastore_spec")))
        if kept is not None:
            found.append(repository / kept[0])
    return found


def _config(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(MAX_CONFIG)


def _flatfs_of(spec: Any) -> tuple[str, int] | None:
    """The path of the blocks' folder in the repository, and the length of the names of its folders.

    Raises ValueError."""
    if not isinstance(spec, dict):
        raise ValueError("not a JSON object")
    mounts = spec.get("mounts", [])
    if not isinstance(mounts, list):
        raise ValueError('"mounts" is not a list')
    for mount in mounts:
        if isinstance(mount, dict) and mount.get("mountpoint") == "/blocks":
            path, shards = mount.get("path"), mount.get("shardFunc")
            if mount.get("type") != "flatfs" or not isinstance(path, str) or not isinstance(shards, str):
                return None
            characters = shards.removeprefix(SHARDING)
            return (path, int(characters)) if characters != shards and characters.isdecimal() else None
    return None


def _has_denylist(folder: Path) -> bool:
    try:
        return any(name.endswith(".deny") for name in os.listdir(folder))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # it may hold one


# -- all blocks below a directory ----------------------------------------------------------------------------

BATCH = 32
"""Blocks that one call reads, four at a time: on a slow disk each takes 10 ms."""
BATCH_SECONDS = 0.03
"""Seconds after which a batch ends, however few blocks it has: the caller's own wait is limited."""
BATCH_BYTES = 1 << 20
"""Bytes after which a batch ends."""

Find = Callable[[Sequence[Cid]], Sequence[Buffer | Hashed | None]]
"""Reads the first of the CIDs, as many as it likes but at least one; None for a missing block."""


class RepoWalk:
    def __init__(self, find: Find, root: Cid, limit: int) -> None:
        """`limit`: bytes after which no more blocks are read."""
        self._find = find
        self._left = limit
        self._walk = BlockWalk([root], None)
        self.incomplete = False
        """Whether a block was missing."""

    def next_blocks(self) -> Sequence[tuple[Cid, Buffer | Hashed]]:
        """The next few blocks; empty at the end."""
        came: list[tuple[Cid, Buffer | Hashed]] = []
        enough = max(self._left - BATCH_BYTES, 0)
        until = time.monotonic() + BATCH_SECONDS
        while self._left > enough and not (came and time.monotonic() >= until):
            wanted = self._walk.take(BATCH)
            if not wanted:
                break
            blocks = self._find([item.cid for item in wanted])
            self._walk.put_back(wanted[len(blocks) :])
            found = [
                (item.cid, block) for item, block in zip(wanted, blocks, strict=False) if block is not None
            ]
            self.incomplete = self.incomplete or len(found) < len(blocks)
            for cid, read in reversed(found):
                block = bytes(read.block if isinstance(read, Hashed) else read)
                self._left -= len(block)
                self._walk.add(_below(cid, block), None)
            came += found
        return came


def _below(cid: Cid, block: bytes) -> list[Cid]:
    """The CIDs that a block links, without those that need no source."""
    try:
        return [child for child in nodes.links(cid, block) if cids.inline_or_empty_block(child) is None]
    except IpfsFuseError:  # a program that reads the block gets the error
        return []
