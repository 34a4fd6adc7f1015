"""A cache folder and sources opened together, without a mount: what `serve` and the Python interface read
from. Also whole blocks and names, which a mount gives by its control socket.

Concurrency: everything runs in one trio loop.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipfsfuse.cache.base import FileRef
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.reader import Reader
from ipfsfuse.cache.store.folder import CacheFolder
from ipfsfuse.cache.store.records import NameRecords
from ipfsfuse.config import ContentConfig
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import file_layout, nodes
from ipfsfuse.dag import path as paths
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import File, Leaf, Node
from ipfsfuse.dag.path import IpfsPath
from ipfsfuse.errors import IpfsFuseError, Malformed, NotHere, Unsupported
from ipfsfuse.fileio import threads
from ipfsfuse.sources.base import Source
from ipfsfuse.sources.http.gateway import Gateway
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.settings import HttpSettings
from ipfsfuse.sources.pool.pool import SourcePool
from ipfsfuse.sources.spec import OpenSettings, SourceProgress, open_sources, with_headers
from ipfsfuse.structures import Buffer

if TYPE_CHECKING:
    from ipfsfuse.sources.names.record import KeyName
    from ipfsfuse.sources.names.resolver import Resolver


@dataclass(frozen=True, slots=True)
class Content:
    """The parts that are open."""

    cache: PinsetCache
    pool: SourcePool
    names: "Names"


@asynccontextmanager
async def open_content(config: ContentConfig, folder: CacheFolder) -> AsyncIterator[Content]:
    """Opens the cache in `folder`, which the caller has locked, with the sources of `config`.

    Raises StoreFailed, SourceFailed, UsageError."""
    http = with_headers(HttpSettings(), config.header_files, config.sources)
    async with AsyncExitStack() as stack:
        sources, pool = await stack.enter_async_context(open_pool(config, folder, http))
        cache = await stack.enter_async_context(
            PinsetCache.open(
                folder.path, pool, config.budget, deadline=config.deadline, reserve=config.reserve
            )
        )
        names = Names(folder.path, sources, http, config, stack)
        yield Content(cache, pool, names)


@asynccontextmanager
async def open_pool(
    config: ContentConfig, folder: CacheFolder, http: HttpSettings, indexing: SourceProgress | None = None
) -> AsyncIterator[tuple[Sequence[Source], SourcePool]]:
    """Opens the sources of `config`, and a pool of them. Raises SourceFailed, UsageError."""
    settings = OpenSettings(
        config.library,
        folder.indexes,
        http,
        config.offline,
        indexing,
        config.routers,
        config.allow_private_providers,
    )
    async with open_sources(config.sources, settings) as sources:
        yield sources, SourcePool(sources, offline=config.offline, deadline=config.deadline)


class Names:
    """The records and the resolver of names. They are made at their first use, since their imports take
    0.1 s."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        http: HttpSettings,
        config: ContentConfig,
        stack: AsyncExitStack,
    ) -> None:
        """`folder` is the cache folder. `stack` closes everything that is opened here."""
        self._folder, self._sources, self._http = folder, sources, http
        self._config, self._stack = config, stack
        self._store: NameRecords | None = None
        self._resolver: Resolver | None = None

    async def resolver(self) -> "Resolver":
        """Raises StoreFailed, UsageError."""
        if self._resolver is None:
            from ipfsfuse.sources.names.resolver import Resolver, open_dns
            from ipfsfuse.sources.routing import open_routers

            config = self._config
            dns = None if config.offline else open_dns(config.dns, self._http)
            if dns is not None:
                self._stack.push_async_callback(dns.aclose)
            routers = open_routers(() if config.offline else config.routers, self._http)
            for router in routers:
                self._stack.push_async_callback(router.aclose)
            sources = [each for each in self._sources if isinstance(each, Gateway | Kubo)]
            self._resolver = Resolver([*sources, *routers], self._records(), dns, seconds=config.deadline)
        return self._resolver

    def _records(self) -> NameRecords:
        if self._store is None:
            self._store = NameRecords(self._folder)
            self._stack.callback(self._store.close)
        return self._store

    async def path_of(self, text: str) -> IpfsPath:
        """The path in `text`. An IPNS name is resolved. Raises NotACid, NotFound, Unavailable, UsageError."""
        named = paths.split_ipns(text)
        if named is None:
            return paths.parse(text)
        found = (await (await self.resolver()).resolve_text(named[0])).path
        return IpfsPath(found.root, found.names + named[1])

    def resolved_names(self) -> Sequence[str]:
        """The names that were resolved lately."""
        return self._resolver.resolved_names() if self._resolver is not None else ()

    async def record(self, name: "KeyName", fetch: bool) -> bytes:
        """The newest record of `name`. Without `fetch`: the newest stored one, unverified.

        Raises NotHere, Unavailable, StoreFailed."""
        if fetch:
            return (await (await self.resolver()).newest(name))[0].data
        data = await threads.run_sync(self._records().get, str(name))
        if data is None:
            raise NotHere(f"no record of {name} is here")
        return data


