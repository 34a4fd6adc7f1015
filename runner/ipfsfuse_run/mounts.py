"""The mount of a run without --mount: the live mount of the cache folder, or a new one for this run.

The runner holds the mount by an open connection to its control socket. A daemon that the runner started ends
with the last such connection, so a killed runner leaves nothing. Nothing here touches the mount itself.
"""

import contextlib
import json
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ipfsfuse
import ipfsfuse_run
from ipfsfuse.client import Connection
from ipfsfuse.errors import DaemonFailed, FolderInUse, IpfsFuseError, MountFailed, StoreFailed, UsageError
from ipfsfuse_run.errors import GuestRefused, say
from ipfsfuse_run.host_folders import cache_home
from ipfsfuse_run.options import Options

_RACE_S = 30.0
_ANSWER_S = 40.0
"""Seconds, more than any default deadline of the daemon. A daemon that has not answered by then has ended."""
_GONE_S = 2.0
_MAX_ALLOW = 1000
"""The most CIDs that are passed on the command line. More are passed in a file."""


class Mount(NamedTuple):
    """A mount of ipfsfuse, made for this user."""

    mountpoint: str
    mount_id: int
    """The kernel's number of the mount."""
    control: Connection
    """The connection to its daemon that holds the mount."""
    daemon: int | None = None
    """The daemon's process, if it was started for this run. It ends with the last holder of the mount."""
    quota: Connection | None = None
    """A connection on which the daemon answers when the mount has fetched as much as -W max-fetch allows."""


@contextlib.contextmanager
def open_mount(options: Options) -> Iterator[Mount]:
    """The mount for this run. Raises UsageError, MountFailed, DaemonFailed, StoreFailed."""
    mount = _start(options, isolated=True) if options.own_mount else _shared(options)
    try:
        yield mount
    finally:
        if mount.quota is not None:
            mount.quota.close()
        if mount.control.release() and mount.daemon is not None:
            _wait_until_gone(mount.daemon)


