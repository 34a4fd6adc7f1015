"""Compiled guests, kept by what they were made from: the module's bytes, wasmtime's version and settings.

Loading compiled code runs whatever it says, so it is loaded from one place only: a folder of the user's own cache with
mode 0700, through a descriptor of the very file that was checked. Any number of processes may use it at once: files
appear whole, by rename, and are only ever removed whole.
"""

import hashlib
import io
import os
import platform
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import wasmtime
from wasmtime import _ffi

from ipfsfuse.errors import StoreFailed
from runner import folders, guest
from runner.guest import Guest, Settings

if TYPE_CHECKING:
    from wasmtime import component

BOUND = 1 << 30
"""Bytes that the whole cache may take; what was used longest ago goes first."""


class CodeCache:
    """`folder` None is a cache that keeps nothing: a run must not fail for want of one."""

    def __init__(self, folder: Path | None, bound: int = BOUND) -> None:
        self.folder = folder
        self.bound = bound

    @classmethod
    def of_user(cls) -> "CodeCache":
        try:
            return cls(folders.private("code"))
        except StoreFailed:
            return cls(None)

    def kept(self, file: io.BufferedReader | io.BytesIO, name: str, settings: Settings) -> Guest | None:
        """The guest in `file` if it was compiled before, without holding its bytes: 25 MB of them take 10 ms. Leaves the file at its
        start; one that has none, a pipe, is not looked at. Raises OSError."""
        if not file.seekable():
            return None
        kind = guest.kind_of(file.read(guest.HEAD_BYTES))
        file.seek(0)
        if kind is None:
            return None
        engine, digest = guest.make_engine(settings), hashlib.file_digest(file, "sha256")
        file.seek(0)
        kept = self._get(engine, kind, _key(digest.hexdigest(), kind, settings))
        return None if kept is None else Guest(name, engine, kept)

    def load(self, kind: str, code: bytes, name: str, settings: Settings) -> Guest:
        """The guest `code`, compiled now or before. Raises GuestRefused."""
        engine = guest.make_engine(settings)
        key = _key(hashlib.sha256(code).hexdigest(), kind, settings)
        kept = self._get(engine, kind, key)
        if kept is not None:
            return Guest(name, engine, kept)
        made = guest.compile_guest(engine, kind, code, name)
        self._put(key, made)
        return made

    def _get(self, engine: wasmtime.Engine, kind: str, key: str) -> "wasmtime.Module | component.Component | None":
        if self.folder is None:
            return None
        try:
            file = os.open(self.folder / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
            _used_now(file)
            return guest.form_of(kind).deserialize_file(engine, f"/proc/self/fd/{file}")
        except (wasmtime.WasmtimeError, OSError):
            return None  # another machine's, in a shared home: compiled again, and replaced
        finally:
            os.close(file)

    def _put(self, key: str, made: Guest) -> None:
        if self.folder is None:
            return
        part = self.folder / f".{os.urandom(8).hex()}.part"
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(file, "wb") as out:
                out.write(made.compiled.serialize())
                out.flush()
                _used_now(out.fileno())
                os.fdatasync(out.fileno())  # a file cut short by a power failure would be run
            os.rename(part, self.folder / key)
            self._trim()
        except OSError:
            part.unlink(missing_ok=True)  # a full disk costs speed

    def _trim(self) -> None:
        assert self.folder is not None
        with os.scandir(self.folder) as entries:
            kept = sorted(((each.stat(follow_symlinks=False), each.path) for each in entries), key=lambda each: each[0].st_mtime_ns)
        total = sum(each.st_size for each, _path in kept)
        for each, path in kept[:-1]:
            if total <= self.bound:
                return
            Path(path).unlink(missing_ok=True)
            total -= each.st_size


def _used_now(file: int) -> None:
    """The kernel's own time stamps stand still for milliseconds, in which two guests can be started."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _key(digest: str, kind: str, settings: Settings) -> str:
    # the library's size and time stand for wasmtime's version, which takes 20 ms to ask for; wasmtime checks that itself too
    library = os.stat(_ffi.dll._name)
    parts = (str(library.st_size), str(library.st_mtime_ns), platform.machine(), kind, *map(str, settings))
    return f"{digest}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
