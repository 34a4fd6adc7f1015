"""A program that mounts and unmounts by the system calls, with the arguments of fusermount3:

    mount_helper.py -o OPTIONS -- DIRECTORY
    mount_helper.py [-o user_id=N] -u [-q] [-z] -- DIRECTORY

It replaces fusermount3 if root has none (a small container), and if root makes a mount for another user,
which fusermount3 can't do: `user_id=` and `group_id=` in OPTIONS name that user. Like fusermount3, it sends
the device over the socket that _FUSE_COMMFD names. When that socket closes and the mount no longer answers,
it unmounts.

The daemon of such a mount runs as that user and may ask for anything. So symlinks are not followed, and with
`user_id=` only that user's mounts of ipfsfuse are unmounted.

It is run by its path and imports only the standard library, so it starts in 15 ms.
"""

import ctypes
import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

MS_NOSUID, MS_NODEV = 2, 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
FUSE_OPTIONS = ("allow_other", "user_id=", "group_id=")


def main(words: Sequence[str]) -> int:
    directory = words[words.index("--") + 1]
    options = words[words.index("-o") + 1].split(",") if "-o" in words else []
    try:
        if "-u" in words:
            owner = next((each for each in options if each.startswith("user_id=")), "")
            unmount(directory, "-z" in words, owner)
        else:
            mount_and_wait(directory, options)
    except OSError as exc:
        if "-q" not in words:
            sys.stderr.write(f"{exc.strerror}\n")
        return 1
    return 0


def mount_and_wait(directory: str, options: Sequence[str]) -> None:
    """Mounts, and waits for the end of the daemon. Raises OSError if it can't be mounted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal to the daemon's group must not end this process
    with socket.socket(fileno=int(os.environ["_FUSE_COMMFD"])) as daemon:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        mount(directory, device, options)
        socket.send_fds(daemon, [b"\0"], [device])
        os.close(device)
        raise_readahead(directory, options)
        os.close(2)  # the daemon reads it until its end
        daemon.recv(1)
    if is_dead(directory):
        unmount(directory, lazy=True, owner="")


def mount(directory: str, device: int, options: Sequence[str]) -> None:
    """Raises OSError."""
    fd = open_directory(directory)
    try:
        owner = {"user_id": os.getuid(), "group_id": os.getgid()}
        given = [each for each in options if each.startswith(FUSE_OPTIONS)]
        missing = [f"{name}={number}" for name, number in owner.items() if f"{name}=" not in ",".join(given)]
        data = ",".join([f"fd={device}", "rootmode=40000", *given, *missing]).encode()
        target = f"/proc/self/fd/{fd}".encode()  # this folder, even if its path was changed meanwhile
        done = libc.mount(b"ipfsfuse", target, b"fuse.ipfsfuse", MS_NOSUID | MS_NODEV, data)
        if done != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)


def open_directory(directory: str) -> int:
    """Opens the folder without following a symlink in its path. Raises OSError."""
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in filter(None, directory.split("/")):
        below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def raise_readahead(directory: str, options: Sequence[str]) -> None:
    """Sets the kernel's read-ahead to `readahead=`, in KiB. A daemon of another user may not do that."""
    wanted = [each.partition("=")[2] for each in options if each.startswith("readahead=")]
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        devices = [line.split(" ")[2] for line in lines if line.split(" ")[4] == directory]
    for kib in wanted[:1] if devices else ():
        # if it fails, reads are only slower
        with suppress(OSError), open(f"/sys/class/bdi/{devices[-1]}/read_ahead_kb", "w") as setting:
            setting.write(kib)


def is_dead(directory: str) -> bool:
    """Whether the mount's daemon is gone. Opens the directory, because its attributes may be cached."""
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(directory: str, lazy: bool, owner: str) -> None:
    """Unmounts. With `owner` (`user_id=N`), only a mount of that user, and always lazily. Raises OSError."""
    fd = open_directory(directory)
    try:
        if owner and not belongs(fd, owner):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if lazy or owner:
            done = libc.umount2(f"/proc/self/fd/{fd}".encode(), MNT_DETACH)
    finally:
        os.close(fd)
    if not lazy and not owner:
        done = libc.umount2(os.fsencode(directory), UMOUNT_NOFOLLOW)
    if done != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def belongs(fd: int, owner: str) -> bool:
    """Whether the open folder is in a mount of ipfsfuse's that belongs to `owner`."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        number = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        [line] = [line.rstrip("\n") for line in lines if line.startswith(f"{number} ")]
    kind, _source, options = line.rpartition(" - ")[2].split(" ", 2)
    return kind == "fuse.ipfsfuse" and owner in options.split(",")


libc = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
