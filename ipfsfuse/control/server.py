"""The mount's side of the control socket.

Concurrency: one task for each connection, on the mount's event loop. The commands of one connection run one
after the other, those of different connections concurrently. If the peer closes a connection, its command is
cancelled.
"""

import errno
import json
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ipfsfuse import client
from ipfsfuse.control import MAX_LINE
from ipfsfuse.errors import DaemonFailed, IpfsFuseError, NotAllowed, StoreFailed, UsageError
from ipfsfuse.fileio import threads
from ipfsfuse.fileio.files import Closing

log = logging.getLogger(__name__)

SOCKET_CHECK_SECONDS = 2.0
"""Seconds between two checks whether the socket still exists."""
NO_SOCKET_YET = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOENT})
"""Errnos of a socket that may be made later: the disk is full, or there is no folder yet."""
LONG_LIST = 1000
"""The most items of a list that is encoded on the event loop: some milliseconds."""

Arguments = Mapping[str, Any]
"""The unchecked members of a request besides `command`."""
SendProgress = Callable[[Mapping[str, Any]], Awaitable[None]]
Handler = Callable[[Arguments, SendProgress], Awaitable[Mapping[str, Any]]]
"""(arguments, progress) -> the values of the answer. Raises errors of this project; UsageError for wrong
arguments."""


