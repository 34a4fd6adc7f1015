"""The FUSE session: mounting, serving, unmounting.

pyfuse3 has one session per process in module globals, so this module serves one mount per process.
fusermount3 mounts and sends us the device (`MountHelper`). libfuse does not use it: `device` reads and writes
it.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyfuse3
import trio

from ipfsfuse.errors import MountFailed
from ipfsfuse.fileio import threads
from ipfsfuse.fuse.device import Device
from ipfsfuse.fuse.mountpoint import HELPER, MountTarget, fusermount
from ipfsfuse.fuse.operations import Operations

log = logging.getLogger("ipfsfuse.mount")

MOUNT_OPTIONS = "rw,nosuid,nodev,fsname=ipfsfuse,subtype=ipfsfuse"
MAX_TASKS = 100_000
"""Waiting calls are bounded by memory only: with pyfuse3's default, 99 stalled calls would stop the whole
mount."""

INIT_SECONDS = 10

PRUNE_SECONDS = 0.5
"""Seconds between two checks of how many inodes the kernel has: it can look up some thousands in that
time."""
_NOTIFY_PRUNE, _PRUNED_AT_ONCE = 9, 4096
"""The code of the notification (linux/fuse.h of 6.18), and the node ids that one notification may have."""


@dataclass
class MountedDevice:
    """The device (/dev/fuse) that fusermount3 opened for one mountpoint."""

    fd: int
    helper: socket.socket
    """Kept open: fusermount3 unmounts when it closes, even if this process is killed."""


@dataclass
class Session:
    """A session that libfuse accepted, not yet serving."""

    mount: MountedDevice
    device: Device
    operations: Operations


class MountHelper:
    """Mounts and unmounts at one mountpoint. Two shells do it that are started early, because the confined
    daemon can't start programs. They wait for a line on their standard input, and end with this process."""

    _MOUNT = 'trap "" INT TERM HUP; read -r go && exec "$@"'
    _UNMOUNT = """
    trap "" INT TERM HUP
    mountpoint=$1; shift
    while read -r wanted line; do
      point=$(printf %b_ "$line")
      point=${point%_}
      [ "$wanted" = dead ] || point=$mountpoint
      if [ "$wanted" = dead ]; then
        case $(LC_ALL=C ls -U -- "$point" 2>&1 >/dev/null) in
          *"not connected"* | *"connection abort"*) ;;
          *) echo alive; continue ;;
        esac
      fi
      "$@" -u -q -- "$point" || "$@" -u -q -z -- "$point"
      echo done
    done 2>/dev/null
    """

    def __init__(
        self, mountpoint: Path, allow_other: bool, owner: tuple[int, int] | None = None, readahead: int = 0
    ) -> None:
        """`owner`: the user and group of the mount, by default those of this process. With `owner`, our own
        helper is used, which also sets `readahead` in KiB. Raises MountFailed."""
        if not os.path.exists("/dev/fuse"):
            raise MountFailed(
                "/dev/fuse is missing: load the kernel module (modprobe fuse), or give the container the "
                "device"
            )
        self.mountpoint = mountpoint
        self._allow_other = allow_other
        program = fusermount() if owner is None else HELPER
        options = MOUNT_OPTIONS + ",auto_unmount" + (",allow_other" if allow_other else "")
        if owner is not None:
            options += f",user_id={owner[0]},group_id={owner[1]},readahead={readahead}"
        self._ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._mounting = self._waiting(
                    self._MOUNT,
                    [*program, "-o", options, "--", str(mountpoint)],
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
                    stderr=subprocess.PIPE,
                )
            if owner is not None:
                program = [*program, "-o", f"user_id={owner[0]}"]
            self._unmounting = self._waiting(
                self._UNMOUNT, [str(mountpoint), *program], stdout=subprocess.PIPE
            )
        except OSError as exc:
            raise MountFailed(f"{mountpoint} can't be mounted: {exc.strerror}") from exc

    @staticmethod
    def _waiting(script: str, words: Sequence[str], **more: Any) -> "subprocess.Popen[bytes]":
        command = ["/bin/sh", "-c", script, "sh", *words]
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/", **more)

    def mount(self) -> MountedDevice:
        """Mounts. No request is answered yet. Raises MountFailed, with fusermount3's reason if it gave
        one."""
        with MountTarget(self.mountpoint) as target:
            mount = self._mount()
            try:
                target.check()
            except MountFailed:
                close_mount(mount)
                for point in target.made():
                    self._ask_to_unmount(point, "dead").readline()
                raise
            return mount

    def _mount(self) -> MountedDevice:
        assert self._mounting.stdin is not None
        assert self._mounting.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._mounting.stdin.write(b"go\n")
            self._mounting.stdin.close()
        _message, fds, _flags, _address = socket.recv_fds(self._ours, 1, 1)
        if not fds:
            self._ours.close()
            with self._mounting.stderr as stderr:
                message = stderr.read()
            self._mounting.wait()
            raise MountFailed(_why(message.decode(errors="replace"), self.mountpoint, self._allow_other))
        self._mounting.stderr.close()
        return MountedDevice(fds[0], self._ours)

    async def unmount(self) -> None:
        """Unmounts, lazily if the mount is busy. The event loop goes on answering meanwhile."""
        answer = self._ask_to_unmount("")
        await trio.lowlevel.wait_readable(answer)
        answer.readline()

    def _ask_to_unmount(self, mountpoint: str, wanted: str = "any") -> IO[bytes]:
        """Returns the file on which a line says that it is done. `wanted` is "any" for the mount at
        `self.mountpoint`, or "dead" for another mount, which is unmounted only if its daemon is gone. So an
        attacker in this process can't unmount other live mounts."""
        assert self._unmounting.stdin is not None
        assert self._unmounting.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the shell was killed: stdout ends then too
            escaped = b"".join(b"\\0%03o" % byte for byte in os.fsencode(mountpoint))
            self._unmounting.stdin.write(wanted.encode() + b" " + escaped + b"\n")
            self._unmounting.stdin.flush()
        return self._unmounting.stdout

    def close(self) -> None:
        """Ends the shells. The mount stays until `close_mount`."""
        for process in (self._mounting, self._unmounting):
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        if self._unmounting.stdout is not None:
            self._unmounting.stdout.close()
        self._unmounting.wait()


