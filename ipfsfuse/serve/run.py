"""Serves a cache folder and the library: by itself, or through the mount that uses the folder.

Concurrency: one trio loop; a mount is asked in worker threads.
"""

import base64
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from ipfsfuse import __version__, client, content
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.config import ContentConfig
from ipfsfuse.control.blocks import WholeBlocks
from ipfsfuse.control.server import Arguments, ControlServer, Progress
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import DaemonFailed, Unavailable
from ipfsfuse.fileio import threads
from ipfsfuse.serve import server
from ipfsfuse.serve.app import Content, TrustlessGateway
from ipfsfuse.sources.names.record import KeyName

log = logging.getLogger("ipfsfuse.serve")

ASKED_AT_ONCE: Final = 16
"""Questions to a mount."""

Ready = Callable[[Sequence[str]], None]
"""Called once, with the URLs, when requests are answered."""


def run(config: ContentConfig, host: str, port: int, fetch: bool, ready: Ready) -> None:
    """Serves until SIGTERM or SIGINT. Raises what prevents it."""
    if cache_folder.is_free(config.cache_dir):
        with cache_folder.locked(config.cache_dir) as folder:
            folder.announce(os.getpid(), "ipfsfuse serve")
            trio.run(_serve, partial(_own, config, folder), host, port, fetch, ready)
    else:
        trio.run(_serve, partial(_of_mount, config), host, port, fetch, ready)


async def _serve(opened: Any, host: str, port: int, fetch: bool, ready: Ready) -> None:
    listeners = await server.listen(host, port)
    urls = server.addresses(listeners)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with opened(fetch, urls) as app:

            async def ending() -> None:
                log.info("serving at %s", ", ".join(urls))
                ready(urls)
                async for number in signals:
                    log.info("%s: ending", signal.Signals(number).name)
                    return

            await server.serve(app, listeners, ending)


# -- by itself -----------------------------------------------------------------------------------------------


class OwnContent:
    """What this process has opened itself."""

    def __init__(self, here: content.Content) -> None:
        self._blocks = WholeBlocks(here.cache.reader, here.pool)
        self._names = here.names

    async def block(self, cid: Cid, *, fetch: bool) -> bytes:
        return await self._blocks.get(cid, fetch=fetch)

    async def record(self, name: KeyName, *, fetch: bool) -> bytes:
        return await self._names.record(name, fetch=fetch)


@asynccontextmanager
async def _own(
    config: ContentConfig, folder: cache_folder.CacheFolder, fetch: bool, urls: Sequence[str]
) -> AsyncIterator[TrustlessGateway]:
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    async with content.opened(config, folder) as here, trio.open_nursery() as nursery:
        app = TrustlessGateway(OwnContent(here), fetch=fetch)

        async def status(_arguments: Arguments, _progress: Progress) -> Mapping[str, Any]:
            trouble = here.cache.trouble
            return {
                "version": __version__,
                "health": "degraded" if trouble else "healthy",
                "reasons": [trouble] if trouble else [],
                "pid": os.getpid(),
                "mountpoint": None,
                "cache_dir": str(config.cache_dir),
                "offline": config.offline,
                "uptime": round(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 1),
                "cache": asdict(here.cache.statistics()),
                "pins": {},
                "sources": [asdict(source) for source in here.pool.statistics()],
                "listening": list(urls),
                "served": asdict(app.served),
            }

        control = ControlServer({"status": status})
        await nursery.start(control.serve, folder.control, folder.remake)
        yield app
        nursery.cancel_scope.cancel()


# -- through the mount that uses the folder ------------------------------------------------------------------


class MountContent:
    """What the mount that uses the cache folder has. It is asked through its control socket."""

    def __init__(self, control: Path, deadline: float) -> None:
        self._control, self._deadline = control, deadline
        self._limiter = trio.CapacityLimiter(ASKED_AT_ONCE)

    async def block(self, cid: Cid, *, fetch: bool) -> bytes:
        return await self._ask("block", cid=cids.text(cid), fetch=fetch, serving=True)

    async def record(self, name: KeyName, *, fetch: bool) -> bytes:
        return await self._ask("record", name=str(name), fetch=fetch)

    async def _ask(self, command: str, **arguments: Any) -> bytes:
        """Raises the domain error that the mount names, Unavailable where it does not answer."""
        call = partial(client.call, self._control, command, timeout=self._deadline + 5, **arguments)
        try:
            answer = await threads.run_sync(call, limiter=self._limiter, abandon_on_cancel=True)
            return base64.b64decode(answer["data"])
        except DaemonFailed as exc:
            raise Unavailable(str(exc)) from exc


@asynccontextmanager
async def _of_mount(
    config: ContentConfig, fetch: bool, _urls: Sequence[str]
) -> AsyncIterator[TrustlessGateway]:
    control = cache_folder.socket_path(config.cache_dir)
    await threads.run_sync(partial(client.call, control, "status", timeout=config.deadline))
    mounted: Content = MountContent(control, config.deadline)
    yield TrustlessGateway(mounted, fetch=fetch)
