"""The commands of the control socket of a mount. They use the cache, the sources and the tree."""

import base64
import logging
import os
import stat
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

import trio

from ipfsfuse import __version__, units
from ipfsfuse.cache.base import CacheItem
from ipfsfuse.cache.passthrough import PassthroughFiles
from ipfsfuse.cache.pins.kubo_pins import NodePins
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.reader import Reader, parsed_node
from ipfsfuse.config import MountConfig
from ipfsfuse.content import Names, WholeBlocks
from ipfsfuse.control.server import Arguments, Handler, SendProgress
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import hamt, traversal
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File, Node, Shard, Symlink
from ipfsfuse.dag.path import can_hold, cid_alone
from ipfsfuse.errors import Malformed, Unsupported, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import request_of
from ipfsfuse.sources.http.settings import FetchQuota
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.structures import Histogram
from ipfsfuse.vfs.fetch_dag import OnProgress, Totals, fetch_all
from ipfsfuse.vfs.tree import Tree

log = logging.getLogger("ipfsfuse.mount")

LAG_SECONDS = 1.0
SAMPLE_SECONDS = 10.0
MAX_SAMPLES = 600
"""Samples of the history, of some 100 bytes each. Beyond this, every second one is dropped."""
PROGRESS_SECONDS = 0.2
"""Seconds between two lines of progress."""

Answer = Mapping[str, Any]


def _log() -> str | None:
    """The file behind standard error; None if it is not a file. Clients can't find it themselves, since this
    process hides its descriptors from other processes."""
    with suppress(OSError):
        if stat.S_ISREG(os.fstat(2).st_mode):
            return os.readlink("/proc/self/fd/2").removesuffix(" (deleted)")
    return None


