"""What a guest can reach: `/`, `/ipfs`, the folders given with --dir; and nothing else (no network, no variable of the host's).

`/` is a folder that holds the other names and can't be written, so that programs which walk from the root find their
way. It is named after what it holds and stays in the runner's cache folder: nothing is left to remove after a kill.
"""

import hashlib
import os
import posixpath
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import wasmtime

from ipfsfuse.errors import UsageError
from runner import folders
from runner.errors import GuestRefused
from runner.limits import Limits
from runner.options import Dir, Options

IPFS = "/ipfs"


class Preopen(NamedTuple):
    """A folder of the host at a name of the guest's."""

    host: str
    guest: str
    writable: bool


class Sandbox(NamedTuple):
    """All that a guest is given. `argv` starts with its own name."""

    argv: Sequence[str]
    env: Sequence[tuple[str, str]]
    preopens: Sequence[Preopen]
    cwd: str | None
    limits: Limits


def build(options: Options, mountpoint: str) -> Sandbox:
    """Raises UsageError."""
    argv = (options.argv0 or posixpath.basename(options.guest), *options.args)
    for text in (*argv, *(part for variable in options.env for part in variable)):
        _check_text(text)
    return Sandbox(argv, options.env, preopens(mountpoint, options.dirs), options.cwd, options.limits)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"{text!r} is no UTF-8: WASI can give a guest no other arguments and variables") from exc


def preopens(mountpoint: str, dirs: Sequence[Dir]) -> list[Preopen]:
    """`/`, `/ipfs` and `dirs`, in this order. Raises UsageError for a folder that is none, or a name below /ipfs."""
    found = [Preopen(mountpoint, IPFS, writable=False)]
    for each in dirs:
        if not os.path.isdir(each.host):
            raise UsageError(f"--dir {each.host}: " + ("is no folder" if os.path.exists(each.host) else "there is no such folder"))
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
    root = folders.private("roots", digest)
    for each in inside:
        (root / each).mkdir(parents=True, exist_ok=True)
    return root


def wasi_config(box: Sandbox) -> wasmtime.WasiConfig:
    """The preopens come last: what they name may be in the mount, and is opened here. Raises GuestRefused."""
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
        _preopen(wasi, each)
    if box.cwd is not None:
        _preopen(wasi, _working_folder(box.cwd, box.preopens))
    return wasi


def _preopen(wasi: wasmtime.WasiConfig, each: Preopen) -> None:
    try:
        wasi.preopen_dir(each.host, each.guest, each.writable)
    except wasmtime.WasmtimeError as exc:
        raise GuestRefused(f"the folder {each.host} can't be opened for the guest") from exc


def _working_folder(cwd: str, given: Sequence[Preopen]) -> Preopen:
    """`cwd` as the folder `.`: WASI has no working directory, and its C library resolves relative names by that name."""
    wanted = posixpath.normpath(cwd)
    base = max((each for each in given if _below(wanted, each.guest)), key=lambda each: len(each.guest), default=None)
    if base is None:
        raise GuestRefused(f"--cwd {cwd} is in no folder that the guest has")
    rest = wanted[len(base.guest.rstrip("/")) :].lstrip("/")
    return Preopen(inside(base.host, rest, cwd), ".", base.writable)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def inside(base: str, rest: str, name: str) -> str:
    """The real path of `rest` below `base`, which symlinks can't leave. Raises GuestRefused."""
    top = os.path.realpath(base)
    try:
        path = os.path.realpath(os.path.join(top, rest), strict=True)
    except OSError as exc:
        raise GuestRefused(f"{name} can't be opened: {exc.strerror}") from exc
    if not _below(path, top):
        raise GuestRefused(f"{name} leads out of {base}")
    return path


def limit_process(limits: Limits) -> None:
    """What wasmtime can't limit: the descriptors of this process, which is the guest's alone."""
    if limits.max_open_files is not None:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = limits.max_open_files if hard == resource.RLIM_INFINITY else min(limits.max_open_files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
