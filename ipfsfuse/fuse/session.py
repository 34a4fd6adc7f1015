"""The FUSE session: mounting, serving, unmounting.

pyfuse3 holds one session per process in module globals, so this module serves one mount per process.
fusermount3 mounts and gives us the device. libfuse never touches it: `device` reads and writes it.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from ipfsfuse.errors import MountFailed
from ipfsfuse.fileio import threads
from ipfsfuse.fuse.device import Device
from ipfsfuse.fuse.mountpoint import Place, fusermount
from ipfsfuse.fuse.operations import Operations

log = logging.getLogger("ipfsfuse.mount")

OPTIONS = "rw,nosuid,nodev,fsname=ipfsfuse,subtype=ipfsfuse"
MAX_TASKS = 100_000
"""Waiting calls are bounded by memory, not by number: pyfuse3's default of 99 would stop the whole mount."""

INIT_SECONDS = 10

PRUNE_SECONDS = 0.5
"""Between two looks at how many inodes the kernel holds: it looks up some thousands in that time."""
_NOTIFY_PRUNE, _PRUNED_AT_ONCE = 9, 4096
"""The code of the notification (linux/fuse.h of 6.18), and the node ids in one of them."""


@dataclass
class Mount:
    """/dev/fuse as fusermount3 opened it for one mountpoint."""

    fd: int
    helper: socket.socket
    """Held open: fusermount3 unmounts when it closes, however this process ends."""


@dataclass
class Session:
    """A session that libfuse accepted, not yet serving."""

    mount: Mount
    device: Device
    operations: Operations


def open_mount(mountpoint: Path, allow_other: bool) -> Mount:
    """Mounts, with nobody answering yet. Raises MountFailed, with fusermount3's own reason where it has
    one."""
    with Place(mountpoint) as place:
        mount = _mount(mountpoint, allow_other)
        try:
            place.check()
        except MountFailed:
            close_mount(mount)
            place.clear()
            raise
        return mount


def _mount(mountpoint: Path, allow_other: bool) -> Mount:
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
    return Mount(fds[0], ours)


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


@contextlib.contextmanager
def opened(
    operations: Operations, mountpoint: Path, allow_other: bool, readahead: bool, passthrough: bool = False
) -> Iterator[Session]:
    """Mounts, and starts to read the device; nothing is answered yet. The mount is gone after the block.

    Without `readahead` the kernel asks for nothing that was not read. Raises MountFailed."""
    with contextlib.ExitStack() as stack:
        mount = open_mount(mountpoint, allow_other)
        stack.callback(close_mount, mount)
        try:
            device = Device(readahead, passthrough)
        except OSError as exc:
            raise MountFailed(f"{mountpoint} can't be served: {exc.strerror}") from exc
        try:
            pyfuse3.init(operations, f"/dev/fd/{mount.fd}", set())
        except RuntimeError as exc:
            failed = device.start_error
            device.stop()
            if failed:
                raise MountFailed(
                    f"{mountpoint} can't be served: the thread that reads the device can't be started: "
                    f"{os.strerror(failed)}"
                ) from exc
            raise MountFailed(
                f"{mountpoint} can't be served: this libfuse takes no device from outside ({exc}): 3.14 or "
                "newer is needed"
            ) from exc
        stack.callback(pyfuse3.close, unmount=False)
        stack.callback(device.stop)
        if not device.started:
            raise MountFailed(
                f"{mountpoint} can't be served: pyfuse3 was imported before ipfsfuse: import ipfsfuse first"
            )
        yield Session(mount, device, operations)


async def serve(session: Session, ready: Callable[[], None]) -> None:
    """Answers the kernel until the mount is gone; `ready` is called once it does. Raises MountFailed."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_main, nursery.cancel_scope)
        parallel = False
        with trio.move_on_after(INIT_SECONDS) as waiting:
            parallel = await session.device.initialized()
        if waiting.cancelled_caught:
            raise MountFailed(f"the kernel and libfuse did not agree within {INIT_SECONDS} s")
        if not parallel:
            log.warning(
                "this kernel offers no parallel directory operations: a stalled lookup holds up its directory"
            )
        nursery.start_soon(_interrupt, session)
        nursery.start_soon(_prune, session)
        ready()


async def _interrupt(session: Session) -> None:
    async for number in session.device.interrupted():
        session.operations.interrupt(number)


async def _prune(session: Session) -> None:
    """Asks the kernel to forget what no program uses, while it holds too many inodes."""
    while True:
        await trio.sleep(PRUNE_SECONDS)
        surplus = session.operations.surplus()
        for first in range(0, len(surplus), _PRUNED_AT_ONCE):
            numbers = surplus[first : first + _PRUNED_AT_ONCE]
            if not await threads.run_sync(prune, session.mount.fd, numbers):
                return


def prune(fd: int, numbers: Sequence[int]) -> bool:
    """Asks the kernel to drop the names of `numbers` that nothing uses. It then forgets the inodes that have
    no names left. Returns whether it knows this: Linux 6.18 and later do. The others forget when memory is
    short."""
    body = struct.pack(f"=IIQ{len(numbers)}Q", len(numbers), 0, 0, *numbers)
    try:
        os.write(fd, struct.pack("=IiQ", 16 + len(body), _NOTIFY_PRUNE, 0) + body)
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return True


async def _main(scope: trio.CancelScope) -> None:
    await pyfuse3.main(max_tasks=MAX_TASKS)
    scope.cancel()


async def unmount(mountpoint: Path, lazy: bool) -> bool:
    """Asks fusermount3 to unmount, while the loop goes on answering. True if it did."""
    command = [fusermount(), "-u", "-q", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = await trio.run_process(command, check=False, capture_stderr=True)
    return done.returncode == 0


def close_mount(mount: Mount) -> None:
    """Lets go of the device; what fusermount3 still holds mounted is unmounted by it."""
    with contextlib.suppress(OSError):
        os.close(mount.fd)
    mount.helper.close()