class Commands:
    def __init__(
        self,
        config: MountConfig,
        cache: PinsetCache,
        pool: SourcePool,
        pins: NodePins,
        tree: Tree,
        names: Names,
        passthrough: PassthroughFiles | None,
        quota: FetchQuota | None,
        latencies: Mapping[str, Histogram],
        given: Mapping[str, int],
    ) -> None:
        """`latencies`: those of the kernel's calls, by name. `given`: the bytes that they returned."""
        self._config, self._cache, self._pool, self._pins, self._tree = config, cache, pool, pins, tree
        self._names, self._passthrough, self._quota = names, passthrough, quota
        self._served = {"blocks": 0, "bytes": 0}
        """What `ipfsfuse serve` got from this mount."""
        self._blocks = WholeBlocks(cache.reader, pool)
        self._latencies, self._given = latencies, given
        self._lag = Histogram()
        self._history = [self._sample()]
        self._sample_seconds = SAMPLE_SECONDS
        self._started = time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps

    def table(self) -> dict[str, Handler]:
        """The commands by name."""
        return {
            "status": self.status,
            "ls": self.ls,
            "quota": self.quota,
            "pin": self.pin,
            "unpin": self.unpin,
            "prefetch": self.prefetch,
            "evict": self.evict,
            "budget": self.budget,
            "metrics": self.metrics,
            "history": self.history,
            "fsck": self.fsck,
            "block": self.block,
            "resolve": self.resolve,
            "record": self.record,
        }

    async def status(self, _arguments: Arguments, _progress: SendProgress) -> Answer:
        reasons = self._degraded()
        return {
            "version": __version__,
            "health": "degraded" if reasons else "healthy",
            "reasons": reasons,
            "pid": os.getpid(),
            "mountpoint": str(self._config.mountpoint),
            "cache_dir": str(self._config.cache_dir),
            "log": _log(),
            "offline": self._config.offline,
            "since": units.timestamp(time.time() - self._uptime()),
            "uptime": round(self._uptime(), 1),
            "cache": asdict(self._cache.statistics()),
            "pins": {name: asdict(status) for name, status in self._pins.status().items()},
            "no_source_to_ask": self._pool.no_source_to_ask,
            "sources": [asdict(source) for source in self._pool.statistics()],
            "served": dict(self._served),
            **({"passthrough": asdict(self._passthrough.status())} if self._passthrough else {}),
        }

    def _degraded(self) -> list[str]:
        """The reasons why this mount is not healthy."""
        sources = [
            each
            for each in self._pool.statistics()
            if (each.state not in ("good", "untried") or each.why) and not each.found
        ]
        nodes = self._pins.status().items()
        return [
            *([self._cache.trouble] if self._cache.trouble else []),
            *(f"{each.name} is {each.state}: {each.why or 'no reason is known'}" for each in sources),
            *(f"{node} takes no pins: {pins.failing}" for node, pins in nodes if pins.failing),
        ]

    def in_one_line(self) -> str:
        """The state of the mount, for the log."""
        cache = self._cache.statistics()
        sources = "; ".join(
            f"{each.name} {each.state}, {each.blocks} blocks" for each in self._pool.statistics()
        )
        return (
            f"status: up {self._uptime():.0f} s; {cache.used} of {cache.effective_budget} bytes "
            f"used, {cache.hits} hits, "
            f"{cache.misses} misses, {cache.evictions} evictions; {cache.trouble or 'no trouble'}; "
            f"{sources or 'no source'}"
        )

    def _uptime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self._started

    async def quota(self, arguments: Mapping[str, Any], _progress: SendProgress) -> dict[str, Any]:
        """The bytes that were fetched and that --max-fetch allows. With `wait`, answers when the quota is
        reached."""
        if self._quota is None:
            raise UsageError("this mount has no --max-fetch")
        if arguments.get("wait") is True:
            await self._quota.reached.wait()
        return {
            "fetched": self._quota.fetched,
            "max_fetch": self._quota.bound,
            "reached": self._quota.reached.is_set(),
        }

    async def ls(self, arguments: Arguments, progress: SendProgress) -> Answer:
        """All staging files with their paths. With `tree` also all staged paths."""
        tree: list[dict[str, Any]] = []
        paths = defaultdict[Cid, list[str]](list)
        report, found = _Throttled(progress), 0
        pinned = self._cache.pinned.roots

        def roots() -> Iterator[tuple[Cid, str]]:
            yield from self._cache.names.staged()
            for pin in pinned:
                if pin not in paths:  # else it was found below a name
                    yield pin, cids.text(pin)

        async for each in staged_paths(self._cache.reader, roots()):
            path = each.path.decode("utf-8", "surrogateescape")
            paths[each.item.cid].append(path)
            if arguments.get("tree") is True:
                entry = {"path": path, "kind": each.kind, **_entry(each.item), "size": each.size}
                tree.append(entry)
            found += 1
            await report({"done": found, "unit": "paths"})
        entries = await threads.run_sync(_entries, await self._cache.store.listed(), paths)
        return {
            "entries": entries,
            "pinned": [cids.text(cid) for cid in pinned],
            "paths": {cids.text(cid): paths[cid] for cid in pinned},
            "small": (await self._cache.store.blocks.count())._asdict(),
            **({"tree": tree} if arguments.get("tree") is True else {}),
        }

    async def resolve(self, arguments: Arguments, _progress: SendProgress) -> Answer:
        """The path that an IPNS name or a domain resolves to, and for how many seconds that is valid."""
        name = arguments.get("name")
        if not isinstance(name, str):
            raise UsageError("resolve: name is a text")
        found = await (await self._names.resolver()).resolve_text(name)
        return {
            "path": found.path.text,
            "seconds": max(0.0, found.until - trio.current_time()),
        }

    async def prefetch(self, arguments: Arguments, progress: SendProgress) -> Answer:
        depth = arguments.get("depth")
        if depth is not None and not (isinstance(depth, int) and depth >= 0):
            raise UsageError("prefetch: depth is a number of levels")
        with request_of(os.getuid()):  # commands come from the user who mounted
            cid = await self._named(arguments)
            totals = await fetch_all(self._tree, cid, depth, _fetched(progress))
        return {"prefetched": cids.text(cid), **_counts(totals)}

    async def pin(self, arguments: Arguments, progress: SendProgress) -> Answer:
        cid = await self._named(arguments)
        async with self._cache.pinned.pin(cid) as pinning:
            totals = await fetch_all(self._tree, cid, None, _fetched(progress), pinning.file)
        self._pins.pin(cid)
        return {"pinned": cids.text(cid), **_counts(totals)}

    async def unpin(self, arguments: Arguments, _progress: SendProgress) -> Answer:
        cid = await self._named(arguments)
        await self._cache.pinned.unpin(cid)
        self._pins.unpin(cid)
        return {"unpinned": cids.text(cid)}

    async def evict(self, arguments: Arguments, _progress: SendProgress) -> Answer:
        if arguments.get("all") is True:
            return {"freed": await self._cache.store.evict()}
        cid = await self._named(arguments)
        return {"evicted": cids.text(cid), "freed": await self._cache.store.evict(cid)}

    async def _named(self, arguments: Arguments) -> Cid:
        """The CID at `path`, or `cid`. Blocks on the way are fetched. Symlinks are not followed."""
        if "path" not in arguments:
            return _cid(arguments)
        path = await self._names.path_of(str(arguments["path"]))
        if not path.names:
            return path.root
        with request_of(os.getuid()):
            node = await traversal.drive(traversal.resolve(path), self._tree.nodes)
        self._cache.names.note(path.root, cids.text(path.root))  # `ls` finds the names below it
        return node.cid

    async def budget(self, arguments: Arguments, _progress: SendProgress) -> Answer:
        """Changes the budget until this mount ends."""
        size = arguments.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 63:
            raise UsageError("budget: size is a number of bytes")
        await self.resize(size)
        statistics = self._cache.statistics()
        return {
            "budget": statistics.budget,
            "effective_budget": statistics.effective_budget,
            "used": statistics.used,
        }

    async def resize(self, budget: int) -> None:
        """Changes the budget, in bytes."""
        if budget != self._cache.store.budget.configured:
            log.info("the budget is now %s bytes", budget)
            await self._cache.store.budget.resize(budget)

    async def measure_lag(self) -> None:
        """Measures once a second how late the event loop is. Takes samples for `history`."""
        sampled = trio.current_time()
        while True:
            due = trio.current_time() + LAG_SECONDS
            await trio.sleep_until(due)
            self._lag.add(trio.current_time() - due)
            if due - sampled >= self._sample_seconds:
                sampled = due
                self._history.append(self._sample())
                if len(self._history) > MAX_SAMPLES:
                    del self._history[1::2]
                    self._sample_seconds *= 2

    def _sample(self) -> dict[str, Any]:
        cache = self._cache.statistics()
        fetched = sum(each.bytes for each in self._pool.statistics())
        return {
            "time": units.timestamp(time.time()),
            "hits": cache.hits,
            "misses": cache.misses,
            "evictions": cache.evictions,
            "used": cache.used,
            "fetched": fetched,
        }

    async def history(self, _arguments: Arguments, _progress: SendProgress) -> Answer:
        """The counts at some hundred moments since the mount started."""
        return {"samples": [*self._history, self._sample()]}

    async def metrics(self, arguments: Arguments, progress: SendProgress) -> Answer:
        """The answer of `status`, and histograms of latencies."""
        return {
            **await self.status(arguments, progress),
            "operations": {name: each.as_dict() for name, each in self._latencies.items()},
            "operation_bytes": dict(self._given),
            "pinned": len(self._cache.pinned.roots),
            "latencies": {name: each.as_dict() for name, each in self._pool.latencies().items()},
            "lag": self._lag.as_dict(),
            "stalled": sum(each.in_flight + each.waiting for each in self._pool.statistics()),
        }

    async def fsck(self, _arguments: Arguments, progress: SendProgress) -> Answer:
        async def report_progress(done: int, total: int) -> None:
            await progress({"done": done, "total": total})

        return asdict(await self._cache.fsck(report_progress))

    async def block(self, arguments: Arguments, _progress: SendProgress) -> Answer:
        """One verified block. If `fetch` is false, only a block that is here. `serve` sets `serving`."""
        block = await self._blocks.get(_cid(arguments), arguments.get("fetch") is not False)
        if arguments.get("serving") is True:
            self._served["blocks"] += 1
            self._served["bytes"] += len(block)
        return {"data": base64.b64encode(block).decode("ascii")}

    async def record(self, arguments: Arguments, _progress: SendProgress) -> Answer:
        """The newest IPNS record of a name. If `fetch` is false, the newest stored one."""
        from ipfsfuse.sources.names.record import KeyName, parse_name  # rare, and takes 50 ms

        name = parse_name(str(arguments.get("name")))
        if not isinstance(name, KeyName):
            raise UsageError("record: name is the name of a key")
        data = await self._names.record(name, arguments.get("fetch") is not False)
        return {"data": base64.b64encode(data).decode("ascii")}


