"""What a guest can reach: `/`, `/ipfs`, the folders given with --dir; no socket, and no variable of the
host's.

`/` is a folder that holds the other names and can't be written, so that programs which walk from the root
find their way. It is named after what it holds and stays in the runner's cache folder: nothing is left to
remove after a kill.
"""

import contextlib
import hashlib
import os
import posixpath
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import wasmtime

from ipfsfuse.errors import UsageError
from ipfsfuse_run import paths
from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.options import Dir, Options

IPFS = "/ipfs"


class Preopen(NamedTuple):
    """A folder of the host at a name of the guest's."""

    host: str
    guest: str
    writable: bool
    mount_id: int | None = None
    """The kernel's number of the mount that `host` must be the top of; None for any folder."""


class Sandbox(NamedTuple):
    """All that a guest is given. `argv` starts with its own name."""

    argv: Sequence[str]
    env: Sequence[tuple[str, str]]
    preopens: Sequence[Preopen]
    cwd: str | None
    limits: Limits


def build(options: Options, mountpoint: str, mount_id: int | None = None) -> Sandbox:
    """Raises UsageError, StoreFailed."""
    argv = (options.argv0 or posixpath.basename(options.guest), *options.args)
    names = [options.cwd or "", *(each.guest for each in options.dirs)]
    for text in (*argv, *names, *(part for variable in options.env for part in variable)):
        _check_text(text)
    return Sandbox(
        argv, options.env, preopens(mountpoint, options.dirs, mount_id), options.cwd, options.limits
    )


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(
            f"{text!r} is not UTF-8: WASI knows no other arguments, variables and names"
        ) from exc


def preopens(mountpoint: str, dirs: Sequence[Dir], mount_id: int | None = None) -> list[Preopen]:
    """`/`, `/ipfs` and `dirs`, in this order; nothing is opened. Raises UsageError for a guest's name that
    can't be."""
    found = [Preopen(mountpoint, IPFS, writable=False, mount_id=mount_id)]
    for each in dirs:
        guest = posixpath.normpath(each.guest)
        if guest == ".." or guest.startswith("../") or "\0" in guest:
            raise UsageError(f"--dir {each.host}::{each.guest}: the guest's name for it can't lead upward")
        if _below("/" + guest.lstrip("/"), IPFS):  # WASI's C library takes `ipfs` and `//ipfs` for it too
            raise UsageError(f"--dir {each.host}::{each.guest}: /ipfs is the mount's")
        found.append(Preopen(each.host, guest, each.writable))
    if not any(each.guest == "/" for each in found):
        found.insert(0, Preopen(str(_root([each.guest for each in found])), "/", writable=False))
    return found


def _root(names: Sequence[str]) -> Path:
    inside = sorted(each.strip("/") for each in names if each.startswith("/"))
    digest = hashlib.sha256("\0".join(inside).encode(errors="surrogateescape")).hexdigest()[:16]
    root = paths.private("roots", digest)
    for each in inside:
        paths.private("roots", digest, *filter(None, each.split("/")))
    return root


def wasi_config(box: Sandbox) -> wasmtime.WasiConfig:
    """For the guest's own process: the folders may be in the mount, and are opened here. Raises
    GuestRefused."""
    wasi = wasmtime.WasiConfig()
    wasi.argv = list(box.argv)
    env = dict(box.env)
    if box.cwd is not None:
        env.setdefault("PWD", box.cwd)
    wasi.env = list(env.items())
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    for each in box.preopens:
        with _folder(each) as path:
            _preopen(wasi, path, each)
    if box.cwd is not None:
        base, rest = _working_folder(box.cwd, box.preopens)
        with inside(base.host, rest, f"--cwd {box.cwd}", os.O_DIRECTORY, base.mount_id) as path:
            _preopen(wasi, path, Preopen(box.cwd, ".", base.writable))
    return wasi


def _preopen(wasi: wasmtime.WasiConfig, path: str, each: Preopen) -> None:
    try:
        wasi.preopen_dir(path, each.guest, each.writable)
    except wasmtime.WasmtimeError as exc:
        raise GuestRefused(f"the folder {each.host} can't be read by the guest") from exc


_LOOK = os.O_PATH | os.O_CLOEXEC


@contextlib.contextmanager
def _folder(each: Preopen) -> Iterator[str]:
    try:
        folder = os.open(each.host, _LOOK | os.O_DIRECTORY)
    except OSError as exc:
        raise GuestRefused(f"the folder {each.host} can't be opened for the guest: {exc.strerror}") from exc
    try:
        _check_mount(folder, each.mount_id, each.host)
        yield _path(folder)
    finally:
        os.close(folder)


def _check_mount(file: int, mount_id: int | None, path: str) -> None:
    """Raises GuestRefused unless the open `file` is in the mount of that number: the kernel knows, without
    asking its daemon."""
    if mount_id is None:
        return
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as lines:
        found = next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)
    if found != mount_id:
        raise GuestRefused(f"{path} is not the mount any more that was found there: run it again")


def _path(file: int) -> str:
    """A name of an open file which is that very file's, whatever becomes of the name that it was opened
    by."""
    return f"/proc/self/fd/{file}"


def _working_folder(cwd: str, given: Sequence[Preopen]) -> tuple[Preopen, str]:
    """`cwd` as a folder that was given and a name below it. It becomes the folder `.`: WASI has no working
    directory, and its C library resolves relative names by that name."""
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
    """A path of the file that `rest` leads to below `base`, out of which no symlink can lead. Raises
    GuestRefused.

    What is opened is looked at only then: whoever may write below `base` could put a symlink behind any look
    before."""
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
    """What wasmtime can't limit: this process, which is the guest's alone. A write beyond `file_size` bytes
    in a file kills it by SIGXFSZ, which Python ignores; memory beyond `data` bytes is refused to all memories
    together."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.max_open_files is not None:
        _lower(resource.RLIMIT_NOFILE, limits.max_open_files)
    if data is not None:
        _lower(resource.RLIMIT_DATA, data)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        _lower(resource.RLIMIT_FSIZE, file_size)


def _lower(limit: int, wanted: int) -> None:
    _soft, hard = resource.getrlimit(limit)
    value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(limit, (value, value))