class ControlServer:
    """Answers `commands`, and counts the connections that hold the mount."""

    def __init__(self, commands: Mapping[str, Handler]) -> None:
        self._commands = commands
        self._allowed = {0, os.getuid()}
        self.holders = 0
        """Open connections that sent `hold`."""
        self.first_holder = trio.Event()
        """Set when the first connection holds the mount."""
        self.released = trio.Event()
        """Set when the last holding connection is closed."""
        self._ending = False

    async def serve(
        self,
        path: Path,
        remake: Callable[[], None] | None = None,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listens at `path` until cancelled. A socket of an earlier run is replaced, since the caller has
        locked the folder. If the socket is deleted, it is made again, and `remake` makes its folder again: so
        the status of a mount without its cache folder can still be read.

        On a full disk, the socket is made when there is room. Raises StoreFailed for any other failure."""
        made = None
        try:
            made = _listen(path)
        except StoreFailed as exc:
            if not isinstance(exc.__cause__, OSError) or exc.__cause__.errno not in NO_SOCKET_YET:
                raise
            log.warning("%s", exc)
        task_status.started()
        async with trio.open_nursery() as connections:
            while True:
                listener, inode = made or await _listen_again(path, remake)
                made = None
                try:
                    await self._listen_while_there(path, listener, connections)
                finally:
                    _remove_own(path, inode)

    async def _listen_while_there(
        self, path: Path, listener: trio.socket.SocketType, connections: trio.Nursery
    ) -> None:
        async with trio.open_nursery() as nursery:
            listeners = [trio.SocketListener(listener)]
            nursery.start_soon(
                partial(trio.serve_listeners, self._connection, listeners, handler_nursery=connections)
            )
            there = True
            while there:
                await trio.sleep(SOCKET_CHECK_SECONDS)
                there = await threads.run_sync(_is_there, path)
            nursery.cancel_scope.cancel()

    async def until_released(self) -> None:
        """Returns when no connection holds the mount. From then on, `hold` is refused."""
        while self.holders:
            await self.released.wait()
            self.released = trio.Event()  # the next holder may have come meanwhile
        self._ending = True

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                uid = client.peer_uid(stream.socket)
                if uid in self._allowed:
                    await self._conversation(stream)
                else:
                    why = f"this mount answers user {os.getuid()} and root alone, not user {uid}"
                    await _send(stream, _refusal(NotAllowed(why)))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer has closed it
        except* Exception:  # a failure ends only its own connection
            log.exception("a connection to the control socket failed")

    async def _conversation(self, stream: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[bytes](0)
        holding = False
        try:
            async with trio.open_nursery() as nursery, receive:
                nursery.start_soon(_pump, stream, send, nursery.cancel_scope)
                async for line in receive:
                    answer = await self._answer(line, stream)
                    if answer is _HELD and not holding:
                        holding = True
                        self.holders += 1
                        self.first_holder.set()
                    await _send(stream, {**answer, "holders": self.holders} if answer is _HELD else answer)
        finally:
            if holding:
                self.holders -= 1
                if not self.holders:
                    self.released.set()

    async def _answer(self, line: bytes, stream: trio.SocketStream) -> Mapping[str, Any]:
        async def progress(values: Mapping[str, Any]) -> None:
            await _send(stream, {"progress": values})

        try:
            command, arguments = _parse(line)
            if command == "hold":
                if self._ending:
                    raise DaemonFailed("this mount is ending, because its last holder has gone: mount again")
                return _HELD
            handler = self._commands.get(command)
            if handler is None:
                raise UsageError(f"{command[:80]!r} is not a command of a mount")
            return {"ok": True, **await handler(arguments, progress)}
        except Exception as exc:  # an error ends only its own command
            return _refusal(exc)


_HELD: Mapping[str, Any] = {"ok": True}


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise UsageError("a request is one JSON object a line") from exc
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise UsageError('a request is a JSON object with a "command"')
    return request.pop("command"), request


def _refusal(exc: BaseException) -> Mapping[str, Any]:
    """The answer for an error. Raises an error of the connection again. Logs an unexpected error."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]  # a nursery wrapped it
    if isinstance(exc, trio.BrokenResourceError | trio.ClosedResourceError):
        raise exc
    if isinstance(exc, IpfsFuseError):
        return {"ok": False, "error": str(exc), "kind": type(exc).__name__}
    log.error("a command of the control socket failed", exc_info=exc)
    return {
        "ok": False,
        "error": f"unexpected error in the mount ({type(exc).__name__}): its log says more",
        "kind": "DaemonFailed",
    }


async def _pump(
    stream: trio.SocketStream, send: trio.MemorySendChannel[bytes], connection: trio.CancelScope
) -> None:
    """Passes on the lines of `stream`. At the end, or at a line that is too long, cancels the connection and
    its command."""
    buffered = bytearray()
    with send:
        async for data in stream:
            buffered += data
            *lines, rest = bytes(buffered).split(b"\n")
            if len(rest) > MAX_LINE:
                break
            buffered = bytearray(rest)
            for line in lines:
                await send.send(line)
    connection.cancel()


async def _send(stream: trio.SocketStream, values: Mapping[str, Any]) -> None:
    long = any(isinstance(value, list) and len(value) > LONG_LIST for value in values.values())
    line = await threads.run_sync(_encoded_by_items, values) if long else _encoded(values)
    await stream.send_all(line.encode() + b"\n")


def _encoded(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _encoded_by_items(values: Mapping[str, Any]) -> str:
    """To be called in a thread. The encoder holds Python's lock for a whole call, so lists are encoded item
    by item."""
    members = (
        (key, f"[{','.join(map(_encoded, value))}]" if isinstance(value, list) else _encoded(value))
        for key, value in values.items()
    )
    return "{" + ",".join(f"{_encoded(key)}:{member}" for key, member in members) + "}"


def _listen(path: Path) -> tuple[trio.socket.SocketType, int]:
    """A listening socket at `path`, and the inode of that file."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_there(path):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise StoreFailed(f"{path} is not a socket: move it elsewhere, or give another --cache-dir")
            path.unlink()
        # the file that bind makes gets the socket's own mode: never open to others
        os.fchmod(listener.fileno(), 0o600)
        with Closing(os.open(path.parent, os.O_PATH | os.O_CLOEXEC)) as folder:
            # an address has at most 108 bytes, and the path may be longer
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        listener.listen(128)
    except (OSError, StoreFailed) as exc:
        listener.close()
        if isinstance(exc, StoreFailed):
            raise
        raise StoreFailed(f"the control socket {path} can't be made: {exc.strerror}") from exc
    return trio.socket.from_stdlib_socket(listener), path.lstat().st_ino


async def _listen_again(path: Path, remake: Callable[[], None] | None) -> tuple[trio.socket.SocketType, int]:
    """Calls `_listen` until it succeeds. If the folder is gone, it is made again first."""
    logged = ""
    while True:
        try:
            if remake is not None:
                await threads.run_sync(remake)
            return _listen(path)
        except StoreFailed as exc:
            if str(exc) != logged:
                logged = str(exc)
                log.info("%s", exc)
            await trio.sleep(SOCKET_CHECK_SECONDS)


def _is_there(path: Path) -> bool:
    """Whether `path` exists. True if that is not known because of an error."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _remove_own(path: Path, inode: int) -> None:
    """Removes the socket, unless another one has replaced it (if the folder was removed and made again)."""
    with suppress(OSError):  # the folder may be gone
        if path.lstat().st_ino == inode:
            path.unlink()