def _entries(listed: Sequence[CacheItem], paths: Mapping[Cid, Sequence[str]]) -> list[dict[str, Any]]:
    return [{**_entry(item), "paths": paths.get(item.cid, [])} for item in listed]


def _entry(item: CacheItem) -> dict[str, Any]:
    used = units.timestamp(item.last_used) if item.last_used else None
    return item._asdict() | {"cid": cids.text(item.cid), "last_used": used}


def _cid(arguments: Arguments) -> Cid:
    if "cid" not in arguments:
        raise UsageError("the command takes a cid")
    return cid_alone(str(arguments["cid"]))


def _counts(totals: Totals) -> dict[str, int]:
    return {"files": totals.files, "directories": totals.directories, "bytes": totals.bytes}


def _fetched(progress: SendProgress) -> OnProgress:
    """Reports what has been fetched."""
    throttled = _Throttled(progress)

    async def report(totals: Totals) -> None:
        await throttled(
            {"done": totals.bytes, "total": max(totals.expected, totals.bytes), "files": totals.files}
        )

    return report


class _Throttled:
    """Passes progress on, at most a few times a second."""

    def __init__(self, progress: SendProgress) -> None:
        self._progress = progress
        self._last = 0.0

    async def __call__(self, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            await self._progress(values)


# -- what is staged, by path ---------------------------------------------------------------------------------

# The cache knows only CIDs. The names come from the directories themselves: the walk begins at the names that
# were opened in the mount's root, and goes down through directory blocks that are here. It asks no source,
# and does not count as a use. Each directory is entered once, by the first path to it, so that the time of
# the walk is proportional to the number of entries.

ENTRIES_LISTED_TOGETHER = 500
"""Entries that are visited before other tasks can run: some milliseconds."""


class Staged(NamedTuple):
    """One path that is here, at least in part."""

    path: bytes
    """`/ipfs/NAME/a/b`, NAME as it was opened."""
    item: CacheItem
    kind: str
    """`directory`, `file` or `symlink`."""
    size: int | None
    """Bytes of a file's content or of a symlink's target; None for a directory."""


async def staged_paths(reader: Reader, roots: Iterable[tuple[Cid, str]]) -> AsyncIterator[Staged]:
    """All staged paths below `roots` (CIDs and their names), directories before their entries. Takes the next
    root after everything below the previous one."""
    entered = set[Cid]()
    looked_at = 0
    for root, name in roots:
        waiting = [(b"/ipfs/" + name.encode(), root)]
        while waiting:
            looked_at += 1
            if looked_at % ENTRIES_LISTED_TOGETHER == 0:
                await trio.lowlevel.checkpoint()
            path, cid = waiting.pop()
            item = reader.store.item_of(cid)
            if item is None:
                continue
            node = await _node(reader, cid) if cids.codec(cid) == cids.DAG_PB else None
            if isinstance(node, Directory | Shard):
                yield Staged(path, item, "directory", None)
                if cids.canonical(cid) not in entered:
                    entered.add(cids.canonical(cid))
                    entries = sorted([entry async for entry in _entries_here(reader, node)], reverse=True)
                    waiting += [(path + b"/" + child, below) for child, below in entries]
            elif isinstance(node, Symlink):
                yield Staged(path, item, "symlink", len(node.target))
            else:
                yield Staged(path, item, "file", node.size if isinstance(node, File) else item.size)


async def _entries_here(reader: Reader, directory: Directory | Shard) -> AsyncIterator[tuple[bytes, Cid]]:
    """The entries of a directory. For a HAMT, those in the nodes that are here."""
    if isinstance(directory, Directory):
        for index, link in enumerate(directory.links):
            if can_hold(link.name) and directory.counts(index):
                yield link.name, link.cid
        return
    shards, entered = [directory], set[Cid]()
    while shards:
        shard = shards.pop()
        for _index, cid, name, _tsize in hamt.slots(shard):
            if name:
                if can_hold(name):
                    yield name, cid
            elif cid not in entered:  # a broken HAMT may have one node twice
                entered.add(cid)
                below = await _node(reader, cid)
                if isinstance(below, Shard):
                    shards.append(below)


async def _node(reader: Reader, cid: Cid) -> Node | None:
    """The node of a block that is staged."""
    block = await reader.staged_block(cid, use=False)
    if block is None:
        return None
    try:
        return await parsed_node(cid, block)
    except (Malformed, Unsupported):
        return None
