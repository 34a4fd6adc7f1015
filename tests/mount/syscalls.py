"""Makes one system call, which is given by name. Prints the errno's name, or `ok`.

usage: python syscalls.py CALL FOLDER    (FOLDER is a mounted copy of the sample tree)
"""

import ctypes
import errno
import fcntl
import os
import sys
from collections.abc import Callable

O_TMPFILE = 0o20200000
libc = ctypes.CDLL(None, use_errno=True)


def c_call(name: str, *arguments: object) -> None:
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def opened(flags: int) -> Callable[[str], object]:
    return lambda f: os.open(f"{f}/hello.txt", flags)


def with_file(act: Callable[[int], object]) -> Callable[[str], object]:
    """A call on a descriptor that is open for reading."""
    return lambda f: act(os.open(f"{f}/hello.txt", os.O_RDONLY))


def read_all(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


CALLS: dict[str, Callable[[str], object]] = {
    "open-wronly": opened(os.O_WRONLY),
    "open-rdwr": opened(os.O_RDWR),
    "open-append": opened(os.O_WRONLY | os.O_APPEND),
    "open-trunc": opened(os.O_WRONLY | os.O_TRUNC),
    "open-rdonly-trunc": opened(os.O_RDONLY | os.O_TRUNC),
    "open-creat-existing": opened(os.O_WRONLY | os.O_CREAT),
    "create": lambda f: os.open(f"{f}/new", os.O_WRONLY | os.O_CREAT, 0o644),
    "create-root": lambda f: os.open(f"{f}/../new", os.O_WRONLY | os.O_CREAT, 0o644),
    "create-excl": lambda f: os.open(f"{f}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644),
    "mkdir": lambda f: os.mkdir(f"{f}/new"),
    "mkdir-root": lambda f: os.mkdir(f"{f}/../new"),
    "mknod": lambda f: os.mknod(f"{f}/new", 0o100644),
    "mkfifo": lambda f: os.mkfifo(f"{f}/new"),
    "symlink": lambda f: os.symlink("x", f"{f}/new"),
    "link": lambda f: os.link(f"{f}/hello.txt", f"{f}/new"),
    "unlink": lambda f: os.unlink(f"{f}/hello.txt"),
    "unlink-symlink": lambda f: os.unlink(f"{f}/link"),
    "rmdir": lambda f: os.rmdir(f"{f}/empty-dir"),
    "rmdir-root": lambda f: os.rmdir(f),
    "rename": lambda f: os.rename(f"{f}/hello.txt", f"{f}/new"),
    "rename-over": lambda f: os.rename(f"{f}/hello.txt", f"{f}/big.bin"),
    "rename-dir": lambda f: os.rename(f"{f}/dir", f"{f}/new"),
    "chmod": lambda f: os.chmod(f"{f}/hello.txt", 0o777),
    "chmod-dir": lambda f: os.chmod(f"{f}/dir", 0o777),
    "fchmod": with_file(lambda fd: os.fchmod(fd, 0o777)),
    "chown": lambda f: os.chown(f"{f}/hello.txt", os.getuid(), -1),
    "lchown": lambda f: os.lchown(f"{f}/link", os.getuid(), -1),
    "utimensat": lambda f: os.utime(f"{f}/hello.txt", (1, 1)),
    "utimensat-symlink": lambda f: os.utime(f"{f}/link", (1, 1), follow_symlinks=False),
    "futimens": with_file(lambda fd: os.utime(fd, (1, 1))),
    "truncate": lambda f: os.truncate(f"{f}/hello.txt", 1),
    "truncate-same": lambda f: os.truncate(f"{f}/hello.txt", 6),
    "setxattr": lambda f: os.setxattr(f"{f}/hello.txt", "user.x", b"1"),
    "setxattr-own": lambda f: os.setxattr(f"{f}/hello.txt", "ipfs.cid", b"1"),
    "removexattr": lambda f: os.removexattr(f"{f}/hello.txt", "ipfs.cid"),
    # calls that the kernel answers before the mount is asked
    "rename-out": lambda f: os.rename(f"{f}/hello.txt", "/tmp/ipfsfuse-test-never-there"),
    "link-out": lambda f: os.link(f"{f}/hello.txt", "/tmp/ipfsfuse-test-never-there"),
    "ftruncate-rdonly": with_file(lambda fd: os.ftruncate(fd, 1)),
    "write-rdonly": with_file(lambda fd: os.write(fd, b"x")),
    "fallocate-rdonly": with_file(lambda fd: os.posix_fallocate(fd, 0, 10)),
    "copy-file-range-rdonly": with_file(lambda fd: os.copy_file_range(fd, fd, 1, 0, 3)),
    "mkdir-existing": lambda f: os.mkdir(f"{f}/dir"),
    "symlink-existing": lambda f: os.symlink("x", f"{f}/dir"),
    "create-excl-existing": opened(os.O_WRONLY | os.O_CREAT | os.O_EXCL),
    "open-directory-wronly": lambda f: os.open(f"{f}/dir", os.O_WRONLY),
    "unlink-directory": lambda f: os.unlink(f"{f}/dir"),
    "rmdir-file": lambda f: os.rmdir(f"{f}/hello.txt"),
    "file-as-directory": lambda f: os.open(f"{f}/hello.txt/x", os.O_RDONLY),
    "unlink-absent": lambda f: os.unlink(f"{f}/absent"),
    "open-tmpfile": lambda f: os.open(f"{f}/dir", os.O_WRONLY | O_TMPFILE, 0o600),
    "rename-same-inode": lambda f: os.rename(f"{f}/hello.txt", f"{f}/dir/same.txt"),
    "mmap-shared-write": with_file(lambda fd: __import__("mmap").mmap(fd, 6, prot=2, flags=1)),
    # calls that read, and calls that ask for rights
    "open-rdonly": opened(os.O_RDONLY),
    "lookup-absent": lambda f: os.stat(f"{f}/absent"),
    "lookup-no-cid": lambda f: os.stat(f"{f}/../no-cid"),
    "lookup-wrong-digit": lambda f: os.stat(f"{f}/../{os.path.basename(f)[:-1]}1"),
    "name-256": lambda f: os.stat(f"{f}/{'n' * 256}"),
    "name-256-root": lambda f: os.stat(f"{f}/../{'n' * 256}"),
    "read-directory": lambda f: os.read(os.open(f"{f}/dir", os.O_RDONLY), 1),
    "readlink-file": lambda f: os.readlink(f"{f}/hello.txt"),
    "getxattr-absent": lambda f: os.getxattr(f"{f}/hello.txt", "user.absent"),
    "getxattr-acl": lambda f: os.getxattr(f"{f}/hello.txt", "system.posix_acl_access"),
    "access-w": lambda f: c_call("access", f"{f}/hello.txt".encode(), os.W_OK),
    "access-w-dir": lambda f: c_call("access", f"{f}/dir".encode(), os.W_OK),
    "access-r": lambda f: c_call("access", f"{f}/hello.txt".encode(), os.R_OK),
    "access-x": lambda f: c_call("access", f"{f}/hello.txt".encode(), os.X_OK),
    "flock": with_file(lambda fd: fcntl.flock(fd, fcntl.LOCK_SH)),
    "fsync": with_file(os.fsync),
    "stat": os.stat,
    "read": lambda f: read_all(f"{f}/hello.txt"),
    "list": os.listdir,
}

if __name__ == "__main__":
    try:
        CALLS[sys.argv[1]](sys.argv[2])
        print("ok")
    except OSError as exc:
        print(errno.errorcode.get(exc.errno or 0, exc.errno))
