"""The composition root: builds one mount from its configuration. `run` and `_main` open all parts, in the
order in which they depend on each other.

Concurrency: everything runs in one trio loop. Its worker threads read, hash and write the bytes of files.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from ipfsfuse import process
from ipfsfuse.cache.passthrough import PassthroughFiles
from ipfsfuse.cache.pins.kubo_pins import NodePins
from ipfsfuse.cache.pins.lease import MountId
from ipfsfuse.cache.pinset import PinsetCache
from ipfsfuse.cache.store.folder import CacheFolder, isolated_folder, lock_folder
from ipfsfuse.config import MountConfig
from ipfsfuse.content import Names, open_pool
from ipfsfuse.control import live_mounts
from ipfsfuse.control.commands import Commands
from ipfsfuse.control.server import ControlServer
from ipfsfuse.errors import NotFound
from ipfsfuse.fileio import threads
from ipfsfuse.fuse import device, name_links
from ipfsfuse.fuse import mountpoint as mountpoints
from ipfsfuse.fuse import session as sessions
from ipfsfuse.fuse.inodes import Inodes
from ipfsfuse.fuse.open_files import Passthrough
from ipfsfuse.fuse.operations import Operations
from ipfsfuse.record import UseRecord
from ipfsfuse.sources.http.kubo import Kubo
from ipfsfuse.sources.http.settings import FetchQuota, HttpSettings, RateLimit
from ipfsfuse.sources.spec import SourceProgress, with_headers
from ipfsfuse.vfs.tree import Roots, Tree

log = logging.getLogger("ipfsfuse.mount")

READ_AHEAD_KIB = 4096
"""The kernel's read-ahead, which only root can set: 2.2 to 2.7 GB/s instead of 0.3 to 0.7 with the default of
128."""
HOLD_SECONDS = 30
"""How long a mount with --while-held waits for its first holder."""

OPEN_FILES_SECONDS = 0.5
"""After unmounting, programs may use open files for so long."""
UNMOUNT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
"""Signals that unmount."""

Ready = Callable[[Path], None]
"""Called once, with the control socket's path, when the mount answers."""
End = Callable[[], Awaitable[None]]
"""Unmounts."""
Hangup = Callable[[], int | None]
"""Called at each SIGHUP. Returns the new budget; None if it does not change."""


def run(
    config: MountConfig,
    ready: Ready,
    indexing: SourceProgress | None = None,
    hangup: Hangup | None = None,
    reads: Sequence[Path] = (),
    writes: Sequence[Path] = (),
) -> None:
    """Mounts, serves, and returns after the mount has ended. Raises the first error that prevents it.

    While the index of a CAR file is built, `indexing` is called from a worker thread, before `ready`.
    `hangup` is called at each SIGHUP. Without it, SIGHUP unmounts, unless it was ignored when this process
    started. A confined daemon may also read the files `reads` and write the files `writes`, which `hangup`
    and the log need, and files that replace them."""
    process.ignore_signals(hangup is not None)
    deadline, shortened = mountpoints.fitting_deadline(config.deadline)
    if shortened:
        log.warning("%s", shortened)
        config = replace(config, deadline=deadline)
    process.raise_descriptors()
    process.reuse_memory()
    points = [config.mountpoint] if config.ipns is None else [config.mountpoint, config.ipns]
    try:
        with ExitStack() as stack:
            helpers = []
            for point in points:
                mountpoints.prepare(point)
                owner = None if config.user is None else (config.user.uid, config.user.gid)
                ahead = READ_AHEAD_KIB if config.record is None and point == config.mountpoint else 0
                helpers.append(sessions.MountHelper(point, config.allow_other, owner, ahead))
                stack.callback(helpers[-1].close)
            if config.user is not None:
                process.become(config.user, [config.cache_dir])
            cache_dir = stack.enter_context(isolated_folder()) if config.isolated else config.cache_dir
            folder = stack.enter_context(lock_folder(cache_dir))
            folder.announce(os.getpid(), str(config.mountpoint))
            record = None if config.record is None else stack.enter_context(UseRecord.create(config.record))
            confined_by = (
                process.confine(config, folder, reads, writes) if config.confined else "nothing: --unconfined"
            )
            with process.short_collections():
                trio.run(_main, config, folder, record, helpers, confined_by, ready, indexing, hangup)
    finally:
        if config.while_held:
            with suppress(OSError):
                config.mountpoint.rmdir()


