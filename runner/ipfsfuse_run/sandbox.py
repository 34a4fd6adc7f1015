"""The folders that a guest can reach: `/`, `/ipfs`, `/tmp`, `/out` if results are wanted, and those of --dir.
It gets no socket and none of the host's variables.

`/` is the directory of --root. Without --root it is a read-only folder that holds the other names, for
programs that walk from the root. This folder lies in the runner's cache folder and is named after its
content, so it is used again and a killed run leaves nothing to remove.
"""

import contextlib
import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from ipfsfuse.errors import UsageError
from ipfsfuse_run import host_folders
from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.options import Dir, Options

IPFS, IPNS, TMP, OUT = "/ipfs", "/ipns", "/tmp", "/out"

TMP_BYTES = 256 << 20
"""The default size of /tmp."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})


class Preopen(NamedTuple):
    """A folder of the host, and its name for the guest."""

    host: str
    guest: str
    writable: bool
    mount_id: int | None = None
    """The kernel's number of the mount that `host` must be in; None for any folder."""
    rest: str = ""
    """The path from `host` to the folder that is given. No symlink may lead out of `host`."""


class Sandbox(NamedTuple):
    """Everything that a guest is given. `argv` starts with its own name."""

    argv: Sequence[str]
    env: Sequence[tuple[str, str]]
    preopens: Sequence[Preopen]
    cwd: str | None
    tmp: int = 0
    """Bytes that the guest's own `/tmp` may hold; 0 for no `/tmp`. It is not among `preopens`."""

    @property
    def variables(self) -> dict[str, str]:
        """`env`, and PWD if there is a working directory."""
        return ({} if self.cwd is None else {"PWD": self.cwd}) | dict(self.env)


def build(
    options: Options, mountpoint: str, mount_id: int | None = None, names: Mapping[str, str] = NO_NAMES
) -> Sandbox:
    """`names` maps each IPNS name to a path below the mountpoint. Raises UsageError, StoreFailed."""
    # with --invoke, args are the function's arguments
    argv = (options.argv0 or posixpath.basename(options.guest), *options.args)
    guests = [options.cwd or "", *(each.guest for each in options.dirs)]
    for text in (*argv, *guests, *names, *(part for variable in options.env for part in variable)):
        _check_text(text)
    tmp = _tmp_size(options)
    folders = _preopens(mountpoint, options, mount_id, names, bool(tmp))
    return Sandbox(argv, options.env, folders, options.cwd, tmp)


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


def _preopens(
    mountpoint: str, options: Options, mount_id: int | None, names: Mapping[str, str], has_tmp: bool
) -> list[Preopen]:
    """`/`, `/ipfs`, the names in `/ipns`, `/out`, and the folders of --dir, in this order. Opens nothing.
    Raises UsageError for a name that the guest can't have."""
    found = [Preopen(mountpoint, IPFS, writable=False, mount_id=mount_id)]
    for name, path in names.items():
        host = os.path.join(mountpoint, path)
        found.append(Preopen(host, f"{IPNS}/{name}", writable=False, mount_id=mount_id))
    if options.out is not None:
        found.append(Preopen(options.out, OUT, writable=True))
    for each in options.dirs:
        guest = _name(each)
        if guest == ".." or guest.startswith("../") or "\0" in guest:
            raise UsageError(f"--dir {each.host}::{each.guest}: the guest's name for it can't lead upward")
        for folder, is_taken, why in (
            (IPFS, True, "/ipfs is the mount's"),
            (IPNS, bool(names), "/ipns has the names given with --ipns"),
            (OUT, options.out is not None, "/out is the folder of --out"),
        ):
            # WASI's C library takes `ipfs` and `//ipfs` for /ipfs too
            if is_taken and _below("/" + guest.lstrip("/"), folder):
                raise UsageError(f"--dir {each.host}::{each.guest}: {why}")
        if options.root is not None and guest == "/":
            raise UsageError(f"--dir {each.host}::/: / is the directory of --root")
        found.append(Preopen(each.host, guest, each.writable))
    if options.root is not None:
        found.insert(0, Preopen(mountpoint, "/", writable=False, mount_id=mount_id, rest=options.root))
    elif not any(each.guest == "/" for each in found):
        root = _root([*(each.guest for each in found), *[TMP] * has_tmp])
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
    root = host_folders.private_folder("roots", digest)
    for each in inside:
        host_folders.private_folder("roots", digest, *filter(None, each.split("/")))
    for folder, _names, _files in os.walk(root):
        os.chmod(folder, 0o500)  # the wasmtime command makes every folder writable for the guest
    return root