def _wait_until_gone(daemon: int) -> None:
    """Waits until the daemon has unmounted and removed its folders, so that the runner leaves nothing."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(daemon)
        select.select([process], [], [], _GONE_S)
        os.close(process)


def _shared(options: Options) -> Mount:
    """The live mount of the cache folder. If several runners find none, one starts it and all use it."""
    until = time.monotonic() + _RACE_S
    while True:
        live = _live(options)
        if live is not None:
            return live
        try:
            return _start(options, isolated=False)
        except FolderInUse:  # a mount is starting or ending: `_live` finds one that serves
            if time.monotonic() > until:
                raise
        time.sleep(0.05)


def _held(path: str, folder: int) -> Connection:
    """A connection to the daemon at `path` that holds its mount. Raises DaemonFailed, MountFailed."""
    connection = Connection(path, folder, _ANSWER_S)
    try:
        connection.hold()
    except BaseException:
        connection.close()
        raise
    return connection


# -- the cache folder of a mount that lives ----------------------------------------------------------------

_DAEMON, _CONTROL = "daemon.json", "control"
_MAX_DAEMON = 64 << 10
"""Bytes of daemon.json: a path and a few numbers."""


def _daemon_folder(options: Options) -> str:
    """The folder that holds the lock and the socket of the cache folder's daemon, and the file that names its
    mountpoint."""
    default = os.path.join(cache_home(), "ipfsfuse")
    parent = options.cache_dir or os.environ.get("IPFSFUSE_CACHE_DIR") or default
    return os.path.join(parent, "ipfsfuse-cache")


@contextlib.contextmanager
def _open_folder(path: str) -> Iterator[int | None]:
    """A descriptor of the folder `path`; None if there is none. Its content is trusted to be the user's own,
    so a folder that `ipfsfuse mount` refuses is refused here too. Raises StoreFailed."""
    try:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        folder = None
    except OSError as exc:
        raise StoreFailed(
            f"the cache folder {path} can't be used: it is not a folder, or a symlink ({exc.strerror})"
        ) from exc
    if folder is None:
        yield None
        return
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid():
            raise StoreFailed(
                f"the cache folder {path} belongs to another user: give --cache-dir a folder of your own"
            )
        if found.st_mode & 0o022:
            raise StoreFailed(f"the cache folder {path} may be written by others: run chmod 700 {path}")
        yield folder
    finally:
        os.close(folder)


def _live(options: Options) -> Mount | None:
    """The live mount of the cache folder; None if there is none. Raises StoreFailed or MountFailed if folder
    or mount is not this user's, UsageError if the mount can't serve this run."""
    path = _daemon_folder(options)
    with _open_folder(path) as folder:
        if folder is None:
            return None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(_DAEMON, flags, dir_fd=folder), "rb") as file:
                mountpoint = str(json.loads(file.read(_MAX_DAEMON))["mountpoint"])
            control = _held(os.path.join(path, _CONTROL), folder)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, DaemonFailed):
            return None  # no daemon, one that is starting, or files of a killed one
    try:
        mount_id = kernel_mount_id(mountpoint)
        if mount_id is not None and options.mount_options:
            name = options.mount_options[0].partition("=")[0]
            raise UsageError(
                f"{name}: a mount of this cache folder runs without it; add --isolated, or end it by "
                f"ipfsfuse unmount {mountpoint}"
            )
    except BaseException:
        control.release()
        raise
    if mount_id is None:
        control.release()
        return None  # the daemon is ending
    return Mount(mountpoint, mount_id, control)


def kernel_mount_id(mountpoint: str) -> int | None:
    """The kernel's number of the mount at `mountpoint`; None if there is none.

    Raises MountFailed if it is not a mount that ipfsfuse made for this user. Reads only the kernel's table of
    mounts, because a mount whose daemon is gone does not answer. Source: proc_pid_mountinfo(5); user_id is
    the owner that fusermount3 or root gave."""
    top: list[str] | None = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            if _unescaped(fields[4]) == mountpoint:
                top = fields  # the last line is the uppermost mount
    if top is None:
        return None
    kind, options = top[top.index("-") + 1], top[-1].split(",")
    if kind != _TYPE or f"user_id={os.geteuid()}" not in options:
        raise MountFailed(
            f"{mountpoint} is not a mount of yours by ipfsfuse, but of the type {kind}: run ipfsfuse "
            "mounts, or give --isolated"
        )
    return int(top[0])


_TYPE = "fuse.ipfsfuse"


def _unescaped(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


# -- a mount of this run's own -----------------------------------------------------------------------------


def _start(options: Options, isolated: bool) -> Mount:
    """Starts a daemon that ends with its last holder. Raises MountFailed, FolderInUse or UsageError with the
    daemon's message."""
    import tempfile  # takes 10 ms with subprocess, and a run on a live mount needs neither

    mountpoint = tempfile.mkdtemp(prefix="ipfsfuse-run-", dir=os.path.realpath(tempfile.gettempdir()))
    try:
        said = ipfsfuse_command(
            "mount", "--json", "--while-held", *_mount_options(options, isolated), mountpoint
        )
        try:
            answer = json.loads(said.splitlines()[-1])
            path, daemon = os.fspath(answer["control"]), int(answer["pid"])
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            raise MountFailed("ipfsfuse mount did not say where its control socket is") from exc
        parent = os.path.dirname(path)
        with _open_folder(parent) as folder:
            if folder is None:
                raise MountFailed(f"the folder {parent} of the new mount's socket is gone")
            control = _held(path, folder)
        mount_id = kernel_mount_id(mountpoint)
        if mount_id is None:
            control.release()
            raise MountFailed(f"nothing is mounted at {mountpoint}, though ipfsfuse mount said so")
        quota = None
        if options.limits.max_fetch is not None:
            quota = Connection(path, timeout=_ANSWER_S)
            quota.socket.sendall(b'{"command": "quota", "wait": true}\n')
        return Mount(mountpoint, mount_id, control, daemon, quota)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(mountpoint)
        raise


