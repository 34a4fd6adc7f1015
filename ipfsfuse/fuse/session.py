"""The FUSE session: mounting, the INIT exchange, serving, unmounting.

pyfuse3 holds one session per process in module globals, so this module serves one mount per process. It
stands between the kernel and libfuse for one message: libfuse is given one end of a socket pair as its
device, the INIT request is passed through, its reply is extended (`init_patch`), and then the real device is
put in the socket's place.
"""

import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import init_patch
from ipfsfuse.fuse.device import DeviceReader
from ipfsfuse.fuse.mountpoint import Place, fusermount

log = logging.getLogger("ipfsfuse.mount")

OPTIONS = "rw,nosuid,nodev,fsname=ipfsfuse,subtype=ipfsfuse"
MAX_TASKS = 100_000
"""Waiting calls are bounded by memory, not by number: pyfuse3's default of 99 would stop the whole mount."""

INIT_SECONDS = 10


@dataclass
class Device:
    """/dev/fuse as fusermount3 opened it for one mountpoint."""

    fd: int
    helper: socket.socket
    """Held open: fusermount3 unmounts when it closes, whatever way this process ends."""
    mountpoint: Path


@dataclass
class Session:
    """A session that libfuse accepted, not yet serving."""

    device: Device
    reader: DeviceReader
    ours: socket.socket
    """Our end of the socket pair that libfuse has as its device."""
    number: int
    """The file descriptor that libfuse believes to be its device."""
    extended: bool = False
    """True once parallel directory operations and cached symlinks are on."""


def open_device(mountpoint: Path, allow_other: bool) -> Device:
    """Mounts, with nobody answering yet. Raises MountFailed, with fusermount3's own reason where it has
    one."""
    with Place(mountpoint) as place:
        device = _mount(mountpoint, allow_other)
        try:
            place.check()
        except MountFailed:
            close_device(device)
            place.clear()
            raise
        return device


def _mount(mountpoint: Path, allow_other: bool) -> Device:
    if not os.path.exists("/dev/fuse"):
        raise MountFailed(
            "/dev/fuse is missing: load the kernel module (modprobe fuse), or give the container the device"
        )
    options = OPTIONS + ",auto_unmount" + (",allow_other" if allow_other else "")
    ours, theirs = socket.socketpair()
    with theirs:
        helper = subprocess.Popen(
            [fusermount(), "-o", options, "--", str(mountpoint)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
            stderr=subprocess.PIPE,
        )
    _message, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
    if not fds:
        ours.close()
        _out, said = helper.communicate()
        raise MountFailed(_why(said.decode(errors="replace"), mountpoint, allow_other))
    if helper.stderr:
        helper.stderr.close()
    return Device(fds[0], ours, mountpoint)


def _why(said: str, mountpoint: Path, allow_other: bool) -> str:
    line = said.strip().rpartition("fusermount3: ")[2].strip() or "fusermount3 gave no reason"
    if allow_other and "user_allow_other" in line:
        return (
            "--allow-other needs the line user_allow_other in /etc/fuse.conf (as root: echo "
            "user_allow_other >> /etc/fuse.conf)"
        )
    if "no write access" in line:
        return f"{mountpoint} can't be mounted: this user may not write to it: make a folder of your own"
    return f"{mountpoint} can't be mounted: {line}"


def init(operations: pyfuse3.Operations, mountpoint: Path, allow_other: bool) -> Session:
    """Mounts and hands libfuse the socket. Must run before the event loop serves; nothing is answered yet.

    Raises MountFailed."""
    device = open_device(mountpoint, allow_other)
    try:
        reader = DeviceReader()
    except OSError as exc:
        close_device(device)
        raise MountFailed(f"{mountpoint} can't be served: {exc.strerror}") from exc
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = theirs.detach()
    try:
        pyfuse3.init(operations, f"/dev/fd/{number}", set())
    except RuntimeError as exc:
        reader.stop()
        ours.close()
        os.close(number)
        close_device(device)
        raise MountFailed(
            f"{mountpoint} can't be served: this libfuse takes no device from outside ({exc}): 3.3 or "
            "newer is needed"
        ) from exc
    return Session(device, reader, ours, number)


async def exchange(session: Session, readahead: bool) -> None:
    """Carries INIT between kernel and libfuse; the session's main loop must be running. Raises
    MountFailed."""
    ours, device = session.ours, session.device.fd
    with _deadline("the kernel and libfuse did not agree"):
        await trio.lowlevel.wait_readable(device)
        request = os.read(device, 1 << 20)
        offered = init_patch.read_init(request)
        ours.send(request)
        session.reader.wake()
        await trio.lowlevel.wait_readable(ours)
        reply = init_patch.extend_reply(ours.recv(1 << 16), offered.flags, readahead)
        os.write(device, reply)
    session.extended = bool(offered.flags & init_patch.PARALLEL_DIROPS)
    os.dup2(device, session.number)  # the device takes the place of the socket
    try:
        session.reader.start(session.number)
    except OSError as exc:
        raise MountFailed(f"{session.device.mountpoint} can't be served: {exc.strerror}") from exc
    if not session.extended:
        log.warning(
            "this kernel offers no parallel directory operations: a stalled lookup holds up its directory"
        )


@contextlib.contextmanager
def _deadline(what: str) -> Iterator[None]:
    try:
        with trio.fail_after(INIT_SECONDS):
            yield
    except trio.TooSlowError as exc:
        raise MountFailed(f"{what} within {INIT_SECONDS} s") from exc


async def serve(session: Session, ready: Callable[[], None], readahead: bool = True) -> None:
    """Answers the kernel until the mount is gone; `ready` is called once it does.

    Without `readahead` the kernel asks for nothing that was not read."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_main, nursery.cancel_scope)
        await exchange(session, readahead)
        ready()


async def _main(scope: trio.CancelScope) -> None:
    await pyfuse3.main(max_tasks=MAX_TASKS)
    scope.cancel()


async def unmount(mountpoint: Path, lazy: bool) -> bool:
    """Asks fusermount3 to unmount, while the loop goes on answering. True if it did."""
    command = [fusermount(), "-u", "-q", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = await trio.run_process(command, check=False, capture_stderr=True)
    return done.returncode == 0


def close(session: Session) -> None:
    """Lets go of the device; what fusermount3 still holds mounted is unmounted by it."""
    session.reader.stop()
    pyfuse3.close(unmount=False)
    session.ours.close()
    close_device(session.device)


def close_device(device: Device) -> None:
    with contextlib.suppress(OSError):
        os.close(device.fd)
    device.helper.close()


@contextlib.asynccontextmanager
async def opened(
    operations: pyfuse3.Operations, mountpoint: Path, allow_other: bool
) -> AsyncIterator[Session]:
    """A session for the length of the block; the mount is gone afterwards."""
    session = init(operations, mountpoint, allow_other)
    try:
        yield session
    finally:
        close(session)