def _why(message: str, mountpoint: Path, allow_other: bool) -> str:
    line = message.strip().rpartition("fusermount3: ")[2].strip() or "fusermount3 gave no reason"
    if allow_other and "user_allow_other" in line:
        return (
            "--allow-other needs the line user_allow_other in /etc/fuse.conf (as root: echo "
            "user_allow_other >> /etc/fuse.conf)"
        )
    if "no write access" in line:
        return f"{mountpoint} can't be mounted: this user may not write to it: make a folder of your own"
    return f"{mountpoint} can't be mounted: {line}"


@contextlib.contextmanager
def open_session(
    operations: Operations, helper: MountHelper, readahead: bool, passthrough: bool = False
) -> Iterator[Session]:
    """Mounts, and starts to read the device. No request is answered yet. The mount is gone after the block.

    Without `readahead`, the kernel requests only what programs read. Raises MountFailed."""
    with contextlib.ExitStack() as stack:
        mount, mountpoint = helper.mount(), helper.mountpoint
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


async def serve(session: Session, *, task_status: trio.TaskStatus[bool] = trio.TASK_STATUS_IGNORED) -> None:
    """Answers the kernel until the mount is gone. Calls `task_status.started(True)` when it has begun, or
    with False if the mount was gone before. Raises MountFailed."""
    answers = False
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
        nursery.start_soon(_heed_thread, session)
        nursery.start_soon(_prune, session)
        answers = True
        task_status.started(True)
    if not answers:
        task_status.started(False)


async def _heed_thread(session: Session) -> None:
    """Handles what the device's thread reports. Runs until it is cancelled."""
    while True:
        await session.device.notified()
        for number in session.device.interrupted():
            session.operations.interrupt(number)
        session.operations.files.drain()


async def _prune(session: Session) -> None:
    """Asks the kernel to forget unused inodes while it has too many. Runs until it is cancelled, or the
    kernel does not support that."""
    while True:
        await trio.sleep(PRUNE_SECONDS)
        surplus = session.operations.inodes.surplus()
        for first in range(0, len(surplus), _PRUNED_AT_ONCE):
            numbers = surplus[first : first + _PRUNED_AT_ONCE]
            if not await threads.run_sync(prune, session.mount.fd, numbers):
                return


def prune(fd: int, numbers: Sequence[int]) -> bool:
    """Asks the kernel to drop the unused names of the inodes `numbers`. It then forgets inodes without names.
    Returns whether the kernel supports that: Linux 6.18 and later do. Older kernels forget only when memory
    is short."""
    body = struct.pack(f"=IIQ{len(numbers)}Q", len(numbers), 0, 0, *numbers)
    try:
        os.write(fd, struct.pack("=IiQ", 16 + len(body), _NOTIFY_PRUNE, 0) + body)
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return True


async def _main(scope: trio.CancelScope) -> None:
    await pyfuse3.main(max_tasks=MAX_TASKS)
    scope.cancel()


def close_mount(mount: MountedDevice) -> None:
    """Closes the device. fusermount3 unmounts if the mount still exists."""
    with contextlib.suppress(OSError):
        os.close(mount.fd)
    mount.helper.close()