# -- whole blocks --------------------------------------------------------------------------------------------

MAX_POSITIONS = 100_000
"""Children of file nodes for which the place is remembered, in some 30 MB: enough for 100 GB of a file in
leaves of 1 MiB."""


class WholeBlocks:
    """Gives whole blocks for receipts, `ipfsfuse export` and `ipfsfuse serve`, even if only their content is
    kept.

    A staging file holds a file's content, and no list of its leaves. But a caller that asks for a leaf has
    asked for its parents before, and the parents have the places of their children."""

    def __init__(self, cache: Reader, pool: SourcePool) -> None:
        self._cache, self._pool = cache, pool
        self._positions: dict[Cid, tuple[FileRef, Leaf]] = {}

    async def get(self, cid: Cid, fetch: bool) -> bytes:
        """The verified block of `cid`. Without `fetch`, raises NotHere if the block is neither staged nor in
        a source in place. With `fetch`, raises the errors of `Cache.block`."""
        known = self._positions.get(cids.canonical(cid))
        block = None if known is None else await self._staged(*known, fetch)
        if block is None:
            block = await (self._cache.block(cid, early=True) if fetch else self._here(cid))
        if cids.codec(cid) == cids.DAG_PB:
            node = await threads.run_sync(_parsed, cid, block)
            if isinstance(node, File):
                self._note(node)
        return block

    async def _here(self, cid: Cid) -> bytes:
        """Raises NotHere."""
        block = await self._cache.staged_block(cid)
        if block is None:
            block = await self._pool.get_in_place(cid)
        if block is None:
            raise NotHere(f"{cids.brief(cid)} is not here")
        return block

    async def _staged(self, file: FileRef, leaf: Leaf, fetch: bool) -> bytes | None:
        """The block of a leaf, made from its content. None if it is not a leaf, or has an unusual form."""
        content: Buffer | None
        try:
            content = await (
                self._cache.leaf(file, leaf, early=True) if fetch else self._cache.store.leaf(file, leaf)
            )
        except IpfsFuseError:
            return None
        if content is None:
            return None
        return await threads.run_sync(file_layout.leaf_block, leaf.cid, content)

    def _note(self, node: File) -> None:
        """Remembers the places of its children."""
        own = cids.canonical(node.cid)
        file, at = self._positions.get(own, (FileRef(own, node.size), Leaf(own, 0, node.size)))
        if at.size != node.size:  # its parent claims another size: children may be beyond the file's end
            file, at = FileRef(own, node.size), Leaf(own, 0, node.size)
        for child in node.children:
            self._positions.setdefault(
                cids.canonical(child.cid), (file, Leaf(child.cid, at.offset + child.offset, child.size))
            )
        while len(self._positions) > MAX_POSITIONS:
            del self._positions[next(iter(self._positions))]


def _parsed(cid: Cid, block: bytes) -> Node | None:
    """The node of `block`; None if it is not UnixFS and so has no leaves."""
    try:
        return nodes.parse(cid, block)
    except (Malformed, Unsupported):
        return None
