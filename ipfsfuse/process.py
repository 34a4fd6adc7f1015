"""The process of a daemon: its user, the files that it may reach, its signals, descriptors and memory."""

import ctypes
import gc
import logging
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ipfsfuse import confinement
from ipfsfuse.cache.store.folder import CacheFolder
from ipfsfuse.config import MountConfig, User
from ipfsfuse.confinement import Access
from ipfsfuse.control import live_mounts
from ipfsfuse.errors import MountFailed, StoreFailed
from ipfsfuse.fileio.buffers import lend
from ipfsfuse.sources.defaults import LIBRARY
from ipfsfuse.sources.local import library_folder
from ipfsfuse.sources.spec import source_files, source_sockets

log = logging.getLogger("ipfsfuse.mount")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Parameters of mallopt(3)."""
_OLDEST = 2
"""The generation of a full pass of the garbage collector."""
LONG_PASS = 0.01
"""Seconds of a full pass that is too long."""
THRESHOLDS = 700, 10, 4
"""For gc.set_threshold: a full pass comes after 28,000 new objects; by default after 70,000."""
LEAF, TOUCHED = 1 << 20, 3
"""Bytes of a leaf. A read of it takes so many times as much memory, for the received pieces and the whole."""


# -- user and confinement ------------------------------------------------------------------------------------


def become(user: User, folders: Sequence[Path]) -> None:
    """Changes the user from root to `user` for good. Before that, makes those of `folders` that only root can
    make, and gives them to the user. Raises MountFailed."""
    for path in folders:
        trusted = [os.stat(parent) for parent in path.parents if parent.exists()]
        if path.parent.exists() and not any(info.st_uid or info.st_mode & 0o022 for info in trusted):
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            if os.lstat(path).st_uid == 0 and not os.listdir(path):
                os.chown(path, user.uid, user.gid, follow_symlinks=False)
    try:
        os.initgroups(user.name, user.gid)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as exc:
        raise MountFailed(f"--user {user.name}: can't be changed to: {exc.strerror}") from exc


SYSTEM_FOLDERS = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/proc", "/sys",
    "/nix", "/gnu", "/snap", "/dev/urandom", "/dev/zero",
    "/run/systemd", "/run/NetworkManager", "/run/resolvconf", "/run/netconfig", "/run/connman", "/run/nscd",
    "/run/current-system", "/run/opengl-driver",
    "/etc/resolv.conf", "/etc/ssl/certs", "/etc/ssl/cert.pem", "/etc/pki/tls/certs", "/var/lib/sss",
)  # fmt: skip
"""Folders of programs, certificates, addresses of name servers, and files of the kernel. Paths in /etc may be
links to another folder, as on openSUSE. In /run only folders with addresses of name servers are listed, since
it also holds secrets of containers and of users."""


def confine(config: MountConfig, folder: CacheFolder, reads: Sequence[Path], writes: Sequence[Path]) -> str:
    """Gives up new privileges, capabilities, and, with landlock, all files that this mount does not need. If
    an attacker takes over the daemon through data of a source, the attacker can read no keys in a home
    folder, and write only to the cache.

    It applies to threads that start later. The thread that watches the starter until `ready` is older, and is
    not confined. Returns a text that names what confines the daemon."""
    # an editable installation is not on sys.path
    modules = [sys.prefix, sys.base_prefix, *filter(None, sys.path), os.path.dirname(__file__)]
    paths = [*map(Path, SYSTEM_FOLDERS), *map(Path, modules)]
    if LIBRARY in config.sources:
        with suppress(StoreFailed):  # reported when the source is opened
            library_folder.prepare(config.library)
    paths += source_files(config.sources, config.library)
    paths += [path for _url, path in config.header_files]
    files = ("SSL_CERT_FILE", "SSL_CERT_DIR", "IPFSFUSE_KUBO_AUTH_FILE")
    replaced = [*reads, *(Path(os.environ[name]) for name in files if os.environ.get(name))]
    paths += [each for path in replaced for each in (path, _folder_of(path), _folder_of(path.resolve()))]
    # on a full disk the folder may not exist yet
    cache = next(path for path in [_folder_of(folder.path), *folder.path.parents] if path.exists())
    own = [cache, *map(_writable, writes), Path("/dev/null"), Path("/sys/devices/virtual/bdi")]
    own += [path for path in [live_mounts.usable_folder()] if path]
    emptied = [Path(tempfile.gettempdir())] if config.isolated else []
    emptied += [config.mountpoint.parent] if config.while_held else []
    os.environ["SQLITE_TMPDIR"] = str(folder.path)
    with ExitStack() as stack:

        def open_path(path: Path) -> int | None:
            with suppress(OSError):
                file = os.open(path, os.O_PATH | os.O_CLOEXEC)
                stack.callback(os.close, file)
                return file
            return None

        allowed = [Access(file) for path in paths if (file := open_path(path))]
        allowed += [Access(file, write=True) for path in own if (file := open_path(path))]
        allowed += [Access(file, remove_folders=True) for path in emptied if (file := open_path(path))]
        kept = _kept_capabilities(config, own)
        layers = ["no_new_privs"] if confinement.refuse_new_privileges() else []
        # the service manager may listen at an abstract socket
        scopes = confinement.SIGNALS
        if not os.environ.get("NOTIFY_SOCKET", "").startswith("@"):
            scopes |= confinement.ABSTRACT_SOCKETS
        if confinement.restrict(allowed, confinement.BIND_TCP, scopes):
            layers.append("landlock")
        if os.geteuid() == 0 and confinement.drop_capabilities(list(kept.values())):
            layers.append(f"capabilities (kept: {', '.join(kept)})")
    return ", ".join(layers) or "nothing that this kernel has"


def _kept_capabilities(config: MountConfig, written: Sequence[Path]) -> dict[str, int]:
    """The capabilities that a daemon which stays root needs. (Its helpers mount and unmount.) It reads files
    of other users, such as a node's repository. It may have to write into a folder of another user, or
    connect to another user's socket. With --passthrough it registers files with the kernel."""
    kept = {"dac_read_search": confinement.CAP_DAC_READ_SEARCH}
    if not all(map(_is_roots, [*written, *source_sockets(config.sources)])):
        kept["dac_override"] = confinement.CAP_DAC_OVERRIDE
    if config.passthrough:
        kept["sys_admin"] = confinement.CAP_SYS_ADMIN
    return kept