_LOOK = os.O_PATH | os.O_CLOEXEC


class OpenFolder(NamedTuple):
    """A folder that was opened for the guest. `path` names this folder even if it is renamed or replaced."""

    name: str
    """For messages."""
    file: int
    guest: str
    writable: bool
    in_mount: bool = False
    """Whether it is in a mount of ours, which refuses writes itself."""

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.file}"


@contextlib.contextmanager
def open_folders(box: Sandbox) -> Iterator[list[OpenFolder]]:
    """Opens the preopens, and the working directory as the preopen `.`: WASI has no working directory, and
    its C library resolves relative names by that preopen. Call it only in the guest's process, because the
    folders may be in the mount. Raises GuestRefused."""
    with contextlib.ExitStack() as stack:
        found: list[OpenFolder] = []

        def add(given: Preopen, top: str, rest: str, name: str, guest: str) -> None:
            place = open_beneath(top, rest, name, os.O_DIRECTORY, given.mount_id)
            file = stack.enter_context(place)
            found.append(OpenFolder(name, file, guest, given.writable, given.mount_id is not None))

        for each in box.preopens:
            hint = " (two colons part it from the guest's name: HOST::GUEST)" if ":" in each.host else ""
            name = f"--root {each.rest}" if each.rest else f"the folder {each.host}{hint}"
            add(each, each.host, each.rest, name, each.guest)
        if box.cwd is not None and not (box.tmp and is_tmp(box.cwd)):
            base, rest = _working_folder(box.cwd, box.preopens)
            add(base, os.path.join(base.host, base.rest), rest, f"--cwd {box.cwd}", ".")
        yield found


def _check_mount(file: int, mount_id: int | None, path: str) -> None:
    """Raises GuestRefused unless the open `file` is in the mount `mount_id`. Asks only the kernel, not the
    mount's daemon."""
    if mount_id is None:
        return
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as lines:
        found = next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)
    if found != mount_id:
        raise GuestRefused(f"{path} is not the mount any more that was found there: run it again")


def _working_folder(cwd: str, given: Sequence[Preopen]) -> tuple[Preopen, str]:
    """The preopen that contains `cwd`, and the path from there. Raises GuestRefused."""
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
def open_beneath(
    base: str, rest: str, name: str, flags: int = 0, mount_id: int | None = None
) -> Iterator[int]:
    """A descriptor (O_PATH) of the path `rest` below `base`. Raises GuestRefused if a symlink leads out of
    `base`.

    The check comes after opening: anyone who may write below `base` could change the path after an earlier
    check."""
    with contextlib.ExitStack() as stack:
        opened = []
        for path, more in ((base, 0), (os.path.join(base, rest), flags)):
            try:
                opened.append(os.open(path, _LOOK | more))
            except OSError as exc:
                raise GuestRefused(f"{name} can't be opened: {exc.strerror}") from exc
            stack.callback(os.close, opened[-1])
        for each in opened:
            _check_mount(each, mount_id, base)
        top, path = (os.readlink(f"/proc/self/fd/{each}") for each in opened)
        if not _below(path, top):
            raise GuestRefused(f"{name} leads out of {base}")
        yield opened[-1]
