"""The FUSE session: mounting, the INIT exchange, serving, unmounting.

pyfuse3 holds one session per process in module globals, so this module serves one mount per process. The exchange
stands between the kernel and libfuse for one message: libfuse is given one end of a socket pair as its device, the
INIT request is passed through, its reply extended (`wire`), and then the real device is put in the socket's place.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyfuse3
import trio

from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import wire
from ipfsfuse.fuse.mountpoint import Place, fusermount
from ipfsfuse.fuse.porter import Porter, hired

log = logging.getLogger("ipfsfuse.mount")

OPTIONS = "rw,nosuid,nodev,fsname=ipfsfuse,subtype=ipfsfuse"
MAX_TASKS = 100_000
"""Waiting calls are bounded by memory, not by number: pyfuse3's default of 99 would stop the whole mount."""

INIT_SECONDS = 10
STUCK_SECONDS = 0.1
"""How long a read that finds nothing may hold everything up."""


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

    mountpoint: Path
    device: Device | None
    """None for a plain pyfuse3 mount."""
    ours: socket.socket | None = None
    number: int = -1
    """The file descriptor that libfuse believes to be its device."""
    extended: bool = False
    """True once parallel directory operations and cached symlinks are on."""
    spare: list[int] = field(default_factory=list)
    porter: Porter | None = None
    """Who reads the device; None where pyfuse3 does."""


def open_device(mountpoint: Path, allow_other: bool) -> Device:
    """Mounts, with nobody answering yet. Raises MountFailed, with fusermount3's own reason where it has
    one."""
    with Place(mountpoint) as place:
        device = _mount(mountpoint, allow_other)
        try:
            place.check()
        except MountFailed:
            _close_device(device)
            place.clear()
            raise
        return device


def _mount(mountpoint: Path, allow_other: bool) -> Device:
    if not os.path.exists("/dev/fuse"):
        raise MountFailed("/dev/fuse is missing: load the kernel module (modprobe fuse), or give the container the device")
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
        return "--allow-other needs the line user_allow_other in /etc/fuse.conf (as root: echo user_allow_other >> /etc/fuse.conf)"
    if "no write access" in line:
        return f"{mountpoint} can't be mounted: this user may not write to it: make a folder of your own"
    return f"{mountpoint} can't be mounted: {line}"


def begin(operations: pyfuse3.Operations, mountpoint: Path, allow_other: bool) -> Session:
    """Mounts and hands libfuse the socket. Must run before the event loop serves; nothing is answered yet."""
    device = open_device(mountpoint, allow_other)
    try:
        porter = hired()
    except OSError as exc:
        _close_device(device)
        raise MountFailed(f"{mountpoint} can't be served: {exc.strerror}") from exc
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number = theirs.detach()
    session = Session(mountpoint, device, ours, number, porter=porter)
    try:
        pyfuse3.init(operations, f"/dev/fd/{number}", set())
    except RuntimeError as exc:
        log.warning("this libfuse takes no device from outside (%s): a plain mount, without parallel lookups", exc)
        if session.porter is not None:
            session.porter.end()
        ours.close()
        os.close(number)
        _close_device(device)
        subprocess.run([fusermount(), "-u", "-z", "-q", "--", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
        return _begin_plain(operations, mountpoint, allow_other)
    return session


def _begin_plain(operations: pyfuse3.Operations, mountpoint: Path, allow_other: bool) -> Session:
    options = {"fsname=ipfsfuse", "subtype=ipfsfuse", "auto_unmount", "nosuid", "nodev"} | ({"allow_other"} if allow_other else set())
    try:
        pyfuse3.init(operations, str(mountpoint), options)
    except RuntimeError as exc:
        raise MountFailed(f"{mountpoint} can't be mounted: {exc}") from exc
    return Session(mountpoint, None)


async def exchange(session: Session, readahead: bool) -> None:
    """Carries INIT between kernel and libfuse; the session's main loop must be running. Raises MountFailed."""
    if session.device is None or session.ours is None:
        return
    ours, device = session.ours, session.device.fd
    with _deadline("the kernel and libfuse did not agree"):
        await trio.lowlevel.wait_readable(device)
        request = os.read(device, 1 << 20)
        offered = wire.read_init(request)
        ours.send(request)
        if session.porter is not None:
            session.porter.ring()
        await trio.lowlevel.wait_readable(ours)
        reply = wire.extend_reply(ours.recv(1 << 16), offered.flags, readahead)
        os.write(device, reply)
        session.extended = bool(offered.flags & wire.PARALLEL_DIROPS)
        await _switch(session, device, ours)
    if not session.extended:
        log.warning("this kernel offers no parallel directory operations: a stalled lookup holds up its directory")


async def _switch(session: Session, device: int, ours: socket.socket) -> None:
    """Puts the device in the place of the socket that libfuse waits on."""
    if session.porter is not None:
        os.dup2(device, session.number)
        try:
            session.porter.begin(session.number)
        except OSError as exc:
            raise MountFailed(f"{session.mountpoint} can't be served: {exc.strerror}") from exc
        return
    session.spare.append(os.dup(session.number))  # epoll still watches the old end: it must outlive the wake-up below
    os.dup2(device, session.number)
    ours.send(b"x")  # wakes the task that waits on the old end; its next read is the device's
    await trio.lowlevel.checkpoint()


@contextlib.contextmanager
def _deadline(what: str) -> Iterator[None]:
    try:
        with trio.fail_after(INIT_SECONDS):
            yield
    except trio.TooSlowError as exc:
        raise MountFailed(f"{what} within {INIT_SECONDS} s") from exc


async def serve(session: Session, ready: Callable[[], None], readahead: bool = True) -> None:
    """Answers the kernel until the mount is gone; `ready` is called once it does.

    Without `readahead` the kernel asks for nothing that was not read (a plain mount can't promise that)."""
    with _never_stuck_in_read() if session.porter is None else contextlib.nullcontext():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_main, nursery.cancel_scope)
            await exchange(session, readahead)
            ready()


@contextlib.contextmanager
def _never_stuck_in_read() -> Iterator[None]:
    """A request may vanish between the poll that saw it and libfuse's read (its caller was killed, or was answered
    before its interrupt was read); that read then waits for the next request, with the event loop and Python's lock.
    Non-blocking is no way out: pyfuse3 ends the mount at EAGAIN. But it tries again at EINTR, so a timer interrupts."""
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, STUCK_SECONDS, STUCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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
    if session.porter is not None:
        session.porter.end()
    pyfuse3.close(unmount=session.device is None)
    if session.ours is not None:
        session.ours.close()
    for fd in session.spare:
        with contextlib.suppress(OSError):
            os.close(fd)
    if session.device is not None:
        _close_device(session.device)


def _close_device(device: Device) -> None:
    with contextlib.suppress(OSError):
        os.close(device.fd)
    device.helper.close()


@contextlib.asynccontextmanager
async def opened(operations: pyfuse3.Operations, mountpoint: Path, allow_other: bool) -> AsyncIterator[Session]:
    """A session for the length of the block; the mount is gone afterwards."""
    session = begin(operations, mountpoint, allow_other)
    try:
        yield session
    finally:
        close(session)
