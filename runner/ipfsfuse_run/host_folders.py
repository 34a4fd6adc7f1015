"""The runner's own folders, and the folders that a guest may write to besides those of --dir: /tmp, which is
private, bounded and removed at the end; and /out, the folder of its results.

/tmp is a tmpfs without a name if the machine lets this user mount one (users other than root need a user and
mount namespace). Otherwise it is a folder that is measured as it grows. A process of its own removes that
folder when the guest's process has ended, however it ended.
"""

import contextlib
import ctypes
import os
import select
import stat
from typing import NamedTuple

from ipfsfuse.errors import StoreFailed, UsageError
from ipfsfuse_run import growth, processes

_LOOK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Tmp(NamedTuple):
    """The guest's /tmp, opened. `folder` is its path if it must be measured; None for a tmpfs."""

    file: int
    folder: str | None


def make_tmp(size: int, held: int) -> Tmp:
    """An empty folder for `size` bytes. Call it in the guest's process while that has one thread: the process
    may enter namespaces of its own. The process that removes the folder keeps the descriptor `held` open
    until then. Raises StoreFailed."""
    file = _tmpfs(size)
    if file is not None:
        return Tmp(file, None)
    folder = scratch_folder("tmp", os.getpid(), held)
    return Tmp(os.open(folder, _LOOK), folder)


def tmpfs_is_offered() -> bool:
    """Whether /tmp is a tmpfs on this machine. A process of its own tries it."""
    pid = processes.fork(lambda: os._exit(_tmpfs(1 << 20) is None))
    return os.waitpid(pid, 0)[1] == 0


# -- a tmpfs without a name (fsopen(2), fsconfig(2), fsmount(2)) --------------------------------------------

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_PR_SET_DUMPABLE = 4


def _tmpfs(size: int) -> int | None:
    """A descriptor of an empty tmpfs; None where the kernel refuses it."""
    libc = ctypes.CDLL(None, use_errno=True)
    made = _mounted_tmpfs(libc, size)
    if made is None and _enter_namespaces(libc):
        made = _mounted_tmpfs(libc, size)
    return made


