"""Compiled guests, kept by what they were made from: the module's bytes, wasmtime's version and settings.

Loading compiled code runs whatever it says, so it is loaded from one place only: a folder of the user's own
cache with mode 0700, through a descriptor of the very file that was checked. Any number of processes may use
the folder at once. An entry `KEY` is compiled into the file `KEY.part`, which is locked meanwhile, so that of
several processes one compiles and the others wait; it appears whole, by rename. Names that are not the
cache's own are left alone.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import wasmtime
from wasmtime import _ffi

from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import guest, sandbox, signals
from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.guest import Guest, Settings

if TYPE_CHECKING:
    from wasmtime import component

BOUND = 1 << 30
"""Bytes that the whole cache may take; what was used longest ago goes first."""

_PART = ".part"
_ENTRY = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}(\.part)?|\.[0-9a-f]{16}\.part")
"""Names of our own: entries, entries that are being made, and what an earlier version left of the latter."""
_MAX_ANSWER = 64 << 10


class Compiled(NamedTuple):
    """What the compiling process made: nothing where the cache has it now, else the code itself."""

    code: bytes | None


class CodeCache:
    """`folder` None is a cache that keeps nothing: a run must not fail for want of one."""

    def __init__(self, folder: Path | None, bound: int = BOUND) -> None:
        self.folder = folder
        self.bound = bound

    @classmethod
    def of_user(cls) -> "CodeCache":
        try:
            return cls(sandbox.private_folder("code"))
        except StoreFailed:
            return cls(None)

    def kept(
        self, engine: wasmtime.Engine, file: io.BufferedReader | io.BytesIO, name: str, settings: Settings
    ) -> Guest | None:
        """The guest in `file` if it was compiled before, without holding its bytes: 25 MB of them take 10 ms.
        Leaves the file at its start; one that has none, a pipe, is not looked at. Raises OSError."""
        if not file.seekable():
            return None
        kind = guest.kind_of(file.read(guest.HEAD_BYTES))
        file.seek(0)
        if kind is None:
            return None
        digest = hashlib.file_digest(file, "sha256")
        file.seek(0)
        return self._guest(engine, kind, _key(digest.hexdigest(), kind, settings), name)

    def load(self, engine: wasmtime.Engine, kind: str, code: bytes, name: str, settings: Settings) -> Guest:
        """The guest `code`, compiled before or now, by a process of its own. Forks. Raises GuestRefused."""
        key = _key(hashlib.sha256(code).hexdigest(), kind, settings)
        found = self._guest(engine, kind, key, name)
        if found is not None:
            return found
        made = _in_own_process(lambda: self._compile(engine, kind, code, name, key), name)
        found = self._guest(engine, kind, key, name) if made.code is None else None
        if found is not None:
            return found
        if made.code is None:
            raise GuestRefused(
                f"{name} was compiled, and its code is gone from {self.folder} again: run it once more"
            )
        return Guest(name, engine, guest.form_of(kind).deserialize(engine, made.code))

    def _compile(self, engine: wasmtime.Engine, kind: str, code: bytes, name: str, key: str) -> bytes | None:
        """In the compiling process: makes the entry `key`, unless another process made it meanwhile. Gives
        the code where it could not be kept: a full disk costs speed. Raises GuestRefused."""
        path = None if self.folder is None else self.folder / f"{key}{_PART}"
        part = None if path is None else self._locked(path)
        if path is None or part is None:
            return bytes(guest.compile_guest(engine, kind, code, name).compiled.serialize())
        with open(part, "r+b") as out:
            if self._guest(engine, kind, key, name) is not None:
                path.unlink(missing_ok=True)
                return None
            made = bytes(guest.compile_guest(engine, kind, code, name).compiled.serialize())
            return None if self._put(out, path, key, made) else made

    def _locked(self, part: Path) -> int | None:
        """The file `part`, locked for us alone and made where it is missing; None where it can't be ours."""
        with contextlib.suppress(OSError):
            while True:
                file = os.open(
                    part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
                )
                if not _is_ours(os.fstat(file)):
                    os.close(file)
                    return None
                fcntl.flock(file, fcntl.LOCK_EX)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file), os.lstat(part)):
                        return file
                os.close(file)  # it became an entry, or was removed, while we waited
        return None

    def _put(self, out: io.BufferedRandom, part: Path, key: str, code: bytes) -> bool:
        try:
            out.truncate(0)
            out.write(code)
            out.flush()
            _used_now(out.fileno())
            os.fdatasync(out.fileno())  # a file cut short by a power failure would be run
            os.rename(part, part.with_name(key))
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part)
            return False
        with contextlib.suppress(OSError):
            self._trim(part.parent, key)
        return True

    def _guest(self, engine: wasmtime.Engine, kind: str, key: str, name: str) -> Guest | None:
        found = self._get(engine, kind, key)
        return None if found is None else Guest(name, engine, found)

    def _get(
        self, engine: wasmtime.Engine, kind: str, key: str
    ) -> "wasmtime.Module | component.Component | None":
        if self.folder is None:
            return None
        try:
            file = os.open(self.folder / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not _is_ours(os.fstat(file)):
                return None
            _used_now(file)
            return guest.form_of(kind).deserialize_file(engine, f"/proc/self/fd/{file}")
        except (wasmtime.WasmtimeError, OSError):
            return None  # another machine's, in a shared home: compiled again, and replaced
        finally:
            os.close(file)

    def _trim(self, folder: Path, made: str) -> None:
        with os.scandir(folder) as entries:
            own = [
                each
                for each in entries
                if _ENTRY.fullmatch(each.name) and each.is_file(follow_symlinks=False)
            ]
        found = sorted(
            ((each.stat(follow_symlinks=False), each.path) for each in own),
            key=lambda pair: pair[0].st_mtime_ns,
        )
        total = sum(info.st_size for info, _path in found)
        for info, path in found:
            if total <= self.bound:
                return
            if path != str(folder / made) and (not path.endswith(_PART) or _is_unlocked(path)):
                Path(path).unlink(missing_ok=True)
                total -= info.st_size


def _is_ours(found: os.stat_result) -> bool:
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & 0o022
        and found.st_nlink == 1
    )


