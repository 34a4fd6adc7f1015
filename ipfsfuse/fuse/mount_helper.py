"""Mounts and unmounts by the system calls themselves, called as fusermount3 is:

    mount_helper.py -o OPTIONS -- DIRECTORY
    mount_helper.py [-o user_id=N] -u [-q] [-z] -- DIRECTORY

It stands in for fusermount3 where root has none (a small container), and where root's mount is to belong to
another user, which fusermount3 can't do: `user_id=` and `group_id=` among OPTIONS name that user. As there,
the device goes out over the socket that _FUSE_COMMFD names, and what is mounted is taken away when that
closes and nobody answers any more.

The daemon of such a mount is that user's, and may ask for anything: symlinks are not followed, and with
`user_id=` nothing is unmounted but that user's mounts of ipfsfuse.

A program of its own, run by its path: it takes from the standard library alone, and starts in 15 ms.
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
PASSED_ON = ("allow_other", "user_id=", "group_id=")


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
    """Raises OSError where it can't be mounted."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the daemon must leave it somebody to clean up
    with socket.socket(fileno=int(os.environ["_FUSE_COMMFD"])) as daemon:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        mount(directory, device, options)
        socket.send_fds(daemon, [b"\0"], [device])
        os.close(device)
        raise_readahead(directory, options)
        os.close(2)  # the daemon reads it up to its end
        daemon.recv(1)
    if is_dead(directory):
        unmount(directory, lazy=True, owner="")


def mount(directory: str, device: int, options: Sequence[str]) -> None:
    """Raises OSError."""
    place = opened(directory)
    try:
        owner = {"user_id": os.getuid(), "group_id": os.getgid()}
        given = [each for each in options if each.startswith(PASSED_ON)]
        missing = [f"{name}={number}" for name, number in owner.items() if f"{name}=" not in ",".join(given)]
        data = ",".join([f"fd={device}", "rootmode=40000", *given, *missing]).encode()
        target = f"/proc/self/fd/{place}".encode()  # this folder, whatever its path leads to by now
        done = libc.mount(b"ipfsfuse", target, b"fuse.ipfsfuse", MS_NOSUID | MS_NODEV, data)
        if done != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(place)


def opened(directory: str) -> int:
    """The folder as it is now, reached without following a symlink. Raises OSError."""
    place = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in filter(None, directory.split("/")):
        below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
        os.close(place)
        place = below
    return place


def raise_readahead(directory: str, options: Sequence[str]) -> None:
    """The daemon may not, when it is another user's by then. `readahead=` is in KiB."""
    wanted = [each.partition("=")[2] for each in options if each.startswith("readahead=")]
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        devices = [line.split(" ")[2] for line in lines if line.split(" ")[4] == directory]
    for kib in wanted[:1] if devices else ():
        # where that fails, reads are slower, and no less right
        with suppress(OSError), open(f"/sys/class/bdi/{devices[-1]}/read_ahead_kb", "w") as setting:
            setting.write(kib)


def is_dead(directory: str) -> bool:
    """Opened, not asked for its attributes: those may be cached."""
    try:
        os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(directory: str, lazy: bool, owner: str) -> None:
    """Of `owner` (`user_id=N`) alone, where it is given; then always lazily. Raises OSError."""
    place = opened(directory)
    try:
        if owner and not belongs(place, owner):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if lazy or owner:
            done = libc.umount2(f"/proc/self/fd/{place}".encode(), MNT_DETACH)
    finally:
        os.close(place)
    if not lazy and not owner:
        done = libc.umount2(os.fsencode(directory), UMOUNT_NOFOLLOW)
    if done != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def belongs(place: int, owner: str) -> bool:
    """Whether the open folder is in a mount of ipfsfuse's that belongs to `owner`."""
    with open(f"/proc/self/fdinfo/{place}", encoding="ascii") as lines:
        number = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        [line] = [line.rstrip("\n") for line in lines if line.startswith(f"{number} ")]
    kind, _source, options = line.rpartition(" - ")[2].split(" ", 2)
    return kind == "fuse.ipfsfuse" and owner in options.split(",")


libc = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