async def _main(
    config: MountConfig,
    folder: CacheFolder,
    record: UseRecord | None,
    helpers: Sequence[sessions.MountHelper],
    confined_by: str,
    ready: Ready,
    indexing: SourceProgress | None,
    hangup: Hangup | None,
) -> None:
    """Opens everything that answers the kernel's requests, from the sources up, and runs until the mount has
    ended."""
    rate = None if config.bwlimit is None else RateLimit(config.bwlimit)
    quota = None if config.max_fetch is None else FetchQuota(config.max_fetch)
    http = with_headers(HttpSettings(rate=rate, quota=quota), config.header_files, config.sources)
    async with AsyncExitStack() as stack:
        sources, pool = await stack.enter_async_context(open_pool(config, folder, http, indexing))
        nodes = [source for source in sources if isinstance(source, Kubo)]
        if config.allow is None:  # else blocks of CIDs that are not allowed would be read
            repositories = [node.blocks for node in nodes if node.blocks]
            listener = repositories[0].files.name_listener if repositories else None
            stack.enter_context(device.listening(listener))
        rpcs = {node.name: node.rpc for node in nodes if config.pins == "kubo" and not config.offline}
        mount_id = await threads.run_sync(MountId.open, folder.path)
        pins = await stack.enter_async_context(NodePins.open(rpcs, mount_id, isolated=config.isolated))
        cache = await stack.enter_async_context(
            PinsetCache.open(
                folder.path, pool, config.budget, deadline=config.deadline, pins=pins, reserve=config.reserve
            )
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_reconcile, pins, cache)
        tree = Tree(cache.reader, nursery, record)
        roots = Roots(pool.roots, cache.named_roots, cache.names.note, config.allow)
        inodes = Inodes(await threads.run_sync(folder.inode_key))
        names = Names(folder.path, sources, http, config, stack)
        passthrough, passed = None, None
        if config.passthrough:
            passed = PassthroughFiles(cache.store, cache.reader)
            stack.callback(passed.close_all)
            nursery.start_soon(passed.run)
            passthrough = Passthrough(passed)
        operations = Operations(
            tree,
            roots,
            inodes,
            lambda: cache.store.budget.configured,
            config.deadline,
            push=record is None,
            owner=(config.uid, config.gid),
            umask=config.umask,
            passthrough=passthrough,
        )
        commands = Commands(
            config, cache, pool, pins, tree, names, passed, quota, operations.latencies, operations.bytes
        )
        server = ControlServer(commands.table())
        await nursery.start(server.serve, folder.control, folder.remake)
        if config.ipns is not None:
            await names.resolver()  # reports wrong settings before anything is mounted
        session = stack.enter_context(
            sessions.open_session(operations, helpers[0], config.record is None, config.passthrough)
        )
        end = partial(_end, helpers[0], nursery.cancel_scope)
        if config.ipns is not None:
            await stack.enter_async_context(_open_names_mount(config, helpers[1], names, end))
            stack.enter_context(live_mounts.register(config.ipns, folder.control))
        notifier = Notifier()
        nursery.start_soon(_heed_signals, end, hangup, commands, notifier)
        if config.while_held:
            nursery.start_soon(_end_when_released, server, end)
        stack.enter_context(live_mounts.register(config.mountpoint, folder.control))
        nursery.start_soon(operations.files.run)
        async with trio.open_nursery() as serving:
            if await serving.start(sessions.serve, session):
                if passthrough is not None:
                    passthrough.check(session.device.passes_through)
                if config.record is None:
                    mountpoints.raise_readahead(config.mountpoint, READ_AHEAD_KIB)
                process.touch_memory()
                if config.user is not None:
                    log.info("the daemon goes on as user %s", config.user.name)
                elif os.geteuid() == 0:
                    log.info("the daemon stays root: --user NAME lets it go on as another user")
                log.info("the daemon is confined by %s", confined_by)
                log.info("mounted at %s", config.mountpoint)
                ready(folder.control)
                notifier.send("READY=1", f"STATUS=mounted at {config.mountpoint}")
                nursery.start_soon(notifier.run, commands.in_one_line)
                nursery.start_soon(commands.measure_lag)
        log.info("unmounted")
        operations.files.drain()
        notifier.send("STOPPING=1")
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _open_names_mount(
    config: MountConfig, helper: sessions.MountHelper, names: Names, ended: End
) -> AsyncIterator[None]:
    """Mounts a folder of names, which are symlinks into the main mount."""

    async def target(name: bytes) -> tuple[bytes, float]:
        try:
            text = name.decode()
        except UnicodeDecodeError as exc:
            raise NotFound(f"{name[:80]!r} is not a name") from exc
        found = await (await names.resolver()).resolve_text(text)
        return os.fsencode(config.mountpoint) + bytes(found.path).removeprefix(b"/ipfs"), found.until

    def listed() -> Sequence[bytes]:
        return [name.encode() for name in names.resolved_names()]

    async with name_links.open_mount(helper, target, listed, config.deadline, ended):
        log.info("names are at %s", helper.mountpoint)
        yield


