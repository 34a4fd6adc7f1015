"""Serves a cache folder and the library over HTTP: directly, or through the mount that uses the folder.

hypercorn implements HTTP. It bounds heads, queues and requests, but neither the number of connections nor the
time that a client takes to read: it waits for a slow client even when it is cancelled. So connections are
accepted here, and each is a stream with time limits.

Concurrency: one trio loop. Worker threads ask the mount.
"""

import base64
import logging
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from ipfsfuse import __version__, client, content
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.config import ContentConfig
from ipfsfuse.content import WholeBlocks
from ipfsfuse.control.server import Arguments, ControlServer, SendProgress
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import DaemonFailed, Unavailable, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.serve.app import SEND_BYTES, SEND_SECONDS, TrustlessGateway
from ipfsfuse.sources.names.record import KeyName

log = logging.getLogger("ipfsfuse.serve")

ASKED_AT_ONCE: Final = 16
"""The most commands to a mount at a time."""

Ready = Callable[[Sequence[str]], None]
"""Called once, with the URLs, when the server is ready."""


def run(
    config: ContentConfig, host: str, port: int, fetch: bool, allowed: Sequence[str], ready: Ready
) -> None:
    """Serves until SIGTERM or SIGINT, also under the host names `allowed`. Raises the error that prevents
    it."""
    if cache_folder.is_free(config.cache_dir):
        with cache_folder.lock_folder(config.cache_dir) as folder:
            folder.announce(os.getpid(), "ipfsfuse serve")
            trio.run(_serve, partial(_own, config, folder), host, port, fetch, allowed, ready)
    else:
        trio.run(_serve, partial(_of_mount, config), host, port, fetch, allowed, ready)


async def _serve(
    opened: Any, host: str, port: int, fetch: bool, allowed: Sequence[str], ready: Ready
) -> None:
    listeners = await listen(host, port)
    only = hosts([each.socket.getsockname()[0] for each in listeners], allowed)
    urls = addresses(listeners)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with opened(fetch, urls, only) as app:

            async def ending() -> None:
                log.info("serving at %s", ", ".join(urls))
                ready(urls)
                async for number in signals:
                    log.info("%s: ending", signal.Signals(number).name)
                    return

            await serve(app, listeners, ending)


# -- by itself -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _own(
    config: ContentConfig,
    folder: cache_folder.CacheFolder,
    fetch: bool,
    urls: Sequence[str],
    only: Sequence[str] | None,
) -> AsyncIterator[TrustlessGateway]:
    started = time.clock_gettime(time.CLOCK_BOOTTIME)
    async with content.open_content(config, folder) as here, trio.open_nursery() as nursery:
        blocks = WholeBlocks(here.cache.reader, here.pool)
        app = TrustlessGateway(blocks.get, here.names.record, fetch=fetch, hosts=only)

        async def status(_arguments: Arguments, _progress: SendProgress) -> Mapping[str, Any]:
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
    """Gets blocks and records from the mount that uses the cache folder, through its control socket."""

    def __init__(self, control: Path, deadline: float) -> None:
        self._control, self._deadline = control, deadline
        self._limiter = trio.CapacityLimiter(ASKED_AT_ONCE)

    async def block(self, cid: Cid, fetch: bool) -> bytes:
        return await self._ask("block", cid=cids.text(cid), fetch=fetch, serving=True)

    async def record(self, name: KeyName, fetch: bool) -> bytes:
        return await self._ask("record", name=str(name), fetch=fetch)

    async def _ask(self, command: str, **arguments: Any) -> bytes:
        """Raises the error that the mount names, Unavailable if it does not answer."""
        call = partial(client.call, self._control, command, timeout=self._deadline + 5, **arguments)
        try:
            answer = await threads.run_sync(call, limiter=self._limiter, abandon_on_cancel=True)
            return base64.b64decode(answer["data"])
        except DaemonFailed as exc:
            raise Unavailable(str(exc)) from exc


@asynccontextmanager
async def _of_mount(
    config: ContentConfig, fetch: bool, _urls: Sequence[str], only: Sequence[str] | None
) -> AsyncIterator[TrustlessGateway]:
    control = cache_folder.socket_path(config.cache_dir)
    await threads.run_sync(partial(client.call, control, "status", timeout=config.deadline))
    mounted = MountContent(control, config.deadline)
    yield TrustlessGateway(mounted.block, mounted.record, fetch=fetch, hosts=only)


