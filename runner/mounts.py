"""The mount that a run uses: one that is there, the live one of the cache folder, or one made for this run.

A mount that the runner uses is held by an open connection to its control socket. The daemon it starts ends with the
last such connection, so that a runner that is killed leaves nothing. Nothing here touches the mount itself.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ipfsfuse.errors import DaemonFailed, MountFailed, UsageError
from runner.options import Options

_ANSWER_S = 10.0
_RACE_S = 30.0


class Mount(NamedTuple):
    """A mounted folder; `control` is the held connection to its daemon, None where --mount names the folder."""

    mountpoint: str
    control: "Control | None"


class Control:
    """A connection to a daemon: JSON lines, one answer to each command. It holds the mount until it is closed."""

    def __init__(self, path: str) -> None:
        """Raises DaemonFailed where nobody listens."""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(_ANSWER_S)
            self._socket.connect(path)
            self._lines = self._socket.makefile("rb")
            self.ask({"command": "hold"})
        except OSError as exc:
            self._socket.close()
            raise DaemonFailed(f"no mount answers at {path}: {exc.strerror or exc}") from exc

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, command: dict[str, object]) -> dict[str, object]:
        """Raises DaemonFailed for a refusal or no answer."""
        try:
            self._socket.sendall(json.dumps(command).encode() + b"\n")
            answer = json.loads(self._lines.readline() or b"null")
        except (OSError, ValueError) as exc:
            raise DaemonFailed(f"the mount's daemon did not answer: {exc}") from exc
        if not isinstance(answer, dict) or not answer.get("ok", False):
            reason = answer.get("error") if isinstance(answer, dict) else "it is gone"
            raise DaemonFailed(f"the mount's daemon refused {command['command']}: {reason}")
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextlib.contextmanager
def mounted(options: Options) -> Iterator[Mount]:
    """The mount for this run. Raises UsageError, MountFailed, DaemonFailed."""
    if options.mount is not None:
        yield Mount(_given(options.mount), None)
        return
    mount = _start(options, isolated=True) if options.own_mount else _shared(options)
    assert mount.control is not None
    try:
        yield mount
    finally:
        mount.control.close()


def _given(mountpoint: str) -> str:
    try:
        if not os.path.isdir(mountpoint):
            raise UsageError(f"--mount {mountpoint} is no folder")
    except OSError as exc:
        raise UsageError(f"--mount {mountpoint} can't be used: {exc.strerror}") from exc
    return os.path.abspath(mountpoint)


def _shared(options: Options) -> Mount:
    """The live mount of the cache folder. Of several runners that find none, one starts it and all use it."""
    until = time.monotonic() + _RACE_S
    while True:
        live = _live(options)
        if live is not None:
            return live
        try:
            return _start(options, isolated=False)
        except MountFailed:
            if not _daemon_file(options).exists() or time.monotonic() > until:
                raise
        time.sleep(0.05)


def _daemon_file(options: Options) -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ipfsfuse")
    return Path(options.cache_dir or default, "daemon.json")


def _live(options: Options) -> Mount | None:
    file = _daemon_file(options)
    try:
        mountpoint = json.loads(file.read_bytes())["mountpoint"]
        control = Control(str(file.with_name("control.sock")))
    except (OSError, ValueError, KeyError, TypeError, DaemonFailed):
        return None  # none, one that is starting, or what a killed one left
    if options.mount_options:
        control.close()
        name = options.mount_options[0].partition("=")[0]
        raise UsageError(f"{name}: a mount of this cache folder runs without it; add --isolated, or end it by ipfsfuse unmount {mountpoint}")
    return Mount(mountpoint, control)


def _start(options: Options, isolated: bool) -> Mount:
    """A daemon that ends with its last user. Raises MountFailed, in the daemon's own words."""
    mountpoint = tempfile.mkdtemp(prefix="ipfsfuse-run-")
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--json", "--while-held", *_mount_options(options, isolated), mountpoint]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise MountFailed(_last_line(done.stderr) or f"ipfsfuse mount failed with exit code {done.returncode}")
        return Mount(mountpoint, Control(_control_path(done.stdout)))
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(mountpoint)
        raise


def _control_path(text: str) -> str:
    try:
        return str(json.loads(text.splitlines()[-1])["control"])
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise MountFailed("ipfsfuse mount did not say where its control socket is") from exc


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].removeprefix("ipfsfuse: ")


def _mount_options(options: Options, isolated: bool) -> Sequence[str]:
    passed = [*options.mount_options, *(f"--allow={each}" for each in options.allow)]
    if options.cache_dir is not None:
        passed.append(f"--cache-dir={options.cache_dir}")
    return [*passed, *["--isolated"] * isolated]