def _is_unlocked(path: str) -> bool:
    """Whether nobody is compiling into the file `path`."""
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _used_now(file: int) -> None:
    """The kernel's own time stamps stand still for milliseconds, in which two guests can be started."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _key(digest: str, kind: str, settings: Settings) -> str:
    # the library's size and time stand for wasmtime's version, which takes 20 ms to ask for; wasmtime checks
    # that itself too
    library = os.stat(_ffi.dll._name)
    parts = (str(library.st_size), str(library.st_mtime_ns), platform.machine(), kind, *map(str, settings))
    return f"{digest}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


# -- the compiling process ---------------------------------------------------------------------------------


def _in_own_process(make: Callable[[], bytes | None], name: str) -> Compiled:
    """Runs `make` in a forked process, which ends with this one: whoever kills this one for taking too long
    ends the compilation. Raises GuestRefused as `make` does, and where the process ended otherwise."""
    spare = os.memfd_create("code", os.MFD_CLOEXEC)
    told, teller = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _compiler(make, parent, teller, spare)
    os.close(teller)
    with open(told, "rb") as answers, open(spare, "rb") as code:
        answer = answers.read(_MAX_ANSWER)
        _pid, status = os.waitpid(pid, 0)
        if status or not answer:
            raise GuestRefused(f"{name} can't be compiled: {_end_text(os.waitstatus_to_exitcode(status))}")
        said = json.loads(answer)
        if "refused" in said:
            raise GuestRefused(said["refused"])
        code.seek(0)
        return Compiled(code.read() if said["apart"] else None)


def _compiler(make: Callable[[], bytes | None], parent: int, teller: int, spare: int) -> NoReturn:
    try:
        signals.die_with(parent)
        try:
            code = make()
        except GuestRefused as exc:
            os.write(teller, json.dumps({"refused": str(exc)[: _MAX_ANSWER // 16]}).encode())
            os._exit(0)
        if code is not None:
            with open(spare, "wb", closefd=False) as out:
                out.write(code)
        os.write(teller, json.dumps({"apart": code is not None}).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _end_text(code: int) -> str:
    if code >= 0:
        return "the compiling process failed"
    return f"the compiling process was ended by {signal.Signals(-code).name}"