# -- connections ---------------------------------------------------------------------------------------------

MAX_CONNECTIONS: Final = 256
"""More connections wait in the kernel until one of these ends."""
BACKLOG: Final = 128
HEAD_SECONDS: Final = 60.0
"""The most seconds from the first byte of a request to the first byte of its answer."""
IDLE_CONNECTION_SECONDS: Final = 15.0
"""The most seconds between two requests on one connection."""
ANSWER_END_SECONDS: Final = 3.0
"""When the server ends, open answers may continue for so long."""
MAX_HEAD: Final = 16 << 10


async def listen(host: str, port: int) -> list[trio.SocketListener]:
    """Listens at an address. Raises UsageError if that is not possible."""
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(f"--listen {host}:{port}: {reason}") from exc


def hosts(listening: Sequence[str], allowed: Sequence[str]) -> Sequence[str] | None:
    """The host names for a server that listens at those addresses; None for any name. If only this machine
    can reach the server, web pages in a browser here must not reach it under names of their own."""
    return allowed if allowed or all(ip_address(each).is_loopback for each in listening) else None


def addresses(listeners: list[trio.SocketListener]) -> list[str]:
    """The URLs of the listeners."""
    found = []
    for listener in listeners:
        host, port = listener.socket.getsockname()[:2]
        found.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    return found


async def serve(
    app: Any, listeners: list[trio.SocketListener], ending: Callable[[], Awaitable[None]]
) -> None:
    """Serves `app` until `ending` returns. Then open answers have ANSWER_END_SECONDS to finish."""
    config = Config()
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.h11_max_incomplete_size = config.h2_max_header_list_size = MAX_HEAD
    config.h2_max_concurrent_streams = 32
    config.keep_alive_timeout = IDLE_CONNECTION_SECONDS
    context = WorkerContext(None)
    wrapped = wrap_app(app, 0, "asgi")
    streams = set[_Connection]()
    free_connections = trio.Semaphore(MAX_CONNECTIONS)
    all_ended = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        connection = _Connection(stream)
        streams.add(connection)
        try:
            await TCPServer(wrapped, config, context, ConnectionState({}), connection)  # type: ignore[arg-type]
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:  # a failure ends only its own connection
            log.exception("a connection failed")
        finally:
            streams.discard(connection)
            await trio.aclose_forcefully(stream)
            free_connections.release()
            if not streams:
                all_ended.set()

    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                bounded = _BoundedListener(listener, free_connections)
                accepting.start_soon(
                    partial(trio.serve_listeners, handle, [bounded], handler_nursery=connections)
                )
            await ending()
            accepting.cancel_scope.cancel()
        await context.terminated.set()
        if streams:
            all_ended = trio.Event()
            with trio.move_on_after(ANSWER_END_SECONDS):
                await all_ended.wait()
        for connection in list(streams):
            await trio.aclose_forcefully(connection)
        connections.cancel_scope.cancel()


class _BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection when fewer than MAX_CONNECTIONS are open."""

    def __init__(self, listener: trio.SocketListener, free_connections: trio.Semaphore) -> None:
        self._listener, self._free_connections = listener, free_connections

    async def accept(self) -> trio.SocketStream:
        await self._free_connections.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self._free_connections.release()
            raise

    async def aclose(self) -> None:
        await self._listener.aclose()


class _Connection(trio.abc.HalfCloseableStream):
    """A client's connection. It fails if the client is too slow to send its request or to read the answer."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._head_began: float | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = None
        while data is None:
            began = self._head_began
            with trio.CancelScope(deadline=math.inf if began is None else began + HEAD_SECONDS):
                data = await self._stream.receive_some(max_bytes)
            if data is None and self._head_began == began:  # else an answer was begun meanwhile
                raise trio.BrokenResourceError("a request was not sent in time")
        if self._head_began is None:
            self._head_began = trio.current_time()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._head_began = None
        view = memoryview(data)
        for at in range(0, len(view), SEND_BYTES):
            with trio.CancelScope(deadline=trio.current_time() + SEND_SECONDS) as scope:
                await self._stream.send_all(view[at : at + SEND_BYTES])
            if scope.cancelled_caught:
                raise trio.BrokenResourceError("the client reads too slowly")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()