async def _reconcile(pins: NodePins, cache: PinsetCache) -> None:
    """Tells the nodes which pins are desired, according to the pinset and the files of earlier runs."""
    staged = [kept.cid for kept in await cache.store.listed()] if pins.anywhere else []
    pins.reconcile(staged, cache.pinned.roots, cache.store.item_of, cache)


# -- signals, and the service manager ------------------------------------------------------------------------


STATUS_INTERVAL = 30.0


class Notifier:
    """Tells systemd the state of the service (sd_notify(3)): ready, reloading, stopping, alive. Sends nothing
    if NOTIFY_SOCKET is not set."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
        usec = os.environ.get("WATCHDOG_USEC", "")
        self._watchdog = int(usec) / 1e6 if usec.isdecimal() and pid == str(os.getpid()) else None

    def send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as exc:
            log.warning("the service manager can't be reached: %s", exc.strerror)

    async def run(self, status: Callable[[], str]) -> None:
        """Reports now and then that the event loop is alive, and the `status`."""
        if not self._address:
            return
        seconds = STATUS_INTERVAL if self._watchdog is None else min(self._watchdog / 2, STATUS_INTERVAL)
        while True:
            self.send("WATCHDOG=1", f"STATUS={status()}")
            await trio.sleep(seconds)


async def _heed_signals(end: End, hangup: Hangup | None, commands: Commands, notifier: Notifier) -> None:
    """Unmounts at a signal of UNMOUNT_SIGNALS. A busy mount is unmounted lazily, so that the daemon ends
    in any case. SIGUSR1 logs the status. SIGHUP reloads."""
    heeded = {*UNMOUNT_SIGNALS, signal.SIGUSR1}
    if hangup is not None or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        heeded.add(signal.SIGHUP)
    early: list[int] = []
    for each in heeded:
        signal.signal(each, lambda number, _frame: early.append(number))
    with _ignored_afterwards(heeded), trio.open_signal_receiver(*heeded) as signals:
        for number in early:  # came before there was a receiver
            signal.raise_signal(number)
        async for number in signals:
            if number == signal.SIGUSR1:
                log.info("%s", commands.in_one_line())
            elif number == signal.SIGHUP and hangup is not None:
                log.info("SIGHUP")
                notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
                budget = hangup()
                if budget is not None:
                    await commands.resize(budget)
                notifier.send("READY=1")
            else:
                log.info("%s: unmounting", signal.Signals(number).name)
                notifier.send("STOPPING=1")
                await end()


@contextmanager
def _ignored_afterwards(numbers: Iterable[int]) -> Iterator[None]:
    """Ignores the signals after the block, so that a second signal does not end the cleanup."""
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


async def _end_when_released(server: ControlServer, end: End) -> None:
    with trio.move_on_after(HOLD_SECONDS):
        await server.first_holder.wait()
    await server.until_released()
    log.info("the last holder of this mount has gone: unmounting")
    await end()


async def _end(helper: sessions.MountHelper, everything: trio.CancelScope) -> None:
    """Unmounts. Ends all requests OPEN_FILES_SECONDS later, even if an open file or another mount namespace
    still uses the mount."""
    await helper.unmount()
    await trio.sleep(OPEN_FILES_SECONDS)
    log.info("unmounted, while it was still in use: open files and other mount namespaces get errors now")
    everything.cancel()
