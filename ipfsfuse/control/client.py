"""Asking a running mount, from another process. Blocking; no trio, so that `ipfsfuse status` starts
quickly."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipfsfuse import errors
from ipfsfuse.control import MAX_ANSWER, short_address

OnProgress = Callable[[dict[str, Any]], None]
Answer = dict[str, Any]


def call(
    socket_path: Path,
    command: str,
    on_progress: OnProgress | None = None,
    *,
    timeout: float | None = None,
    **arguments: object,
) -> Answer:
    """The answer to one command. Raises the domain error that the mount names, and DaemonFailed where nothing
    answers.

    `timeout` is in seconds between two lines of the answer."""
    with connected(socket_path) as connection:
        return ask(connection, command, on_progress, timeout=timeout, **arguments)


@contextmanager
def connected(socket_path: Path) -> Iterator[socket.socket]:
    """A connection, closed at the end of the block: what holds a mount holds one of these."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with short_address(socket_path) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise errors.DaemonFailed(
                f"no mount uses {socket_path.parent}: mount one first (ipfsfuse mount MOUNTPOINT)"
            ) from exc
        except OSError as exc:
            raise errors.DaemonFailed(
                f"the mount of {socket_path.parent} can't be asked: {exc.strerror}"
            ) from exc
        yield connection


def ask(
    connection: socket.socket,
    command: str,
    on_progress: OnProgress | None = None,
    *,
    timeout: float | None = None,
    **arguments: object,
) -> Answer:
    """As `call`, on a connection of the caller's."""
    connection.settimeout(timeout)
    try:
        connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        for reply in _lines(connection):
            if "progress" in reply:
                if on_progress is not None:
                    on_progress(reply["progress"])
            elif reply.pop("ok", False):
                return reply
            else:
                raise _named(reply)
    except TimeoutError as exc:
        raise errors.DaemonFailed(f"the mount did not answer `{command}` within {timeout:g} s") from exc
    except (OSError, ValueError) as exc:
        raise errors.DaemonFailed(f"the mount broke off while it answered `{command}`: {exc}") from exc
    raise errors.DaemonFailed(f"the mount ended before it had answered `{command}`")


def _lines(connection: socket.socket) -> Iterator[Answer]:
    with connection.makefile("rb") as stream:
        while line := stream.readline(MAX_ANSWER):
            reply = json.loads(line)
            if not isinstance(reply, dict):
                raise ValueError("the answer is not a JSON object")
            yield reply


def _named(reply: Answer) -> errors.IpfsFuseError:
    """The domain error that an answer tells of."""
    message = str(reply.get("error", "the mount gave no reason"))
    kind = getattr(errors, str(reply.get("kind")), None)
    if isinstance(kind, type) and issubclass(kind, errors.IpfsFuseError):
        return kind(message)
    return errors.DaemonFailed(message)
