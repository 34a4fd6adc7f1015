"""The mount of a run that was given none: the live one of the cache folder, or one made for this run.

A mount that the runner uses is held by an open connection to its control socket. The daemon it starts ends with the
last such connection, so that a runner that is killed leaves nothing. Nothing here touches the mount itself.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ipfsfuse
from ipfsfuse.errors import DaemonFailed, MountFailed, UsageError
from runner import folders
from runner.control import Control
from runner.options import Options

_RACE_S = 30.0
_GONE_S = 2.0


class Mount(NamedTuple):
    """A mounted folder. `control` is the held connection to its daemon."""

    mountpoint: str
    control: Control
    daemon: int | None = None
    """The process that serves it, where it was started for this run: it ends with the mount's last user."""


@contextlib.contextmanager
def mounted(options: Options) -> Iterator[Mount]:
    """The mount for this run. Raises UsageError, MountFailed, DaemonFailed."""
    mount = _start(options, isolated=True) if options.own_mount else _shared(options)
    try:
        yield mount
    finally:
        if mount.control.release() and mount.daemon is not None:
            _wait_until_gone(mount.daemon)


def _wait_until_gone(daemon: int) -> None:
    """So that nothing of the run is left when the runner is gone: the daemon unmounts, and removes its folders."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(daemon)
        select.select([process], [], [], _GONE_S)
        os.close(process)


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
            if not _is_held(options) or time.monotonic() > until:
                raise
        time.sleep(0.05)


def _cache_folder(options: Options) -> Path:
    """The mount's own folder in the one that is named: its lock, its socket, and who serves it lie there."""
    default = os.path.join(folders.cache_home(), "ipfsfuse")
    return Path(options.cache_dir or os.environ.get("IPFSFUSE_CACHE_DIR") or default, "ipfsfuse-cache")


def _is_held(options: Options) -> bool:
    """Whether a daemon has the cache folder, be it one that only starts."""
    try:
        with open(_cache_folder(options) / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _live(options: Options) -> Mount | None:
    folder = _cache_folder(options)
    try:
        mountpoint = json.loads((folder / "daemon.json").read_bytes())["mountpoint"]
        control = Control(folder / "control")
    except (OSError, ValueError, KeyError, TypeError, DaemonFailed):
        return None  # none, one that is starting, or what a killed one left
    if options.mount_options:
        control.release()
        name = options.mount_options[0].partition("=")[0]
        raise UsageError(f"{name}: a mount of this cache folder runs without it; add --isolated, or end it by ipfsfuse unmount {mountpoint}")
    return Mount(mountpoint, control)


def _start(options: Options, isolated: bool) -> Mount:
    """A daemon that ends with its last user. Raises MountFailed or UsageError, in the daemon's own words."""
    mountpoint = tempfile.mkdtemp(prefix="ipfsfuse-run-")
    # -P: a folder named ipfsfuse where the user stands is none of ours
    command = [sys.executable, "-P", "-m", "ipfsfuse", "mount", "--json", "--while-held", *_mount_options(options, isolated), mountpoint]
    try:
        control, daemon = _parse(_ask_for_mount(command))
        return Mount(mountpoint, Control(control), daemon)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(mountpoint)
        raise


def _ask_for_mount(command: Sequence[str]) -> str:
    """What `ipfsfuse mount` prints, once it is mounted. Told to end while it waits, it ends the daemon it has begun."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    ) as starter:
        try:
            out, err = starter.communicate()
        except BaseException:
            starter.send_signal(signal.SIGINT)
            raise
    if starter.returncode != 0:
        reason = err.strip().rpartition("\n")[2].removeprefix("ipfsfuse: ")
        raise (UsageError if starter.returncode == 2 else MountFailed)(reason or f"ipfsfuse mount failed with exit code {starter.returncode}")
    return out


def _environment() -> dict[str, str]:
    """Ours, with the folder that ipfsfuse was imported from: a checkout need not be installed."""
    top = str(Path(ipfsfuse.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))}


def _parse(told: str) -> tuple[Path, int]:
    """The control socket and the daemon's pid."""
    try:
        answer = json.loads(told.splitlines()[-1])
        return Path(answer["control"]), int(answer["pid"])
    except (ValueError, KeyError, IndexError, TypeError) as exc:
        raise MountFailed("ipfsfuse mount did not say where its control socket is") from exc


def _mount_options(options: Options, isolated: bool) -> Sequence[str]:
    passed = [*options.mount_options, *(f"--allow={each}" for each in options.allow)]
    if options.cache_dir is not None:
        passed.append(f"--cache-dir={options.cache_dir}")
    return [*passed, *["--isolated"] * isolated]
