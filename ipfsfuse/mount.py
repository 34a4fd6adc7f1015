"""The composition root: builds one mount from its configuration. `_serving` shows every lifetime, innermost last.

Concurrency: everything runs in one trio loop; file bytes are read, hashed and written in its worker threads.
"""

import ctypes
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio

from ipfsfuse import control
from ipfsfuse.cache.folder import hold
from ipfsfuse.cache.folder.isolated import isolated_folder
from ipfsfuse.cache.pins.nodepins import NodePins
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.config import MountConfig
from ipfsfuse.control.commands import Commands
from ipfsfuse.control.server import ControlServer
from ipfsfuse.dag import cid as cids
from ipfsfuse.fuse import mountpoint as mountpoints
from ipfsfuse.fuse import session as sessions
from ipfsfuse.fuse.interrupts import Interrupts
from ipfsfuse.fuse.operations import Operations
from ipfsfuse.fuse.pages import Pages
from ipfsfuse.record import Record
from ipfsfuse.sources.chain.chain import Chain
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http_settings import HttpSettings
from ipfsfuse.sources.opening import opened
from ipfsfuse.sources.parse import Indexing, OpenSettings, with_headers
from ipfsfuse.vfs.roots import Named, Roots
from ipfsfuse.vfs.tree import Tree

log = logging.getLogger("ipfsfuse.mount")

READ_AHEAD_KIB = 4096
"""What root lets the kernel read ahead: 2.2 to 2.7 GB/s instead of 0.3 to 0.7 with its 128."""
HOLD_SECONDS = 30
"""How long a mount that lives while it is held waits for the first to hold it."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Of mallopt(3)."""
TOUCHED = 3 << 20
"""Bytes that the first leaf takes on its way: its pieces, and their sum."""
END_SECONDS = 0.5
"""How long those who use an unmounted mount may go on before they are cut off."""

Ready = Callable[[Path], None]
"""Called once, with the control socket's path, when the mount answers."""


def run(config: MountConfig, ready: Ready, indexing: Indexing | None = None) -> None:
    """Mounts, serves, and returns when the mount is gone, however it ended. Raises the first error that prevents it.

    `indexing` is called from a worker thread, before `ready`, while the index of a CAR file is built that has none."""
    _raise_descriptors()
    _reuse_memory()
    mountpoints.prepare(config.mountpoint)
    try:
        with _folder(config) as folder:
            trio.run(_main, config, folder, ready, indexing)
    finally:
        if config.while_held:
            with suppress(OSError):
                config.mountpoint.rmdir()


def _raise_descriptors() -> None:
    """As many open files as this user may have: late requests hold up to 144 connections, two descriptors each, at each source."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _reuse_memory() -> None:
    """Leaves of 1 MiB come and go: glibc shall not give each back to the kernel, which clears its pages for the next one. A
    tenth of the CPU of a cold read, for 32 MiB that may stay. Other C libraries have no such call."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 << 20)
        libc.mallopt(_M_ARENA_MAX, 1)  # else each worker thread would have memory of its own to be cleared


def _touch_memory() -> None:
    """Has the kernel clear now, and not while the first reader waits, what its leaf needs: 1 ms, a page at a time."""
    _ = b"\1" * TOUCHED


@contextmanager
def _folder(config: MountConfig) -> Iterator[Path]:
    """The cache folder, held for the length of the block."""
    if config.isolated:
        with isolated_folder() as folder:
            yield folder
        return
    with hold.hold(config.cache_dir) as lock:
        lock.announce(os.getpid(), str(config.mountpoint))
        yield config.cache_dir


async def _main(config: MountConfig, folder: Path, ready: Ready, indexing: Indexing | None) -> None:
    async with (
        _serving(config, folder, indexing) as (operations, nursery, server),
        sessions.opened(operations, config.mountpoint, config.allow_other) as session,
    ):
        nursery.start_soon(_end_by_signal, config.mountpoint, nursery.cancel_scope)
        if config.while_held:
            nursery.start_soon(_end_when_let_go, server, config.mountpoint, nursery.cancel_scope)

        def answers() -> None:
            if config.record is None:
                mountpoints.raise_readahead(config.mountpoint, READ_AHEAD_KIB)
            _touch_memory()
            log.info("mounted at %s", config.mountpoint)
            ready(control.socket_path(folder))

        nursery.start_soon(operations.run)
        with operations.storing_pages():
            await sessions.serve(session, answers, readahead=config.record is None)
        log.info("unmounted")
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _serving(config: MountConfig, folder: Path, indexing: Indexing | None) -> AsyncIterator[tuple[Operations, trio.Nursery, ControlServer]]:
    """All that answers behind the kernel, from the sources up."""
    http = with_headers(HttpSettings(), config.header_files, config.sources)
    settings = OpenSettings(config.library, folder / "indexes", http, config.offline, indexing)
    async with AsyncExitStack() as stack:
        sources = await stack.enter_async_context(opened(config.sources, settings))
        chain = Chain(sources, offline=config.offline)
        nodes = {node.name: node.rpc for node in sources if isinstance(node, Kubo)} if config.pins == "kubo" and not config.offline else {}
        pins = await stack.enter_async_context(NodePins.open(nodes, folder / "pins", isolated=config.isolated))
        cache = await stack.enter_async_context(PinsetCache.open(folder, chain, config.budget, deadline=config.deadline, pins=pins))
        pins.settle([kept.cid for kept in cache.kept()], cache.kept_of, cache.pinned(), cache)
        record = stack.enter_context(Record.create(config.record)) if config.record is not None else None
        nursery = await stack.enter_async_context(trio.open_nursery())
        tree = Tree(cache, nursery, record)
        roots = Roots(lambda: _listed(chain, cache), cache.note_root, config.allow)
        interrupts = Interrupts()
        nursery.start_soon(interrupts.run)
        pages = Pages() if record is None else None
        server = ControlServer(Commands(config, cache, chain, pins, tree).table())
        await nursery.start(server.serve, control.socket_path(folder))
        yield Operations(tree, roots, interrupts, pages, config.budget), nursery, server


def _listed(chain: Chain, cache: PinsetCache) -> Iterator[Named]:
    """What the root lists: the sources' roots, what is pinned, what was opened by name and is still staged."""
    for cid in chain.roots():
        yield cid, cids.text(cid)
    yield from cache.named_roots()


async def _end_by_signal(mountpoint: Path, everything: trio.CancelScope) -> None:
    """SIGTERM and SIGINT unmount; where it is busy, lazily, so that the daemon ends in any case."""
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.SIG_IGN)  # what the receiver leaves behind: a second signal must not end the cleaning up
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: unmounting", signal.Signals(number).name)
            await _end(mountpoint, everything)


async def _end_when_let_go(server: ControlServer, mountpoint: Path, everything: trio.CancelScope) -> None:
    with trio.move_on_after(HOLD_SECONDS):
        await server.held.wait()
    await server.until_let_go()
    log.info("nobody holds this mount any more: unmounting")
    await _end(mountpoint, everything)


async def _end(mountpoint: Path, everything: trio.CancelScope) -> None:
    """Unmounts; what then still keeps the mount alive (an open file, another mount namespace) is cut off."""
    if not await sessions.unmount(mountpoint, lazy=False):
        await sessions.unmount(mountpoint, lazy=True)
    await trio.sleep(END_SECONDS)
    everything.cancel()