def ipfsfuse_command(*args: str) -> str:
    """Runs `ipfsfuse ARG...` and returns what it prints. An exception that ends the wait also interrupts the
    command. Raises MountFailed, FolderInUse or UsageError with the command's message."""
    import subprocess

    with subprocess.Popen(
        # -P: a folder named ipfsfuse in the working directory must not be imported
        [sys.executable, "-P", "-m", "ipfsfuse", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
    ) as starter:
        try:
            out, err = starter.communicate()
        except BaseException:
            starter.send_signal(signal.SIGINT)
            raise
    if starter.returncode != 0:
        reason = f"\n{err.strip()}".rpartition("\nipfsfuse: ")[2]
        failure = {2: UsageError, os.EX_TEMPFAIL: FolderInUse}.get(starter.returncode, MountFailed)
        raise failure(reason or f"ipfsfuse {args[0]} failed with exit code {starter.returncode}")
    return out


def child_environment() -> dict[str, str]:
    """Our environment, with the folders that the packages were imported from in PYTHONPATH, so that a
    checkout need not be installed."""
    tops = [os.path.dirname(os.path.dirname(str(each.__file__))) for each in (ipfsfuse, ipfsfuse_run)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*tops, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _mount_options(options: Options, isolated: bool) -> Sequence[str]:
    allow = options.allow
    if len(allow) > _MAX_ALLOW:  # a command line holds no more than 2 MB
        listed = os.memfd_create("allow", os.MFD_CLOEXEC)
        with open(listed, "w", encoding="utf-8", closefd=False) as file:  # open until this process ends
            file.write("".join(f"{each}\n" for each in allow))
        allow = (f"/proc/{os.getpid()}/fd/{listed}",)
    passed = [*options.mount_options, *(f"--allow={each}" for each in allow)]
    if options.cache_dir is not None:
        passed.append(f"--cache-dir={options.cache_dir}")
    if options.limits.max_fetch is not None:
        passed.append(f"--max-fetch={options.limits.max_fetch}")
    return [*passed, *["--isolated"] * isolated]


# -- IPNS names, and what a guest can disclose -------------------------------------------------------------


def resolved_names(options: Options, mount: Mount) -> dict[str, str]:
    """Resolves the run's IPNS names to paths below the mountpoint. Raises GuestRefused, UsageError."""
    found: dict[str, str] = {}
    for name in options.ipns:
        if "/" in name or name in ("", ".", ".."):
            raise UsageError(f"--ipns {name} is not a name: give the name alone, without /ipns/ and a path")
        try:
            path = str(mount.control.ask("resolve", name=name)["path"])
        except IpfsFuseError as exc:
            raise GuestRefused(f"--ipns {name}: {exc}") from exc
        found[name] = path.removeprefix("/ipfs/")
    return found


def warn_of_disclosure(options: Options, mount: Mount) -> None:
    """Prints one line that names the sources which can learn the guest's input: a guest can encode it in the
    CIDs that it reads. Prints nothing if the guest has no input or can't reach a source."""
    given = _possible_secrets(options)
    if not given or options.allow or "--offline" in options.mount_options:
        return
    sources = _network_sources(mount)
    if sources:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        say(
            f"this guest can tell {sources[0]}{more} what it reads in {given}, by the CIDs that it "
            "asks /ipfs for: "
            "--allow CID or --offline prevents that"
        )


def _possible_secrets(options: Options) -> str:
    """The inputs of this run that may be secret, for the message."""
    parts = (
        ["--dir"] * bool(options.dirs)
        + ["--env"] * bool(options.env)
        + ["standard input"] * (options.guest != "-" and _has_input())
    )
    return ", ".join(parts)


def _has_input() -> bool:
    """Whether standard input is a pipe, a socket or a non-empty file. A terminal does not count, because its
    user sees what the guest gets."""
    try:
        info = os.fstat(0)
    except OSError:
        return False
    return (
        stat.S_ISFIFO(info.st_mode)
        or stat.S_ISSOCK(info.st_mode)
        or (stat.S_ISREG(info.st_mode) and info.st_size > 0)
    )


def _network_sources(mount: Mount) -> list[str]:
    """The sources of the mount that are not read in place. If the mount does not list its sources, it is
    assumed to have some."""
    try:
        status = mount.control.ask("status")
        if status["offline"] or status.get("allow"):
            return []
        return [str(each["name"]) for each in status["sources"] if not each["in_place"]]
    except (IpfsFuseError, KeyError, TypeError):
        return ["its mount's sources"]
