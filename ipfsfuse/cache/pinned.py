"""The DAGs that the user pinned. Their staging files and packs are exempt from eviction until they are
unpinned.

Each pin has packs of its own, so that one pin can be removed without touching the others.

Concurrency: on the event loop. Pins and unpins of one CID exclude each other.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.budget import Key
from ipfsfuse.cache.reader import Reader, parsed_node
from ipfsfuse.cache.store.packs import PackSet
from ipfsfuse.cache.store.records import PinRecord
from ipfsfuse.cache.store.store import MAX_PACKED, Store
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Node
from ipfsfuse.dag.traversal import BlockWalk
from ipfsfuse.errors import Malformed, StoreFailed, Unsupported, UsageError
from ipfsfuse.fileio import threads

log = logging.getLogger(__name__)


class Pinning:
    """A DAG that is being pinned. The caller calls `file` with each of its files before it reads the file's
    leaves."""

    def __init__(self, store: Store, root: Cid) -> None:
        self._store = store
        self._root = root
        self._pack_set = PackSet()
        self._files: dict[Cid, int] = {}
        self._own_files: set[Cid] = set()
        """The files that no other pin had before."""

    @property
    def keys(self) -> list[Key]:
        """The staging files and packs of this pin."""
        return [*self._files, *self._pack_set.packs]

    async def file(self, file: FileRef) -> None:
        """Pins a file. Raises StoreFailed if what was pinned so far did not fit."""
        if file.size > MAX_PACKED:
            self._files[file.cid] = file.size
            if not self._store.budget.is_pinned(file.cid):
                self._own_files.add(file.cid)
            self._store.budget.pin(file.cid)
            self._store.not_kept.discard(file.cid)
        self.check()

    def check(self) -> None:
        budget = self._store.budget
        if not budget.refused.isdisjoint(self.keys):
            size = sum(self._files.values())
            own: list[Key] = [*self._own_files, *self._pack_set.packs]
            others = budget.pinned_bytes - sum(budget.size(key) for key in own)
            cure = "raise --budget" if budget.limit == budget.configured else "make room on the disk"
            raise StoreFailed(
                f"{cids.text(self._root)} can't be pinned: of the budget of {budget.limit} bytes "
                f"{others} are pinned already, its files alone are {size} so far: {cure}, or unpin something"
            )
        if self._store.backoff.reason:
            raise StoreFailed(f"{cids.text(self._root)} can't be pinned: {self._store.backoff.reason}")
        if not self._store.not_kept.isdisjoint(self._files):
            raise StoreFailed(
                f"{cids.text(self._root)} can't be pinned: not all of it could be written: try again"
            )

    async def pin_structure(self, reader: Reader) -> None:
        """Pins every block of the DAG that is in packs: directories, symlinks, interior nodes, small
        files."""
        walk = BlockWalk([self._root], False)
        for cid, in_file in walk:
            await trio.lowlevel.checkpoint()  # reading a small block has no checkpoint
            block = await reader.block(cid)
            if self._store.blocks.locate(cid) is not None:  # otherwise it is a staging file, or read in place
                await self._store.blocks.put(cid, block, self._pack_set)
            walk.add(*_below(self._store, await parsed_node(cid, block, MAX_PACKED), in_file))
            self.check()


def _below(store: Store, node: Node, in_file: bool) -> tuple[list[Cid], bool]:
    """The links of a node to blocks that may be in packs, and whether these blocks belong to a file of over
    64 KiB."""

    def is_structure(child: Cid) -> bool:
        """Whether a part of a large file is a block in a pack: an interior node, or a leaf that can't be
        verified by its content alone."""
        return cids.codec(child) != cids.RAW and store.blocks.locate(child) is not None

    large = (
        isinstance(node, File) and (in_file or node.size > MAX_PACKED) and not nodes.holds_values(node.cid)
    )
    return [child for child in nodes.children(node) if not large or is_structure(child)], large


class PinnedDags:
    """All pins."""

    def __init__(self, store: Store, reader: Reader) -> None:
        self._store = store
        self._reader = reader
        self._pins = dict(store.pinned)
        self._busy: set[Cid] = set()
        self._writing = trio.Lock()
        self._jobs: dict[Cid, Pinning] = {}
        self._lost: dict[Cid, int] = {}
        if store.budget.counted.is_set():
            self._note_lost()

    @property
    def roots(self) -> Sequence[Cid]:
        """The roots that are pinned, in canonical form."""
        return list(self._pins)

    @property
    def lost(self) -> int:
        """How many staging files and packs of pins no longer exist, as far as that is known."""
        return sum(self._lost.values())

    def _note_lost(self) -> None:
        self._lost = {pin: count for pin in self._pins if (count := self._count_lost(pin))}
        if self._lost:
            _report_lost(self._lost)

    def _count_lost(self, pin: Cid) -> int:
        store = self._store
        return sum(
            key not in store.blocks.packs.sizes if isinstance(key, int) else key not in store.staging.entries
            for key in self._pins[pin].keys or ()
        )

    async def recover(self) -> None:
        """Finds the staging files and packs of each pin for which they are not known, by walking the staged
        part of its DAG.

        Until then everything that was found at the start is pinned (`recovery.Inventory`). Missing blocks are
        not fetched here, but when they are used."""
        if not self._store.budget.counted.is_set():
            await self._store.budget.counted.wait()
            self._note_lost()
        if not self._unknown():
            return
        await self._store.blocks.packs_indexed.wait()
        while unknown := self._unknown():
            pin = unknown[0]
            found, missing = await self._walk(pin)
            if pin not in self._unknown():
                continue  # it was unpinned, or pinned anew, meanwhile
            self._pins[pin] = self._record(found)
            if missing:
                self._lost[pin] = missing
                _report_lost({pin: missing})
            try:
                await self._write(pin)
            except StoreFailed as exc:
                log.warning("%s", exc)
        self._unpin([*self._store.blocks.packs.sizes, *self._store.staging.entries])

    def _unknown(self) -> list[Cid]:
        """The pins whose staging files and packs are not known."""
        return [pin for pin, record in self._pins.items() if record.keys is None]

    def _record(self, keys: Iterable[Key]) -> PinRecord:
        pinned = frozenset(keys)
        return PinRecord(sum(map(self._store.budget.size, pinned)), pinned)

    async def _walk(self, root: Cid) -> tuple[set[Key], int]:
        """(The staging files and packs of the DAG below `root`, how many of its blocks and files are
        missing)."""
        store, found, missing = self._store, set[Key](), 0
        walk = BlockWalk([root], False)
        for cid, in_file in walk:
            await trio.lowlevel.checkpoint()  # reading a small block has no checkpoint
            location, file = store.blocks.locate(cid), cids.canonical(cid)
            if cids.codec(cid) == cids.RAW and file in store.staging.entries:
                found.add(file)
                continue
            block = cids.inline_or_empty_block(cid)
            if block is None:
                block = await store.blocks.get(cid)
                if block is None or location is None:
                    missing += 1
                    continue
                found.add(location.pack)
            try:
                node = await parsed_node(cid, block, MAX_PACKED)
            except (Malformed, Unsupported):
                continue
            if (
                isinstance(node, File)
                and node.size > MAX_PACKED
                and not in_file
                and not nodes.holds_values(cid)
            ):
                found.add(file)
                missing += file not in store.staging.entries
            walk.add(*_below(store, node, in_file))
        return found, missing

    @contextlib.asynccontextmanager
    async def pin(self, cid: Cid) -> AsyncIterator[Pinning]:
        """Pins a DAG. Within the `async with` block the caller reads all of it, and calls `Pinning.file` for
        each file first. After an error nothing stays pinned.

        Raises StoreFailed, which names the sizes, if the budget has no room for it."""
        root = cids.canonical(cid)
        await self._store.budget.counted.wait()
        with self._alone(root):
            job = self._jobs[root] = Pinning(self._store, root)
            try:
                yield job
                await job.pin_structure(self._reader)
            except BaseException:
                del self._jobs[root]
                self._unpin(job.keys)
                raise
            await self._complete(root, job)

    async def _complete(self, root: Cid, job: Pinning) -> None:
        """Writes the pin's record; from then on the pin counts. Files that are read in place are left out:
        they have no staging file, and would seem to be lost later."""
        before, staged = self._pins.get(root), self._store.staging.entries
        self._pins[root] = self._record(key for key in job.keys if isinstance(key, int) or key in staged)
        try:
            await self._write(root)
        except StoreFailed:
            del self._pins[root]
            if before is not None:
                self._pins[root] = before
            raise
        finally:
            del self._jobs[root]
            self._unpin([*job.keys, *(before.keys or () if before is not None else ())])
        self._lost.pop(root, None)

    async def unpin(self, cid: Cid) -> None:
        """Lets the DAG `cid` be evicted again. Raises UsageError if it is not pinned."""
        root = cids.canonical(cid)
        await self._store.budget.counted.wait()
        if root not in self._pins:
            raise UsageError(f"{cids.text(cid)} is not pinned")
        with self._alone(root), trio.CancelScope(shield=True):  # an unpin that is half done can't be repeated
            async with self._writing:
                await threads.run_sync(self._store.pin_records.remove, root)
                keys = self._pins.pop(root).keys or frozenset()
            self._lost.pop(root, None)
            for other in list(self._pins.values()):
                await self._point_to(other.keys or frozenset(), keys)
            self._unpin(keys)

    @contextlib.contextmanager
    def _alone(self, root: Cid) -> Iterator[None]:
        if root in self._busy:
            raise UsageError(
                f"{cids.text(root)} is being pinned or unpinned already: wait until that has ended"
            )
        self._busy.add(root)
        try:
            yield
        finally:
            self._busy.discard(root)

    async def _point_to(self, other: Collection[Key], leaving: Collection[Key]) -> None:
        """From now on, blocks that are in packs of `other` and of `leaving` are read from those of
        `other`."""
        packs = self._store.blocks.packs
        for pack in [key for key in other if isinstance(key, int)]:
            for cid, location in await threads.run_sync(list, packs.sections(pack)):
                found = self._store.blocks.locate(cid)
                if found is None or found.pack in leaving:
                    packs.pending[cids.multihash(cid)] = location

    def _unpin(self, keys: Iterable[Key]) -> None:
        """Unpins those of `keys` that belong to no other pin, finished or under way. If the keys of a pin are
        not known, does nothing: `recover` does it later."""
        unknown = self._unknown()
        pins, jobs = self._pins.values(), self._jobs.values()
        pinned = set[Key]().union(*(pin.keys or () for pin in pins), *(job.keys for job in jobs))
        for key in keys:
            self._store.budget.refused.discard(key)
            if not isinstance(key, int):
                self._store.not_kept.discard(key)
            if key not in pinned and not unknown:
                self._store.budget.unpin(key)

    async def _write(self, root: Cid) -> None:
        """Writes the record of one pin to the disk. Raises StoreFailed."""
        with trio.CancelScope(shield=True):
            async with self._writing:
                if root in self._pins:  # otherwise it was unpinned meanwhile
                    await threads.run_sync(self._store.pin_records.write, root, self._pins[root])


def _report_lost(lost: Mapping[Cid, int]) -> None:
    pin, count = next(iter(lost.items()))
    more = f" (and of {len(lost) - 1} more pins)" if len(lost) > 1 else ""
    what = "%d parts of the pin %s%s are not in the cache any more: they are fetched when they are used"
    log.warning(f"{what}, or now by `ipfsfuse pin`", count, cids.text(pin), more)  # noqa: G004
