"""Sends commands to a running mount, from another process. The command line and the runner use it.

The calls block. The module is quick to import: it needs no trio, pyfuse3, httpx or wasmtime.
`ipfsfuse.control` describes the protocol.
"""

import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol, Self

from ipfsfuse import errors

MAX_ANSWER = 1 << 30
"""The most bytes of one line of an answer: `ls` of some millions of files, 250 bytes each."""

OnProgress = Callable[[dict[str, Any]], None]
Answer = dict[str, Any]
StrPath = str | os.PathLike[str]
"""To import pathlib takes 3 ms, and a runner that starts often would wait for it."""


class Socket(Protocol):
    """A socket of the standard library, or of trio."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


class Connection:
    """A connection to the daemon that listens at `path`. Use it as a context manager, or `release` it.

    Raises DaemonFailed if no process listens, MountFailed if one of another user does. Root may connect to
    the mounts of other users."""

    def __init__(self, path: StrPath, folder: int | None = None, timeout: float | None = None) -> None:
        """`folder` is a descriptor of the folder of `path`, if the caller has checked that folder. `timeout`
        is in seconds, for each line of an answer."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        opened = folder
        parent, name = os.path.split(path)
        try:
            if opened is None:
                opened = os.open(parent or ".", os.O_PATH | os.O_CLOEXEC)
            # an address has at most 108 bytes, and the path may be longer
            self.socket.connect(f"/proc/self/fd/{opened}/{name}")
            user = peer_uid(self.socket)
            if user != os.geteuid() and (folder is not None or os.geteuid() != 0):
                raise errors.MountFailed(
                    f"user {user} listens at {path}, not you: give --cache-dir a folder of your own"
                )
        except BaseException as exc:
            self.socket.close()
            if isinstance(exc, FileNotFoundError | ConnectionRefusedError):
                raise errors.DaemonFailed(
                    f"no mount uses {parent}: mount one first (ipfsfuse mount MOUNTPOINT)"
                ) from exc
            if isinstance(exc, OSError):
                raise errors.DaemonFailed(
                    f"the mount of {parent} can't be asked: {exc.strerror or exc}"
                ) from exc
            raise
        finally:
            if folder is None and opened is not None:
                os.close(opened)
        self._lines = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def fileno(self) -> int:
        return self.socket.fileno()

    def ask(self, command: str, on_progress: OnProgress | None = None, /, **arguments: object) -> Answer:
        """Sends one command and returns its answer.

        Raises the error that the mount names, and DaemonFailed if it does not answer."""
        try:
            self.socket.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            while line := self._lines.readline(MAX_ANSWER):
                reply = json.loads(line)
                if not isinstance(reply, dict):
                    raise ValueError("the answer is not a JSON object")
                if "progress" in reply:
                    if on_progress is not None:
                        on_progress(reply["progress"])
                elif reply.pop("ok", False):
                    return reply
                else:
                    raise _error(reply)
        except TimeoutError as exc:
            waited = self.socket.gettimeout()
            raise errors.DaemonFailed(f"the mount did not answer `{command}` within {waited:g} s") from exc
        except (OSError, ValueError, RecursionError) as exc:
            raise errors.DaemonFailed(f"the mount broke off while it answered `{command}`: {exc}") from exc
        raise errors.DaemonFailed(f"the mount ended before it had answered `{command}`")

    def hold(self) -> int:
        """Holds the mount until this connection is closed. Returns how many connections hold it now."""
        return int(self.ask("hold").get("holders", 1))

    def release(self) -> bool:
        """Closes the connection, so that it no longer holds the mount. True if no other connection holds it:
        then a mount with --while-held ends."""
        try:
            return self.hold() == 1
        except errors.IpfsFuseError:
            return True
        finally:
            self.close()


def call(
    path: StrPath,
    command: str,
    on_progress: OnProgress | None = None,
    /,
    *,
    timeout: float | None = None,
    **arguments: object,
) -> Answer:
    """Opens a connection, sends one command with `Connection.ask`, and closes the connection."""
    with Connection(path, timeout=timeout) as connection:
        return connection.ask(command, on_progress, **arguments)


def peer_uid(connected: Socket) -> int:
    """The user at the other end (SO_PEERCRED, unix(7))."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _error(reply: Answer) -> errors.IpfsFuseError:
    """The domain error that an answer names."""
    message = str(reply.get("error", "the mount gave no reason"))
    kind = getattr(errors, str(reply.get("kind")), None)
    if isinstance(kind, type) and issubclass(kind, errors.IpfsFuseError):
        return kind(message)
    return errors.DaemonFailed(message)
