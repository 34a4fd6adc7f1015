"""What a guest can reach: `/`, `/ipfs`, `/tmp`, `/out` if results are wanted, and the folders given with
--dir. It gets no socket and none of the host's variables.

`/` is the directory given with --root, else a read-only folder that holds the other names, for programs that
walk from the root. That one lies in the runner's cache folder, named after what it holds, so nothing is left
to remove after a kill.
"""

import contextlib
import hashlib
import os
import posixpath
import resource
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ipfsfuse.errors import StoreFailed, UsageError
from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.options import Dir, Options

IPFS, IPNS, TMP, OUT = "/ipfs", "/ipns", "/tmp", "/out"


TMP_BYTES = 256 << 20
"""What /tmp may hold by default."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Preopen(NamedTuple):
    """A folder of the host at a name of the guest's."""

    host: str
    guest: str
    writable: bool
    mount_id: int | None = None
    """The kernel's number of the mount that `host` must be in; None for any folder."""
    below: str | None = None
    """`host` is the path of a folder below this one, which no symlink may lead out of."""


class Sandbox(NamedTuple):
    """All that a guest is given. `argv` starts with its own name."""

    argv: Sequence[str]
    env: Sequence[tuple[str, str]]
    preopens: Sequence[Preopen]
    cwd: str | None
    limits: Limits
    tmp: int = 0
    """Bytes that the guest's own `/tmp` may hold; 0 for none. It is not among `preopens`."""

    @property
    def variables(self) -> dict[str, str]:
        """`env`, and PWD if there is a working directory."""
        return ({} if self.cwd is None else {"PWD": self.cwd}) | dict(self.env)


def build(
    options: Options, mountpoint: str, mount_id: int | None = None, names: Mapping[str, str] = NO_NAMES
) -> Sandbox:
    """`names`: what each IPNS name stands for, a path below the mountpoint. Raises UsageError,
    StoreFailed."""
    # with --invoke, these are the function's
    argv = (options.argv0 or posixpath.basename(options.guest), *options.args)
    guests = [options.cwd or "", *(each.guest for each in options.dirs)]
    for text in (*argv, *guests, *names, *(part for variable in options.env for part in variable)):
        _check_text(text)
    tmp = _tmp_size(options)
    folders = preopens(mountpoint, options, mount_id, names, [TMP] * bool(tmp))
    return Sandbox(argv, options.env, folders, options.cwd, options.limits, tmp)


def _tmp_size(options: Options) -> int:
    given = any(_name(each) == TMP for each in options.dirs)
    if given and options.tmp:
        raise UsageError("--tmp goes with no --dir for /tmp: the folder given is the guest's /tmp")
    return 0 if given else TMP_BYTES if options.tmp is None else options.tmp


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(
            f"{text!r} is not UTF-8: WASI knows no other arguments, variables and names"
        ) from exc


def preopens(
    mountpoint: str,
    options: Options,
    mount_id: int | None = None,
    names: Mapping[str, str] = NO_NAMES,
    more: Sequence[str] = (),
) -> list[Preopen]:
    """`/`, `/ipfs`, what is below `/ipns`, `/out`, and the folders of --dir, in this order. Nothing is
    opened. `more`: other names that `/` must have. Raises UsageError for a name that the guest can't have."""
    found = [Preopen(mountpoint, IPFS, writable=False, mount_id=mount_id)]
    for name, path in names.items():
        found.append(
            Preopen(os.path.join(mountpoint, path), f"{IPNS}/{name}", writable=False, mount_id=mount_id)
        )
    if options.out is not None:
        found.append(Preopen(options.out, OUT, writable=True))
    for each in options.dirs:
        guest = _name(each)
        if guest == ".." or guest.startswith("../") or "\0" in guest:
            raise UsageError(f"--dir {each.host}::{each.guest}: the guest's name for it can't lead upward")
        if _below("/" + guest.lstrip("/"), IPFS):  # WASI's C library takes `ipfs` and `//ipfs` for it too
            raise UsageError(f"--dir {each.host}::{each.guest}: /ipfs is the mount's")
        if names and _below("/" + guest.lstrip("/"), IPNS):
            raise UsageError(f"--dir {each.host}::{each.guest}: /ipns has the names given with --ipns")
        if options.out is not None and _below("/" + guest.lstrip("/"), OUT):
            raise UsageError(f"--dir {each.host}::{each.guest}: /out is the folder of --out")
        if options.root is not None and guest == "/":
            raise UsageError(f"--dir {each.host}::/: / is the directory of --root")
        found.append(Preopen(each.host, guest, each.writable))
    if options.root is not None:
        found.insert(0, Preopen(options.root, "/", writable=False, mount_id=mount_id, below=mountpoint))
    elif not any(each.guest == "/" for each in found):
        root = _root([*(each.guest for each in found), *more])
        found.insert(0, Preopen(root, "/", writable=False))
    return found