def _is_roots(path: Path) -> bool:
    with suppress(OSError):
        return os.stat(path).st_uid == 0
    return False


def _folder_of(file: Path) -> Path:
    """The folder of `file`, since another file may replace `file`. But `file` itself if the folder contains
    this user's home."""
    home = Path(os.path.realpath(os.path.expanduser("~")))
    return file if home.is_relative_to(file.parent.resolve()) else file.parent


def _writable(file: Path) -> Path:
    """The path that must be writable for the log `file`."""
    folder = _folder_of(file)
    if folder == file:
        with suppress(OSError):  # reported when the log is opened
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            os.close(os.open(file, flags, 0o600))
        log.warning(
            "--log-file %s: a confined daemon may not write all of %s, so this log can't be put aside, and "
            "begins again when it is full: give it a folder of its own, or mount with --unconfined",
            file,
            file.parent,
        )
    return folder


# -- signals, descriptors and memory -------------------------------------------------------------------------


def ignore_signals(also_hangup: bool) -> None:
    """Ignores signals that would end the daemon by mistake. (Signals of a bug, such as SIGSEGV, still end
    it.)"""
    timers = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)
    others = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGIO, signal.SIGPWR)
    hangup = [signal.SIGHUP] if also_hangup else []
    for number in (*timers, *others, *hangup, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)):
        signal.signal(number, signal.SIG_IGN)


def raise_descriptors() -> None:
    """Raises the limit of open files as far as this user may: for each source, up to 144 connections can be
    open, with two descriptors each."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def reuse_memory() -> None:
    """Lets glibc keep up to 32 MiB of freed memory. Leaves of 1 MiB are allocated and freed all the time, and
    the kernel clears the pages of new memory: this saves a tenth of the CPU of a cold read. Larger blocks are
    given back to the kernel: forty directories of 2 MiB each left holes of 25 MiB. Other C libraries have no
    such call."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 3 << 19)
        libc.mallopt(_M_TRIM_THRESHOLD, 32 << 20)
        libc.mallopt(_M_ARENA_MAX, 1)  # else each worker thread has its own memory to be cleared


@contextmanager
def short_collections() -> Iterator[None]:
    """Keeps full passes of the garbage collector short: with a million inodes each would stop the event loop
    for 0.2 s. After a long pass, all surviving objects are frozen: later passes skip them. Their reference
    counts still free them, unless they have become part of a cycle."""
    began = 0.0

    def freeze(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        elif info["generation"] == _OLDEST and time.thread_time() - began > LONG_PASS:
            gc.freeze()

    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    gc.callbacks.append(freeze)
    try:
        yield
    finally:
        gc.callbacks.remove(freeze)
        gc.set_threshold(*before)


def touch_memory() -> None:
    """Makes the kernel clear the memory for the first leaf now. Later it would take 1 ms of the first
    read."""
    _ = [b"\1" * LEAF for _ in range(TOUCHED)]
    lend(LEAF)[0] = 1
