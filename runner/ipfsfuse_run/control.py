"""A held connection to a mount's daemon: JSON lines over its Unix socket, one answer to each command."""

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from ipfsfuse.errors import DaemonFailed, MountFailed, Unavailable

_ANSWER_S = 40.0
"""Longer than any deadline that the daemon has by default: it answers late, or it is gone."""


class Control:
    """Holds the mount from its making until `release`, or until this process ends in whatever way."""

    def __init__(self, folder: int, path: Path) -> None:
        """The socket of `path`'s name in the open `folder`; `path` itself is for messages.

        Raises DaemonFailed where nobody listens there, MountFailed where another user does."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_ANSWER_S)
            # a socket's address ends after 108 bytes
            self._socket.connect(f"/proc/self/fd/{folder}/{path.name}")
            user = _listener(self._socket)
        except OSError as exc:
            self._socket.close()
            raise DaemonFailed(f"no mount answers at {path}: {exc.strerror or exc}") from exc
        if user != os.geteuid():
            self._socket.close()
            raise MountFailed(
                f"user {user} listens at {path}, not you: give --cache-dir a folder of your own"
            )
        self._lines = self._socket.makefile("rb")
        self._hold()

    def _hold(self) -> int:
        return int(self.ask("hold").get("holders", 1))

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, command: str, **arguments: str) -> dict[str, Any]:
        """Raises Unavailable where the mount has tried and no source had it, DaemonFailed for any other
        refusal and for no answer."""
        try:
            self._socket.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._lines.readline() or b"{}")
        except (OSError, ValueError, RecursionError) as exc:
            raise DaemonFailed(f"the mount's daemon did not answer {command}: {exc}") from exc
        if not answer.get("ok", False):
            answer = answer or {"error": "it is gone"}
            failure = Unavailable if answer.get("kind") == Unavailable.__name__ else DaemonFailed
            raise failure(f"the mount's daemon refused {command}: {answer.get('error')}")
        return answer

    def release(self) -> bool:
        """Lets the mount go, and says whether nobody else held it: one of --while-held then ends."""
        try:
            last = self._hold() == 1
        except DaemonFailed:
            last = True
        self._lines.close()
        self._socket.close()
        return last


def _listener(connected: socket.socket) -> int:
    """The user who listens at the other end (SO_PEERCRED, unix(7))."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