def is_tmp(cwd: str | None) -> bool:
    return cwd is not None and posixpath.normpath(cwd) == TMP


def _name(given: Dir) -> str:
    """The guest's name for the folder."""
    return posixpath.normpath(given.guest)


def _root(names: Sequence[str]) -> str:
    inside = sorted(each.strip("/") for each in names if each.startswith("/"))
    digest = hashlib.sha256("\0".join(inside).encode(errors="surrogateescape")).hexdigest()[:16]
    root = private_folder("roots", digest)
    for each in inside:
        private_folder("roots", digest, *filter(None, each.split("/")))
    for folder, _names, _files in os.walk(root):
        os.chmod(folder, 0o500)  # the wasmtime command gives every folder to write to
    return root


_LOOK = os.O_PATH | os.O_CLOEXEC


class OpenFolder(NamedTuple):
    """A folder that was opened for the guest. `path` names this very folder, whatever becomes of the name
    `host` that it was opened by."""

    host: str
    file: int
    guest: str
    writable: bool
    in_mount: bool = False
    """Whether it is the top of a mount of ours, which refuses writes itself."""

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.file}"


@contextlib.contextmanager
def opened_folders(box: Sandbox) -> Iterator[list[OpenFolder]]:
    """The preopens, and `.` for the working directory: WASI has none, and its C library resolves relative
    names by that preopen. Only the guest's process opens them: they may be in the mount. Raises
    GuestRefused."""
    with contextlib.ExitStack() as stack:
        found = []
        for each in box.preopens:
            if each.below is not None:
                name = f"--root {each.host}"
                root = inside(each.below, each.host, name, os.O_DIRECTORY, each.mount_id)
                file = int(os.path.basename(stack.enter_context(root)))
                found.append(OpenFolder(name, file, each.guest, each.writable, each.mount_id is not None))
                continue
            try:
                folder = os.open(each.host, _LOOK | os.O_DIRECTORY)
            except OSError as exc:
                hint = " (two colons part it from the guest's name: HOST::GUEST)" if ":" in each.host else ""
                raise GuestRefused(
                    f"the folder {each.host} can't be opened for the guest: {exc.strerror}{hint}"
                ) from exc
            stack.callback(os.close, folder)
            _check_mount(folder, each.mount_id, each.host)
            found.append(OpenFolder(each.host, folder, each.guest, each.writable, each.mount_id is not None))
        if box.cwd is not None and not (box.tmp and is_tmp(box.cwd)):
            base, rest = _working_folder(box.cwd, box.preopens)
            top = base.host if base.below is None else os.path.join(base.below, base.host)
            place = inside(top, rest, f"--cwd {box.cwd}", os.O_DIRECTORY, base.mount_id)
            file = int(os.path.basename(stack.enter_context(place)))
            found.append(OpenFolder(box.cwd, file, ".", base.writable, base.mount_id is not None))
        yield found


def _check_mount(file: int, mount_id: int | None, path: str) -> None:
    """Raises GuestRefused unless the open `file` is in the mount of that number. Asks the kernel alone, not
    the mount's daemon."""
    if mount_id is None:
        return
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as lines:
        found = next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)
    if found != mount_id:
        raise GuestRefused(f"{path} is not the mount any more that was found there: run it again")


