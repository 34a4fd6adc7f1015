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
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ipfsfuse import units
from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import limits, lockdown, sandbox, signals
from ipfsfuse_run.errors import GuestRefused
from ipfsfuse_run.lockdown import Access

if TYPE_CHECKING:  # the wasmtime command needs none of the library, which takes 40 ms to import
    import wasmtime

    from ipfsfuse_run.guest import Guest, Settings

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
        self, engine: "wasmtime.Engine", file: io.BufferedReader | io.BytesIO, name: str, settings: "Settings"
    ) -> "Guest | None":
        """The guest in `file` if it was compiled before, without holding its bytes: 25 MB of them take 10 ms.
        Leaves the file at its start; one that has none, a pipe, is not looked at. Raises OSError."""
        from ipfsfuse_run import guest

        if not file.seekable():
            return None
        kind = guest.kind_of(file.read(guest.HEAD_BYTES))
        file.seek(0)
        if kind is None:
            return None
        digest = hashlib.file_digest(file, "sha256")
        file.seek(0)
        return self._guest(engine, kind, _key(digest.hexdigest(), kind, settings), name)

    def load(
        self,
        engine: "wasmtime.Engine",
        kind: str,
        code: bytes,
        name: str,
        settings: "Settings",
        memory: int = limits.COMPILE_MEMORY,
    ) -> "Guest":
        """The guest `code`, compiled before or now, by a process of its own that has `memory` bytes. Forks.
        Raises GuestRefused."""
        from ipfsfuse_run import guest

        key = _key(hashlib.sha256(code).hexdigest(), kind, settings)
        found = self._guest(engine, kind, key, name)
        if found is not None:
            return found

        def build() -> bytes:
            guest.form_of(kind)  # imports what is needed, as long as this process can
            lockdown.lock(self.access())
            return bytes(guest.compile_guest(engine, kind, code, name).compiled.serialize())

        def is_there() -> bool:
            return self._guest(engine, kind, key, name) is not None

        made = _in_own_process(lambda: self._compile(key, is_there, build), name, memory)
        found = self._guest(engine, kind, key, name) if made.code is None else None
        if found is not None:
            return found
        if made.code is None:
            raise GuestRefused(
                f"{name} was compiled, and its code is gone from {self.folder} again: run it once more"
            )
        return guest.Guest(name, engine, guest.form_of(kind).deserialize(engine, made.code))

    def file(self, key: str, build: Callable[[], bytes], name: str, memory: int) -> int:
        """A descriptor of the entry `key`, which `build` makes in a process of its own if it is missing.
        Forks. Raises GuestRefused."""
        found = self.opened(key)
        if found is not None:
            return found
        made = _in_own_process(
            lambda: self._compile(key, lambda: self.opened(key) is not None, build), name, memory
        )
        if made.code is None:
            found = self.opened(key)
            if found is None:
                raise GuestRefused(f"{name} was compiled, and its code is gone again: run it once more")
            return found
        spare = os.memfd_create("code", os.MFD_CLOEXEC)
        with open(spare, "wb", closefd=False) as out:
            out.write(made.code)
        return spare

    def access(self) -> list[Access]:
        """What a locked process needs to keep an entry."""
        if self.folder is None:
            return []
        return [Access(os.open(self.folder, os.O_PATH | os.O_CLOEXEC), write=True)]

    def _compile(self, key: str, is_there: Callable[[], bool], build: Callable[[], bytes]) -> bytes | None:
        """In the compiling process: makes the entry `key`, unless another process made it meanwhile. Gives
        the code if it can't be kept: a full disk costs speed. Raises GuestRefused."""
        path = None if self.folder is None else self.folder / f"{key}{_PART}"
        part = None if path is None else self._locked(path)
        if path is None or part is None:
            return build()
        with open(part, "r+b") as out:
            if is_there():
                path.unlink(missing_ok=True)
                return None
            made = build()
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

    def _guest(self, engine: "wasmtime.Engine", kind: str, key: str, name: str) -> "Guest | None":
        import wasmtime

        from ipfsfuse_run import guest

        file = self.opened(key)
        if file is None:
            return None
        try:
            path = f"/proc/self/fd/{file}"
            return guest.Guest(name, engine, guest.form_of(kind).deserialize_file(engine, path))
        except wasmtime.WasmtimeError:
            return None  # another machine's, in a shared home: compiled again, and replaced
        finally:
            os.close(file)

    def opened(self, key: str) -> int | None:
        """A descriptor of the entry `key`, checked to be ours."""
        if self.folder is None:
            return None
        try:
            file = os.open(self.folder / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if _is_ours(os.fstat(file)):
                _used_now(file)
                return file
        except OSError:
            pass
        os.close(file)
        return None

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


def _key(digest: str, kind: str, settings: "Settings") -> str:
    from wasmtime import _ffi

    return entry_key(digest, os.stat(_ffi.dll._name), (kind, *map(str, settings)))


def entry_key(digest: str, wasmtime: os.stat_result, settings: Sequence[str]) -> str:
    """The name of an entry. Size and time of `wasmtime` (the library or the command) stand for its version,
    which takes 20 ms to ask for; wasmtime checks the version itself, too."""
    parts = (str(wasmtime.st_size), str(wasmtime.st_mtime_ns), os.uname().machine, *settings)
    return f"{digest}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


# -- the compiling process ---------------------------------------------------------------------------------


def _in_own_process(make: Callable[[], bytes | None], name: str, memory: int) -> Compiled:
    """Runs `make` in a forked process that may write to `memory` bytes. It ends with this one: whoever kills
    this one for taking too long ends the compilation. Raises GuestRefused as `make` does, and if the process
    ended otherwise."""
    spare = os.memfd_create("code", os.MFD_CLOEXEC)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _compiler(make, parent, write_end, spare, memory)
    os.close(write_end)
    with open(read_end, "rb") as answers, open(spare, "rb") as code:
        answer = answers.read(_MAX_ANSWER)
        _pid, status = os.waitpid(pid, 0)
        if status or not answer:
            code_of_end = os.waitstatus_to_exitcode(status)
            raise GuestRefused(
                f"{name} can't be compiled: {_end_text(code_of_end)} (it may use "
                f"{units.size_text(memory)} of memory: give -W compile-memory=SIZE for more)"
            )
        said = json.loads(answer)
        if "refused" in said:
            raise GuestRefused(said["refused"])
        code.seek(0)
        return Compiled(code.read() if said["apart"] else None)


def _compiler(
    make: Callable[[], bytes | None], parent: int, write_end: int, spare: int, memory: int
) -> NoReturn:
    try:
        signals.die_with(parent)
        sandbox.limit_memory(memory)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust writes a back-trace where it finds no memory
        try:
            code = make()
        except MemoryError:
            os._exit(1)
        except GuestRefused as exc:
            os.write(write_end, json.dumps({"refused": str(exc)[: _MAX_ANSWER // 16]}).encode())
            os._exit(0)
        if code is not None:
            with open(spare, "wb", closefd=False) as out:
                out.write(code)
        os.write(write_end, json.dumps({"apart": code is not None}).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _end_text(code: int) -> str:
    if code >= 0:
        return "the compiling process failed"
    return f"the compiling process was ended by {signal.Signals(-code).name}"