def _mounted_tmpfs(libc: ctypes.CDLL, size: int) -> int | None:
    context = libc.syscall(_FSOPEN, b"tmpfs", _CLOEXEC)
    if context < 0:
        return None
    try:
        # an empty file or folder takes an inode, but no page
        for name, value in (("size", size), ("nr_inodes", 64 + size // growth.NAME_BYTES), ("mode", 700)):
            if libc.syscall(_FSCONFIG, context, _SET_STRING, name.encode(), b"%d" % value, 0) != 0:
                return None
        if libc.syscall(_FSCONFIG, context, _CREATE, None, None, 0) != 0:
            return None
        file = int(libc.syscall(_FSMOUNT, context, _CLOEXEC, _NOSUID | _NODEV | _NOEXEC))
        return file if file >= 0 else None
    finally:
        os.close(context)


def _enter_namespaces(libc: ctypes.CDLL) -> bool:
    """Enters a user namespace, in which this user keeps its number and may mount, and a mount namespace.
    Later mounts and unmounts outside still appear in it, because the kernel makes all its mounts slaves
    (mount_namespaces(7))."""
    user, group, parent = os.geteuid(), os.getegid(), os.getppid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
        return False
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # otherwise /proc/self belongs to root
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError:
        return False
    finally:
        processes.die_with(parent)  # again: a change of privileges can clear it (prctl(2))
    return True


# -- the runner's own folder -------------------------------------------------------------------------------


def cache_home() -> str:
    """The user's cache folder. A relative XDG_CACHE_HOME is ignored, as the XDG specification says."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), ".cache")


def private_folder(*parts: str) -> str:
    """`$XDG_CACHE_HOME/ipfsfuse-run/parts...`, created if it is missing.

    Raises StoreFailed if a folder of the path can't be created, is a symlink, or is not private to this
    user."""
    path = os.path.join(cache_home(), "ipfsfuse-run")
    if not os.path.isabs(path):
        raise StoreFailed("there is no home folder to put things in: set HOME or XDG_CACHE_HOME")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for depth, part in enumerate(("", *parts)):
            path = os.path.join(path, part) if part else path
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass  # it may be anything: checked next, without following a symlink
            # An earlier version created the deeper folders with mode 0755. No other user can reach them.
            _check_private(path, 0o077 if depth < 2 else 0o022)
    except OSError as exc:
        raise StoreFailed(f"the folder {path} can't be used: {exc.strerror}") from exc
    return path


def _check_private(path: str, forbidden: int) -> None:
    """Raises StoreFailed unless `path` is a folder of this user's without the mode bits `forbidden`."""
    found = os.lstat(path)
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or mode & forbidden:
        raise StoreFailed(
            f"{path} must be a folder of yours alone (mode 0700): remove it, or set XDG_CACHE_HOME to "
            "another folder"
        )


# -- folders that are removed when a process ends ----------------------------------------------------------


def scratch_folder(kind: str, owner: int, *held: int) -> str:
    """A new folder in the runner's own folder. Forks a process that removes it when the process `owner` has
    ended, and keeps the descriptors `held` open until then. Raises StoreFailed."""
    folder = private_folder(kind, os.urandom(8).hex())
    watched = os.pidfd_open(owner)

    def remove() -> None:
        processes.ignore_signals()
        os.setsid()
        processes.detach(watched, *held)
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.poll()
        remove_tree(folder)

    # the process between the two ends at once, so that no process has to wait for the removing one
    pid = processes.fork(lambda: processes.fork(remove, dies_with_us=False))
    os.waitpid(pid, 0)
    os.close(watched)
    return folder


def remove_tree(path: str) -> None:
    """Removes the folder `path` and its content, at any depth. Leaves what can't be removed.

    A guest can nest folders so deeply that no path reaches them and Python can't recurse into them. So deeper
    folders are moved up first."""
    with contextlib.suppress(OSError):
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _empty(top)
        finally:
            os.close(top)
        os.rmdir(path)


def _empty(top: int) -> None:
    moved = 0
    while True:
        names = os.listdir(top)
        before = moved
        for name in names:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                os.unlink(name, dir_fd=top)
                continue
            os.chmod(name, 0o700, dir_fd=top)  # a guest's native code may have removed the owner's rights
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                for inner in os.listdir(folder):
                    if stat.S_ISDIR(os.lstat(inner, dir_fd=folder).st_mode):
                        moved += 1
                        fresh = f".{os.urandom(8).hex()}"
                        os.rename(inner, fresh, src_dir_fd=folder, dst_dir_fd=top)
                    else:
                        os.unlink(inner, dir_fd=folder)
            finally:
                os.close(folder)
            os.rmdir(name, dir_fd=top)
        if moved == before:
            return


# -- the folder of results ---------------------------------------------------------------------------------


class ResultsFolder(NamedTuple):
    """The folder for the guest's results. `path` contains no symlink."""

    path: str
    made: bool

    def discard(self) -> None:
        """Removes the folder if `results_folder` made it and it is empty."""
        if self.made:
            with contextlib.suppress(OSError):
                os.rmdir(self.path)


def results_folder(path: str) -> ResultsFolder:
    """The folder `path`, created, or existing and empty. Raises UsageError, StoreFailed."""
    made = False
    try:
        os.mkdir(path)
        made = True
    except FileExistsError:
        _check_empty(path)
    except OSError as exc:
        raise StoreFailed(f"--out {path} can't be made: {exc.strerror}") from exc
    return ResultsFolder(os.path.realpath(path), made)


def _check_empty(path: str) -> None:
    try:
        with os.scandir(path) as entries:
            first = next(entries, None)
    except OSError as exc:
        raise StoreFailed(f"--out {path} can't be used: {exc.strerror}") from exc
    if first is not None:
        raise UsageError(f"--out {path} is not empty: it would mix the results with what is there")