def _path(file: int) -> str:
    return f"/proc/self/fd/{file}"


def _working_folder(cwd: str, given: Sequence[Preopen]) -> tuple[Preopen, str]:
    """`cwd` as a folder that was given, and a name below it. Raises GuestRefused."""
    wanted = posixpath.normpath(cwd)
    base = max(
        (each for each in given if _below(wanted, each.guest)), key=lambda each: len(each.guest), default=None
    )
    if base is None:
        raise GuestRefused(f"--cwd {cwd} is in no folder that the guest has")
    return base, wanted[len(base.guest.rstrip("/")) :].lstrip("/")


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


@contextlib.contextmanager
def inside(base: str, rest: str, name: str, flags: int = 0, mount_id: int | None = None) -> Iterator[str]:
    """A path of the file that `rest` leads to below `base`. Raises GuestRefused if a symlink leads out of
    `base`.

    The check comes after the opening: whoever may write below `base` could change it after an earlier
    check."""
    with contextlib.ExitStack() as stack:
        top, file = (
            _opened(path, name, more, stack) for path, more in ((base, 0), (os.path.join(base, rest), flags))
        )
        for each in (top, file):
            _check_mount(each, mount_id, base)
        if not _below(os.readlink(_path(file)), os.readlink(_path(top))):
            raise GuestRefused(f"{name} leads out of {base}")
        yield _path(file)


def _opened(path: str, name: str, flags: int, stack: contextlib.ExitStack) -> int:
    try:
        file = os.open(path, _LOOK | flags)
    except OSError as exc:
        raise GuestRefused(f"{name} can't be opened: {exc.strerror}") from exc
    stack.callback(os.close, file)
    return file


def limit_process(limits: Limits, file_size: int | None = None, data: int | None = None) -> None:
    """Limits this process, which is the guest's alone, in what wasmtime can't limit. A write beyond
    `file_size` bytes of a file kills it by SIGXFSZ (Python ignores that signal by default). `data` bytes
    bound all its memory together."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.max_open_files is not None:
        _lower(resource.RLIMIT_NOFILE, limits.max_open_files)
    if data is not None:
        limit_memory(data)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limit_file_size(file_size)


def limit_memory(size: int) -> None:
    """Bytes of memory that this process may write to, whatever it is mapped from."""
    _lower(resource.RLIMIT_DATA, size)


def limit_file_size(size: int) -> None:
    """Bytes of each file that this process may write to, in memory (memfd_create(2)) or on a disk."""
    _lower(resource.RLIMIT_FSIZE, size)


def deepen_stack(size: int) -> None:
    """The main thread of the next program gets a stack of at least `size` bytes, if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY and soft < size:
        wanted = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def _lower(limit: int, wanted: int) -> None:
    _soft, hard = resource.getrlimit(limit)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(limit, (value, value))


# -- the runner's own folder -------------------------------------------------------------------------------


def cache_home() -> str:
    """The user's cache folder. As in the mount, a relative XDG_CACHE_HOME is ignored (XDG specification)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return given if os.path.isabs(given) else os.path.join(os.path.expanduser("~"), ".cache")


def private_folder(*parts: str) -> str:
    """`$XDG_CACHE_HOME/ipfsfuse-run/parts...`, made if it is missing.

    Raises StoreFailed if a folder on the way can't be made, is a symlink, or is not this user's alone."""
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
                pass  # whatever it is: checked next, without following a symlink
            # an earlier version made the deeper folders with mode 0755: nobody else can reach those
            _check_private(path, 0o077 if depth < 2 else 0o022)
    except OSError as exc:
        raise StoreFailed(f"the folder {path} can't be used: {exc.strerror}") from exc
    return path


def _check_private(path: str, forbidden: int) -> None:
    """Raises StoreFailed unless `path` is a folder of this user's that has none of the modes `forbidden`."""
    found = os.lstat(path)
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or mode & forbidden:
        raise StoreFailed(
            f"{path} must be a folder of yours alone (mode 0700): remove it, or set XDG_CACHE_HOME to "
            "another folder"
        )
