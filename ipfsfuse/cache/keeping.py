"""What is kept for good: a DAG's files, and packs of its own for its blocks, exempt from eviction until it is unpinned.

Each pin has packs of its own, so that what one lets go of no other loses. Concurrency: the event loop's; pins and
unpins of one CID exclude each other.
"""

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import trio

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.folder import upkeep
from ipfsfuse.cache.folder.blocks import Series
from ipfsfuse.cache.folder.disk import SMALL
from ipfsfuse.cache.folder.index import Damaged
from ipfsfuse.cache.folder.store import Store
from ipfsfuse.cache.reading import Reading
from ipfsfuse.cache.room import Key
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import nodes
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Shard
from ipfsfuse.errors import StoreFailed, UsageError


class Pinning:
    """One DAG on its way to be kept. `file` is awaited for each of its files before their leaves are read."""

    def __init__(self, store: Store, root: Cid) -> None:
        self._store = store
        self._root = root
        self._series = Series()
        self._files: dict[Cid, int] = {}
        self._own_files: set[Cid] = set()
        """Those that no other pin kept before."""

    @property
    def keys(self) -> list[Key]:
        """What it keeps."""
        return [*self._files, *self._series.packs]

    async def file(self, file: FileRef) -> None:
        """Raises StoreFailed where what was kept so far did not find room."""
        if file.size > SMALL:
            self._files[file.cid] = file.size
            if not self._store.room.kept(file.cid):
                self._own_files.add(file.cid)
            self._store.room.keep(file.cid)
        self.check()

    def check(self) -> None:
        room = self._store.room
        if not room.refused.isdisjoint(self.keys):
            size = sum(self._files.values())
            own: list[Key] = [*self._own_files, *self._series.packs]
            kept = room.kept_bytes - sum(room.size(key) for key in own)
            raise StoreFailed(
                f"{cids.text(self._root)} can't be pinned: of the budget of {room.budget} bytes {kept} are pinned already, "
                f"its files alone are {size} so far: raise --budget, or unpin something"
            )
        if self._store.trouble.text:
            raise StoreFailed(f"{cids.text(self._root)} can't be pinned: {self._store.trouble.text}")

    async def keep_structure(self, reading: Reading) -> None:
        """Keeps every block of the DAG that lies in packs: directories, links, interior nodes, small files."""
        seen: set[Cid] = set()
        stack: list[tuple[Cid, bool]] = [(self._root, False)]
        while stack:
            cid, in_file = stack.pop()
            if cid not in seen and cids.inline(cid) is None:
                seen.add(cid)
                stack += await self._visit(reading, cid, in_file)
                self.check()

    async def _visit(self, reading: Reading, cid: Cid, in_file: bool) -> list[tuple[Cid, bool]]:
        """What lies below `cid`, with whether it belongs to a file of over 64 KiB."""
        block = await reading.block(cid)
        if self._store.place(cid) is not None:  # else it is staged as a file, or read in place
            await self._store.keep_block(cid, block, self._series)
        node = nodes.parse(cid, block)
        if isinstance(node, Directory):
            return [(link.cid, False) for link in node.links]
        if isinstance(node, Shard):
            return [(link.cid, False) for _index, link in node.slots]
        if not isinstance(node, File):
            return []
        large = in_file or node.size > SMALL
        return [(child.cid, large) for child in node.children if not large or self._is_structure(child.cid)]

    def _is_structure(self, child: Cid) -> bool:
        """Whether a part of a large file is a block in a pack: an interior node, or a leaf that content can't prove."""
        return cids.codec(child) != cids.RAW and self._store.place(child) is not None


class Keeping:
    """All that is kept for good."""

    def __init__(self, store: Store, reading: Reading) -> None:
        self._store = store
        self._reading = reading
        self._pins: dict[Cid, int] = {}
        self._keys: dict[Cid, set[Key]] = {}
        self._busy: set[Cid] = set()
        self._jobs: dict[Cid, Pinning] = {}
        with contextlib.suppress(StoreFailed, Damaged):
            self._pins = dict(store.index.rows("SELECT cid, bytes FROM pins", lambda pin, size: (cids.decode(pin), int(size))))
            for pin, key in store.index.rows("SELECT pin, key FROM pinned", upkeep.pinned_row):
                self._keys.setdefault(pin, set()).add(key)

    @property
    def pins(self) -> Sequence[Cid]:
        return list(self._pins)

    @contextlib.asynccontextmanager
    async def pinning(self, cid: Cid) -> AsyncIterator[Pinning]:
        """Within it the DAG is fetched; at its end what was fetched is kept, and after an error nothing."""
        root = cids.canonical(cid)
        with self._alone(root):
            job = self._jobs[root] = Pinning(self._store, root)
            try:
                yield job
                await job.keep_structure(self._reading)
            except BaseException:
                del self._jobs[root]
                self._release(job.keys)
                raise
            del self._jobs[root]
            old = self._keys.get(root, set())
            self._keys[root], self._pins[root] = set(job.keys), sum(self._store.room.size(key) for key in job.keys)
            self._release(old)
            await self._write(root)

    async def unpin(self, cid: Cid) -> None:
        """Raises UsageError for what is not pinned."""
        root = cids.canonical(cid)
        if root not in self._pins:
            raise UsageError(f"{cids.text(cid)} is not pinned")
        with self._alone(root), trio.CancelScope(shield=True):  # half an unpin could be asked for no more
            keys = self._keys.pop(root, set())
            del self._pins[root]
            for other in list(self._keys.values()):
                await self._point_to(other, keys)
            self._release(keys)
            await self._write(root)

    @contextlib.contextmanager
    def _alone(self, root: Cid) -> Iterator[None]:
        if root in self._busy:
            raise UsageError(f"{cids.text(root)} is being pinned or unpinned already: wait until that has ended")
        self._busy.add(root)
        try:
            yield
        finally:
            self._busy.discard(root)

    async def _point_to(self, other: set[Key], leaving: set[Key]) -> None:
        """What `other` holds too is found in its own packs from now on."""
        packs = self._store.packs
        for pack in [key for key in other if isinstance(key, int)]:
            for cid, place in await trio.to_thread.run_sync(list, packs.sections(pack)):
                found = self._store.place(cid)
                if found is None or found.pack in leaving:
                    packs.pending[cids.multihash(cid)] = place

    def _release(self, keys: Iterable[Key]) -> None:
        """Lets go of what no other pin holds, finished or under way."""
        held = set[Key]().union(*self._keys.values(), *(job.keys for job in self._jobs.values()))
        for key in keys:
            self._store.room.refused.discard(key)
            if key not in held:
                self._store.room.release(key)

    async def _write(self, root: Cid) -> None:
        """The state of one pin, on the disk when this returns."""
        self._store.write_later("DELETE FROM pins WHERE cid = ?", (root,))
        self._store.write_later("DELETE FROM pinned WHERE pin = ?", (root,))
        if root in self._pins:
            self._store.write_later("INSERT INTO pins VALUES (?, ?)", (root, self._pins[root]))
            for key in self._keys[root]:
                name = str(key) if isinstance(key, int) else cids.text(key)
                self._store.write_later("INSERT INTO pinned VALUES (?, ?)", (root, name))
        await upkeep.flush(self._store)
